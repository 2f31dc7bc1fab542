"""Which collectives the compiled gradient has when its arrays are cut over eight devices."""

from __future__ import annotations

import collections
import functools
import re
from typing import Any, Literal, TypeAlias, get_args

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.table import Table

from benchmarks.cases import FRAMEWORKS, OURS, Layer, Variant, build, variants

Placement: TypeAlias = Literal["data", "tensor"]
"""The batch is cut, and the parameters are everywhere; or the parameters are, along their last axis."""

PLACEMENTS: tuple[Placement, ...] = get_args(Placement)
LAYERS: tuple[Layer, ...] = ("dense", "block")  # whose axes eight devices can cut
COLUMNS = [(layer, placement) for layer in LAYERS for placement in PLACEMENTS]
DEVICES = 8
KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
_STARTED = re.compile(rf" ({'|'.join(KINDS)})(?:-start)?\(")
_CAPTION = f"Collectives in the compiled gradient, on {DEVICES} devices."


def count(program: str) -> dict[str, int]:
    """Counts the collectives of a compiled program, given as XLA writes it, by their kind."""
    return dict(sorted(collections.Counter(_STARTED.findall(program)).items()))


@functools.cache
def collectives(framework: str, layer: Layer, variant: Variant, placement: Placement) -> dict[str, int]:
    """Compiles the gradient of one variant for sharded arguments, and counts its collectives.

    Raises:
        RuntimeError: there are fewer than eight devices; `jax_num_cpu_devices` makes them.
    """
    devices = jax.devices()
    if len(devices) < DEVICES:
        raise RuntimeError(
            f"Collectives are counted on {DEVICES} devices, but there are {len(devices)}. Say "
            f'jax.config.update("jax_num_cpu_devices", {DEVICES}) before the first array is made.'
        )
    mesh = jax.make_mesh((DEVICES,), ("devices",), axis_types=(AxisType.Auto,), devices=devices[:DEVICES])
    case = build(framework, layer, variant)
    params, rest, x = case.arguments
    placed = (
        jax.tree.map(lambda leaf: _placed(leaf, mesh, P(*[None] * (leaf.ndim - 1), "devices")), params)
        if placement == "tensor"
        else jax.tree.map(lambda leaf: _placed(leaf, mesh, P()), params)
    )
    x = _placed(x, mesh, P("devices") if placement == "data" else P())
    rest = jax.tree.map(lambda leaf: _placed(leaf, mesh, P()), rest)
    grad = jax.jit(jax.value_and_grad(case.loss, has_aux=True))
    program = grad.lower(placed, rest, x).compile().as_text()
    if program is None:
        raise RuntimeError(f"XLA does not show its programs on {jax.default_backend()}.")
    return count(program)


def _placed(leaf: Any, mesh: Mesh, spec: P) -> Any:
    return jax.device_put(leaf, NamedSharding(mesh, spec))


def differing(framework: str) -> int:
    """Counts the programs of ours whose collectives are not those of the rule by hand, kind by kind."""
    return sum(
        collectives(framework, layer, variant, placement) != collectives(framework, layer, "by hand", placement)
        for layer, placement in COLUMNS
        for variant in OURS
    )


def table() -> Table:
    """Compares all variants with the rule written by hand."""
    made = Table("framework", "variant", title="Collectives", caption=_CAPTION)
    for layer, placement in COLUMNS:
        made.add_column(f"{layer}\n{placement}", no_wrap=True)
    for framework in FRAMEWORKS:
        for variant in variants(framework):
            found = [collectives(framework, layer, variant, placement) for layer, placement in COLUMNS]
            made.add_row(framework, variant, *map(_shown, found))
        made.add_section()
    return made


def _shown(found: dict[str, int]) -> str:
    return ", ".join(f"{number} {kind}" for kind, number in found.items()) or "none"
