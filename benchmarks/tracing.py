"""What tracing and eager calls cost: medians of runs that take turns in one process."""

from __future__ import annotations

import dataclasses
import functools
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
from rich.table import Table

from benchmarks.cases import FRAMEWORKS, Case, Variant, build, variants

DEPTH, SHALLOW, TRACES, CALLS = 48, 12, 7, 100


@dataclasses.dataclass(frozen=True)
class Timing:
    """Median seconds."""

    trace: float
    shallow: float
    call: float
    gradient: float


def timings(framework: str) -> dict[Variant, Timing]:
    """Times all variants of one framework, taking turns so that a slow moment hits them alike."""
    columns = [
        _medians(_runs(framework, DEPTH, _trace), TRACES),
        _medians(_runs(framework, SHALLOW, _trace), TRACES),
        _medians(_runs(framework, 1, _call), CALLS),
        _medians(_runs(framework, 1, _gradient), CALLS),
    ]
    return {variant: Timing(*(column[variant] for column in columns)) for variant in variants(framework)}


def table() -> Table:
    """Shows milliseconds, and ratios to the model without a rule."""
    made = Table("framework", "variant", title="Tracing and eager calls: Dense", caption=_CAPTION)
    made.add_column(f"make_jaxpr(grad)\n{DEPTH} layers", justify="right")
    made.add_column(f"per layer, {DEPTH}\nagainst {SHALLOW}", justify="right")
    made.add_column("eager call\n1 layer", justify="right")
    made.add_column("eager grad\n1 layer", justify="right")
    for framework in FRAMEWORKS:
        found = timings(framework)
        plain = found["plain"]
        for variant, own in found.items():
            growth = own.trace / own.shallow * SHALLOW / DEPTH
            made.add_row(
                framework,
                variant,
                _against(own.trace, plain.trace),
                f"{growth:.2f}",
                _against(own.call, plain.call),
                _against(own.gradient, plain.gradient),
            )
        made.add_section()
    return made


def _against(own: float, plain: float) -> str:
    return f"{1e3 * own:.2f} ms {own / plain:5.2f}"


def _runs(framework: str, depth: int, run: Callable[[Case], float]) -> dict[Variant, Callable[[], float]]:
    return {
        variant: functools.partial(run, build(framework, "dense", variant, depth)) for variant in variants(framework)
    }


_CAPTION = (
    f"Medians of {TRACES} traces on empty caches (CPU time of the thread) and of {CALLS} calls (wall time), and their "
    "ratios to the plain model."
)


def _medians(runs: dict[Variant, Callable[[], float]], rounds: int) -> dict[Variant, float]:
    for run in runs.values():
        run()  # the first one imports and compiles
    found: dict[Variant, list[float]] = {variant: [] for variant in runs}
    for _ in range(rounds):
        for variant, run in runs.items():
            found[variant].append(run())
    return {variant: statistics.median(seconds) for variant, seconds in found.items()}


def _trace(case: Case) -> float:
    arguments = case.arguments
    jax.clear_caches()  # else JAX gives the last round's result
    gc.collect()
    # Tracing is one thread's work; its own clock leaves out what else the machine does.
    return _seconds(lambda: jax.make_jaxpr(jax.grad(case.loss, has_aux=True))(*arguments), time.thread_time)


def _call(case: Case) -> float:
    arguments = case.arguments
    return _seconds(lambda: case.apply(*arguments)[0], time.perf_counter)


def _gradient(case: Case) -> float:
    arguments = case.arguments
    return _seconds(lambda: jax.grad(case.loss, has_aux=True)(*arguments)[0], time.perf_counter)


def _seconds(run: Callable[[], Any], clock: Callable[[], float]) -> float:
    start = clock()
    jax.block_until_ready(run())
    return clock() - start
