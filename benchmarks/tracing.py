"""What tracing and eager calls cost: medians of runs that take turns in one process."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
from rich.table import Table

from benchmarks.cases import FRAMEWORKS, VARIANTS, Case, Variant, build

DEPTH, TRACES, CALLS = 48, 7, 100


@dataclasses.dataclass(frozen=True)
class Timing:
    """Median seconds."""

    trace: float
    call: float
    gradient: float


def timings(framework: str) -> dict[Variant, Timing]:
    """Times all variants of one framework, taking turns so that a slow moment hits them alike."""
    deep, single = ({v: case for v in VARIANTS if (case := build(framework, "dense", v, n))} for n in (DEPTH, 1))
    traces = _medians({variant: lambda case=case: _trace(case) for variant, case in deep.items()}, TRACES)
    calls = _medians({variant: lambda case=case: _call(case) for variant, case in single.items()}, CALLS)
    gradients = _medians({variant: lambda case=case: _gradient(case) for variant, case in single.items()}, CALLS)
    return {variant: Timing(traces[variant], calls[variant], gradients[variant]) for variant in deep}


def table() -> Table:
    """Prints milliseconds, and ratios to the model without a rule."""
    made = Table(title="Tracing and eager calls: Dense", caption=_CAPTION)
    made.add_column("framework")
    made.add_column("variant")
    for name in (f"make_jaxpr(grad)\n{DEPTH} layers", "eager call\n1 layer", "eager grad\n1 layer"):
        made.add_column(name, justify="right")
    for framework in FRAMEWORKS:
        found = timings(framework)
        plain = dataclasses.astuple(found["plain"])
        for variant, timing in found.items():
            both = zip(dataclasses.astuple(timing), plain, strict=True)
            made.add_row(framework, variant, *(f"{1e3 * own:.2f} ms  {own / of:5.2f}" for own, of in both))
        made.add_section()
    return made


_CAPTION = f"Medians of {TRACES} traces on empty caches and of {CALLS} calls, and their ratios to the plain model."


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
    return _seconds(lambda: jax.make_jaxpr(jax.grad(lambda *args: case.loss(*args)[0]))(*arguments))


def _call(case: Case) -> float:
    arguments = case.arguments
    return _seconds(lambda: jax.block_until_ready(case.apply(*arguments)[0]))


def _gradient(case: Case) -> float:
    arguments = case.arguments
    return _seconds(lambda: jax.block_until_ready(jax.grad(case.loss, has_aux=True)(*arguments)[0]))


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
