"""What the compiled program costs: exact numbers of XLA, so no timing and no tolerance."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from rich.table import Table

from benchmarks.cases import FRAMEWORKS, OURS, TITLES, Case, Layer, Variant, activate, build, score, variants

SCANNED = 4


@dataclasses.dataclass(frozen=True)
class Cost:
    """What XLA says of a compiled program."""

    flops: float
    accessed: float
    temporary: int
    arguments: int
    outputs: int


def grad(case: Case) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The gradient of the loss with respect to the parameters."""
    return case.gradient, case.arguments


def value_and_grad(case: Case) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The loss and its gradient."""
    return jax.value_and_grad(case.loss, has_aux=True), case.arguments


def scan(case: Case) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The gradient through a scan over layers, where everything that a rule keeps is stacked in memory."""
    params, rest, x = case.arguments

    def loss(params: Any, rest: Any, x: Any) -> Any:
        def body(x: Any, own: Any) -> Any:
            y, new_rest = case.apply(own, rest, x)
            return activate(case.layer, y), new_rest

        y, new_rests = jax.lax.scan(body, x, params)
        return score(y), new_rests

    return jax.grad(loss, has_aux=True), (jax.tree.map(lambda leaf: jnp.stack([leaf] * SCANNED), params), rest, x)


def forward(case: Case) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The forward pass as a program of its own, whose outputs are the loss and the residuals."""

    def run(params: Any, rest: Any, x: Any) -> Any:
        return jax.vjp(lambda params: case.loss(params, rest, x), params, has_aux=True)

    return run, case.arguments


PROGRAMS = {program.__name__: program for program in (grad, value_and_grad, scan, forward)}
MARKED: dict[Layer, tuple[str, ...]] = {  # of a transformer, a program takes seconds to compile
    "dense": ("grad", "value_and_grad", "scan"),
    "block": ("grad", "value_and_grad", "scan"),
    "transformer": ("grad", "value_and_grad"),
    "residual": ("grad", "value_and_grad"),
}
WITH_FORWARD: tuple[Layer, ...] = ("dense", "block")
_SHORT = {"flops": "flops", "accessed": "bytes", "temporary": "temp", "arguments": "args", "outputs": "out"}
_CAPTION = (
    "By hand: numbers of XLA, in thousands (k) and millions (M). Other rows: ratios to them; 1.00 is exact equality.\n"
    "bytes: accessed. temp, args, out: bytes of memory for temporaries, arguments, outputs.\n"
    f"scan: the gradient through a scan over {SCANNED} layers. forward: the forward pass as a program of its own,\n"
    "which gives out what the backward pass needs; not part of the mark."
)


@functools.cache
def cost(framework: str, layer: Layer, variant: Variant, program: str, depth: int = 1) -> Cost:
    """Compiles one program of one variant."""
    return cost_of(*PROGRAMS[program](build(framework, layer, variant, depth)))


def cost_of(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Cost:
    """Compiles a function of some arguments."""
    compiled = jax.jit(function).lower(*arguments).compile()
    analysis, memory = compiled.cost_analysis(), compiled.memory_analysis()
    if analysis is None or memory is None:
        raise RuntimeError(f"XLA does not say what a program costs on {jax.default_backend()}.")
    return Cost(
        analysis["flops"],
        analysis["bytes accessed"],
        memory.temp_size_in_bytes,
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
    )


def farthest(framework: str, layer: Layer) -> float:
    """Gives the ratio to the rule by hand that is farthest from 1, of all that is measured of the marked programs."""
    ratios = [
        _ratio(getattr(ours, field.name), getattr(by_hand, field.name))
        for program in MARKED[layer]
        for by_hand in [cost(framework, layer, "by hand", program)]
        for ours in [cost(framework, layer, variant, program) for variant in OURS]
        for field in dataclasses.fields(Cost)
    ]
    return max(ratios, key=lambda ratio: abs(ratio - 1))


def table(layer: Layer) -> Table:
    """Compares all variants with the rule written by hand."""
    made = Table(title=f"Compiled: {TITLES[layer]}", caption=_CAPTION)
    made.add_column("framework", no_wrap=True)
    made.add_column("variant", no_wrap=True)
    columns = _columns(layer)
    for program, measure in columns:
        made.add_column(
            f"{program}\n{_SHORT[measure]}".replace("value_and_grad", "v_and_g"), justify="right", no_wrap=True
        )
    for framework in FRAMEWORKS:
        for variant in variants(framework):
            cells = [_cell(framework, layer, variant, program, measure) for program, measure in columns]
            made.add_row(framework, variant, *cells)
        made.add_section()
    return made


def _columns(layer: Layer) -> list[tuple[str, str]]:
    marked = [(program, measure) for program in MARKED[layer] for measure in ("flops", "accessed", "temporary")]
    return [("grad", "arguments"), *marked, *([("forward", "outputs")] if layer in WITH_FORWARD else [])]


def _cell(framework: str, layer: Layer, variant: Variant, program: str, measure: str) -> str:
    value, by_hand = (getattr(cost(framework, layer, each, program), measure) for each in (variant, "by hand"))
    if variant == "by hand":
        return f"{value / 1e6:.2f}M" if value >= 1e6 else f"{value / 1e3:.1f}k"
    ratio = _ratio(value, by_hand)
    return "1.00" if ratio == 1 else f"{ratio:.4f}" if ratio < float("inf") else f"+{value:.0f}"


def _ratio(value: float, by_hand: float) -> float:
    return 1.0 if value == by_hand else value / by_hand if by_hand else float("inf")
