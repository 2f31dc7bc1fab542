"""What each stage costs, from the trace of the gradient to a step of the compiled program, and eager calls."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Mapping
from typing import Any

import jax
from rich.table import Table

from benchmarks.cases import FRAMEWORKS, TITLES, Case, Layer, Variant, build, variants
from benchmarks.timing import Samples, interleaved, own_thread, seconds, settled, shown, wall

DEPTH = 8
MODELS: tuple[Layer, ...] = ("dense", "transformer", "residual")
TRACED = 3
COMPILED: dict[Layer, int] = {"dense": 3, "transformer": 1, "residual": 2}  # rounds; a transformer takes seconds
STAGES = ("trace", "lower", "compile", "step", "eager call", "eager grad")
STEPS = 20
CALLS, SLOW_CALLS = 60, 6  # rounds of eager calls: of Dense, which is judged; of the others, which take seconds
_CAPTION = (
    f"Gradient of {DEPTH} wrapped calls; eager: one wrapped call. Medians in milliseconds, ± half the distance\n"
    "between the quartiles, and the ratio to the plain model (median of the ratios within each round).\n"
    "Trace and lower: CPU time of the thread, on empty caches. The others: wall time."
)


def stages(framework: str, layer: Layer) -> dict[str, Samples]:
    """Times every stage of every variant, the variants taking turns."""
    deep: dict[Variant, Case] = {variant: build(framework, layer, variant, DEPTH) for variant in variants(framework)}
    times: dict[str, dict[Variant, list[float]]] = {
        stage: {variant: [] for variant in deep} for stage in ("trace", "lower", "compile")
    }
    steps: dict[Variant, Callable[[], float]] = {}
    with settled():
        for turn in range(TRACED + 1):
            for variant, case in deep.items():
                trace, lower, lowered = _lowered(case)
                if turn == 0:  # the first turn does not count
                    continue
                times["trace"][variant].append(trace)
                times["lower"][variant].append(lower)
                if turn <= COMPILED[layer]:
                    compiling, program = seconds(lowered.compile, wall)
                    times["compile"][variant].append(compiling)
                    steps[variant] = functools.partial(_step, program, case.arguments)
    found: dict[str, Samples] = {**times}
    found["step"] = interleaved(steps, STEPS)
    found["eager call"], found["eager grad"] = eager(framework, layer)
    return found


def eager(framework: str, layer: Layer) -> tuple[Samples, Samples]:
    """Times an eager call, and an eager gradient, of one wrapped call."""
    one: dict[Variant, Case] = {variant: build(framework, layer, variant) for variant in variants(framework)}
    calls: dict[Variant, Callable[[], float]] = {each: functools.partial(_call, case) for each, case in one.items()}
    grads: dict[Variant, Callable[[], float]] = {each: functools.partial(_grad, case) for each, case in one.items()}
    rounds = CALLS if layer == "dense" else SLOW_CALLS
    return interleaved(calls, rounds), interleaved(grads, rounds)


def table(layer: Layer, found: Mapping[str, Mapping[str, Samples]]) -> Table:
    """Shows all stages of all frameworks."""
    made = Table(title=f"Stages: {TITLES[layer]}", caption=_CAPTION)
    for title in ("framework", "variant"):
        made.add_column(title, no_wrap=True)
    for stage in STAGES:
        made.add_column(stage, justify="right", no_wrap=True)
    for framework in FRAMEWORKS:
        for variant in variants(framework):
            made.add_row(framework, variant, *(shown(found[framework][stage], variant, "plain") for stage in STAGES))
        made.add_section()
    return made


def _lowered(case: Case) -> tuple[float, float, Any]:
    arguments = case.arguments
    jax.clear_caches()  # else JAX gives the last round's result
    gc.collect()
    trace, traced = seconds(lambda: jax.jit(case.gradient).trace(*arguments), own_thread)
    lower, lowered = seconds(traced.lower, own_thread)
    return trace, lower, lowered


def _step(program: Any, arguments: tuple[Any, ...]) -> float:
    return seconds(lambda: jax.block_until_ready(program(*arguments)), wall)[0]


def _call(case: Case) -> float:
    arguments = case.arguments
    return seconds(lambda: jax.block_until_ready(case.apply(*arguments)[0]), wall)[0]


def _grad(case: Case) -> float:
    arguments = case.arguments
    gradient = case.gradient
    return seconds(lambda: jax.block_until_ready(gradient(*arguments)[0]), wall)[0]
