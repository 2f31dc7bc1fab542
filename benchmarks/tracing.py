"""What tracing and eager calls cost: medians of runs that take turns in one process, and counts that need no clock."""

from __future__ import annotations

import cProfile
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

DEPTH, SHALLOW, TRACES, CALLS = 48, 12, 9, 100
_CAPTION = (
    f"Ratios are to the plain model. Medians of {TRACES} traces on empty caches (CPU time of the thread) "
    f"and of {CALLS} calls (wall time).\n"
    "Function calls: of Python and its builtins during one trace, the same on every run.\n"
    f"growth: of the function calls per layer from {SHALLOW} to {DEPTH} layers; above 1 is more than linear."
)


@dataclasses.dataclass(frozen=True)
class Timing:
    """Median seconds of a trace of the deep model, of an eager call and an eager gradient of one layer."""

    trace: float
    call: float
    gradient: float


def timings(framework: str) -> dict[Variant, Timing]:
    """Times all variants of one framework, taking turns so that a slow moment hits them alike."""
    columns = [
        _medians(_runs(framework, DEPTH, _trace), TRACES),
        _medians(_runs(framework, 1, _call), CALLS),
        _medians(_runs(framework, 1, _gradient), CALLS),
    ]
    return {variant: Timing(*(column[variant] for column in columns)) for variant in variants(framework)}


def function_calls(framework: str, variant: Variant, depth: int) -> int:
    """Counts the function calls that tracing the gradient makes."""
    case = build(framework, "dense", variant, depth)
    _trace(case)  # the first trace imports modules, too
    arguments = case.arguments
    jax.clear_caches()
    profile = cProfile.Profile()
    profile.runcall(_make_jaxpr, case, arguments)
    return sum(entry.callcount for entry in profile.getstats())


def table() -> Table:
    """Shows milliseconds, counts, and ratios to the model without a rule."""
    made = Table("framework", "variant", title="Tracing and eager calls: Dense", caption=_CAPTION)
    for title in (
        f"make_jaxpr(grad)\n{DEPTH} layers",
        f"function calls\n{DEPTH} layers",
        "growth\n",
        "eager call\n1 layer",
        "eager grad\n1 layer",
    ):
        made.add_column(title, justify="right", no_wrap=True)
    for framework in FRAMEWORKS:
        found = timings(framework)
        deep, shallow = (
            {variant: function_calls(framework, variant, depth) for variant in found} for depth in (DEPTH, SHALLOW)
        )
        plain = found["plain"]
        for variant, own in found.items():
            made.add_row(
                framework,
                variant,
                f"{1e3 * own.trace:.0f} ms {own.trace / plain.trace:5.2f}",
                f"{deep[variant] / 1e3:.0f} k {deep[variant] / deep['plain']:5.2f}",
                f"{deep[variant] / shallow[variant] * SHALLOW / DEPTH:.2f}",
                f"{1e3 * own.call:.2f} ms {own.call / plain.call:5.2f}",
                f"{1e3 * own.gradient:.2f} ms {own.gradient / plain.gradient:5.2f}",
            )
        made.add_section()
    return made


def _runs(framework: str, depth: int, run: Callable[[Case], float]) -> dict[Variant, Callable[[], float]]:
    runs: dict[Variant, Callable[[], float]] = {}
    for variant in variants(framework):
        runs[variant] = functools.partial(run, build(framework, "dense", variant, depth))
    return runs


def _medians(runs: dict[Variant, Callable[[], float]], rounds: int) -> dict[Variant, float]:
    for run in runs.values():
        run()  # the first one imports and compiles
    found: dict[Variant, list[float]] = {variant: [] for variant in runs}
    for _ in range(rounds):
        for variant, run in runs.items():
            found[variant].append(run())
    return {variant: statistics.median(seconds) for variant, seconds in found.items()}


def _make_jaxpr(case: Case, arguments: tuple[Any, ...]) -> Any:
    return jax.make_jaxpr(jax.grad(case.loss, has_aux=True))(*arguments)


def _trace(case: Case) -> float:
    arguments = case.arguments
    jax.clear_caches()  # else JAX gives the last round's result
    gc.collect()
    # Tracing is one thread's work; its own clock leaves out what else the machine does.
    return _seconds(lambda: _make_jaxpr(case, arguments), time.thread_time)


def _call(case: Case) -> float:
    arguments = case.arguments
    return _seconds(lambda: jax.block_until_ready(case.apply(*arguments)[0]), time.perf_counter)


def _gradient(case: Case) -> float:
    arguments = case.arguments
    gradient = jax.grad(case.loss, has_aux=True)
    return _seconds(lambda: jax.block_until_ready(gradient(*arguments)[0]), time.perf_counter)


def _seconds(run: Callable[[], Any], clock: Callable[[], float]) -> float:
    gc.disable()  # as timeit does: one collection of all of JAX's objects takes as long as a trace
    try:
        start = clock()
        run()
        return clock() - start
    finally:
        gc.enable()
