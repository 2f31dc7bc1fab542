"""Seconds of runs that take turns, so that a slow moment hits all of them alike, and what is made of these."""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import jax

from benchmarks.cases import Variant

Samples: TypeAlias = Mapping[Variant, list[float]]
"""Seconds of each turn, by variant."""

_PIECE = 128  # about as many frames of `_deeper` as a piece of the stack holds
_STEP = 47  # through all depths, far apart from turn to turn

wall = time.perf_counter
# Tracing is one thread's work; its own clock leaves out what else the machine does.
own_thread = time.thread_time


def seconds(run: Callable[[], Any], clock: Callable[[], float]) -> tuple[float, Any]:
    """Times one run; gives its result, too."""
    gc.disable()  # as timeit does: one collection of all of JAX's objects takes as long as a trace
    try:
        start = clock()
        result = run()
        return clock() - start, result
    finally:
        gc.enable()


def tracing(function: Callable[..., Any], *arguments: Any) -> float:
    """Times one trace of a function, on empty caches."""
    jax.clear_caches()  # else JAX gives the last round's result
    gc.collect()
    return seconds(lambda: jax.make_jaxpr(function)(*arguments), own_thread)[0]


@contextlib.contextmanager
def settled() -> Iterator[None]:
    """Lets the garbage collector pass over what is there now; else it looks through all models before each run."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def interleaved(runs: Mapping[Variant, Callable[[], float]], rounds: int, warm: bool = True) -> Samples:
    """Takes turns; the first turn, in which things are imported and compiled, does not count if `warm`.

    Each turn runs at another depth of Python's stack. That comes in pieces of 16 KiB, and a loop of calls that stands
    just at the end of one gets a new piece from the system, and gives it back, at every call: of a trace, that may be a
    fifth of the time, or nothing, by the number of frames around it.
    """
    found: dict[Variant, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + warm):
        for name, run in runs.items():
            one = _deeper(turn * _STEP % _PIECE, run)
            if turn >= warm:
                found[name].append(one)
    return found


def _deeper(frames: int, run: Callable[[], float]) -> float:
    return _deeper(frames - 1, run) if frames else run()


def ratio(samples: Samples, of: Variant, to: Variant) -> float:
    """Gives the median of the ratios within each turn, which leaves out what slows a whole turn down."""
    return statistics.median(one / other for one, other in zip(samples[of], samples[to], strict=True))


def spread(values: list[float]) -> float:
    """Gives half the distance between the quartiles, of the median; 0 for a single value."""
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / 2 / statistics.median(values)


def shown(samples: Samples, of: Variant, to: Variant) -> str:
    """Writes the median in milliseconds, its spread in percent and the ratio to another."""
    values = samples[of]
    median = 1e3 * statistics.median(values)
    digits = 0 if median >= 100 else 1 if median >= 10 else 2
    return f"{median:.{digits}f} ±{100 * spread(values):.0f}% {ratio(samples, of, to):5.2f}"
