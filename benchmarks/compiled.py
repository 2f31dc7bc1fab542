"""What the compiled program costs: exact numbers of XLA, so no timing and no tolerance."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from rich.table import Table

from benchmarks.cases import FRAMEWORKS, OURS, Case, Layer, Variant, activate, build, score, variants

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


PROGRAMS = {program.__name__: program for program in (grad, value_and_grad, scan, forward)}
MARKED = ("grad", "value_and_grad", "scan")
_COLUMNS = [
    ("grad", "arguments"),
    *((program, measure) for program in MARKED for measure in ("flops", "accessed", "temporary")),
    ("forward", "outputs"),
]
_SHORT = {"flops": "flops", "accessed": "bytes", "temporary": "temp", "arguments": "args", "outputs": "out"}
_TITLES = {"dense": "Dense", "block": "Dense, BatchNorm, Dropout: parameters, state and a key"}
_CAPTION = (
    "By hand: numbers of XLA, in thousands (k) and millions (M). Other rows: ratios to them; 1.00 is exact equality.\n"
    "bytes: accessed. temp, args, out: bytes of memory for temporaries, arguments, outputs.\n"
    f"scan: the gradient through a scan over {SCANNED} layers. forward: the forward pass as a program of its own,\n"
    "which gives out what the backward pass needs; not part of the mark."
)


@functools.cache
def cost(framework: str, layer: Layer, variant: Variant, program: str) -> Cost:
    """Compiles one program of one variant."""
    function, arguments = PROGRAMS[program](build(framework, layer, variant))
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


def table(layer: Layer) -> tuple[Table, bool]:
    """Compares all variants with the rule written by hand.

    Returns:
        The table, and whether ours cost what the rule by hand does, exactly.
    """
    made = Table(title=f"Compiled: {_TITLES[layer]}", caption=_CAPTION)
    made.add_column("framework", no_wrap=True)
    made.add_column("variant", no_wrap=True)
    for program, measure in _COLUMNS:
        made.add_column(
            f"{program}\n{_SHORT[measure]}".replace("value_and_grad", "v_and_g"), justify="right", no_wrap=True
        )
    made.add_column("as by\nhand", no_wrap=True)
    passed = True
    for framework in FRAMEWORKS:
        for variant in variants(framework):
            equal = all(
                cost(framework, layer, variant, program) == cost(framework, layer, "by hand", program)
                for program in MARKED
            )
            mark = ("[green]PASS" if equal else "[bold red]FALLS SHORT") if variant in OURS else ""
            made.add_row(framework, variant, *_cells(framework, layer, variant), mark)
            passed = passed and (equal or variant not in OURS)
        made.add_section()
    return made, passed


def _cells(framework: str, layer: Layer, variant: Variant) -> list[str]:
    cells = []
    for program, measure in _COLUMNS:
        value, by_hand = (getattr(cost(framework, layer, each, program), measure) for each in (variant, "by hand"))
        if variant == "by hand":
            cells.append(f"{value / 1e6:.2f}M" if value >= 1e6 else f"{value / 1e3:.1f}k")
        else:
            cells.append("1.00" if value == by_hand else f"{value / by_hand:.4f}" if by_hand else f"+{value:.0f}")
    return cells
