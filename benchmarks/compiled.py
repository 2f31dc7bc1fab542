"""What the compiled program costs: exact numbers of XLA, so no timing and no tolerance."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from rich.table import Table

from benchmarks.cases import FRAMEWORKS, OURS, VARIANTS, Case, Layer, Variant, activate, build, score

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
    return jax.grad(case.loss, has_aux=True), case.arguments


def value_and_grad(case: Case) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The loss and its gradient."""
    return jax.value_and_grad(case.loss, has_aux=True), case.arguments


def scan(case: Case) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The gradient through a scan over layers, where everything that a rule keeps is stacked in memory."""
    params, rest, x = case.arguments

    def loss(params: Any, rest: Any, x: Any) -> Any:
        def body(x: Any, own: Any) -> Any:
            y, new_rest = case.apply(own, rest, x)
            return activate(y), new_rest

        y, new_rests = jax.lax.scan(body, x, params)
        return score(y), new_rests

    return jax.grad(loss, has_aux=True), (jax.tree.map(lambda leaf: jnp.stack([leaf] * SCANNED), params), rest, x)


def forward(case: Case) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The forward pass as a program of its own, whose outputs are the loss and the residuals."""

    def run(params: Any, rest: Any, x: Any) -> Any:
        return jax.vjp(lambda params: case.loss(params, rest, x), params, has_aux=True)

    return run, case.arguments


PROGRAMS = {program.__name__: program for program in (grad, value_and_grad, scan)}


@functools.cache
def cost(framework: str, layer: Layer, variant: Variant, program: str) -> Cost | None:
    """Compiles one program of one variant; `None` where the framework has no transform of its own."""
    case = build(framework, layer, variant)
    if case is None:
        return None
    function, arguments = (PROGRAMS | {"forward": forward})[program](case)
    compiled = jax.jit(function).lower(*arguments).compile()
    analysis, memory = compiled.cost_analysis(), compiled.memory_analysis()
    return Cost(
        analysis["flops"],
        analysis["bytes accessed"],
        memory.temp_size_in_bytes,
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
    )


def table(layer: Layer) -> tuple[Table, bool]:
    """Compares all variants with the rule written by hand.

    Returns:
        The table, and whether ours cost what the rule by hand does, exactly.
    """
    made = Table(title=f"Compiled: {_TITLES[layer]}", caption=_CAPTION)
    made.add_column("framework")
    made.add_column("variant")
    for program in PROGRAMS:
        for measure in ("flops", "bytes", "temp", "args"):
            made.add_column(f"{program.replace('value_and_grad', 'v_and_g')}\n{measure}", justify="right")
    made.add_column("forward\nkept", justify="right")
    made.add_column("ours = by hand")
    passed = True
    for framework in FRAMEWORKS:
        for variant in VARIANTS:
            costs = [cost(framework, layer, variant, program) for program in PROGRAMS]
            hands = [cost(framework, layer, "by hand", program) for program in PROGRAMS]
            kept, kept_by_hand = (cost(framework, layer, each, "forward") for each in (variant, "by hand"))
            if not all(costs) or kept is None or kept_by_hand is None:
                continue
            cells = [
                _cell(variant, of, by_hand)
                for one, hand in zip(costs, hands, strict=True)
                for of, by_hand in list(zip(_values(one), _values(hand), strict=True))[:4]
            ]
            equal = costs == hands
            passed = passed and (equal or variant not in OURS)
            mark = ("[green]PASS" if equal else "[bold red]FALLS SHORT") if variant in OURS else ""
            made.add_row(framework, variant, *cells, _cell(variant, kept.outputs, kept_by_hand.outputs), mark)
        made.add_section()
    return made, passed


_TITLES = {"dense": "Dense", "block": "Dense, BatchNorm, Dropout (state and a key)"}
_CAPTION = (
    f"By hand: numbers of XLA; else: ratios to them. scan: over {SCANNED} layers. kept: bytes between the passes if they "
    "are two programs; not part of the mark."
)


def _values(of: Any) -> tuple[Any, ...]:
    return dataclasses.astuple(of)


def _cell(variant: Variant, value: float, by_hand: float) -> str:
    if variant == "by hand":
        return f"{value / 1e6:.2f}M" if value >= 1e6 else f"{value / 1e3:.1f}k"
    if value == by_hand:
        return "1.00"
    return f"{value / by_hand:.3f}" if by_hand else f"+{value:.0f}"
