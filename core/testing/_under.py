"""A rule means the same under every transform."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .._arrays import is_inexact
from ._claims import Claims
from ._linearized import Linearized, Use, close
from ._report import Check
from ._subject import Subject


def _under(
    name: str,
    run: Callable[[Callable[[Any], Any], Any], Any] = lambda bars, inputs: bars(inputs),
    around: Callable[[Any], Any] = lambda run: run,
) -> Check:
    """Compares a gradient under a transform of it, or of the call, with that of the plain call."""

    def check(subject: Subject, use: Use, claims: Claims) -> None:
        own = Linearized(subject, use)
        y_bar = own.y_bar(0)
        found = run(lambda inputs: Linearized(subject, use, inputs, around)(y_bar), subject.inputs)
        close(found, own(y_bar), f"the rule gives another gradient under {name}")

    return Check(f"the same under {name}", check)


def _over_lanes(name: str, run: Callable[[Callable[[Any], Any], Any], list[Any]]) -> Check:
    """Compares gradients of several inputs at once with those of each alone."""

    def check(subject: Subject, use: Use, claims: Claims) -> None:
        lanes = [subject.inputs, jax.tree.map(lambda x: -x if is_inexact(x) else x, subject.inputs)]
        y_bar = Linearized(subject, use).y_bar(0)
        expected = [Linearized(subject, use, inputs)(y_bar) for inputs in lanes]
        found = run(lambda inputs: Linearized(subject, use, inputs)(y_bar), lanes)
        close(found, expected, f"the rule gives another gradient under {name}")

    return Check(f"the same under {name}", check)


def _vmapped(bars: Callable[[Any], Any], lanes: list[Any]) -> list[Any]:
    stacked = jax.vmap(bars)(jax.tree.map(lambda *leaves: jnp.stack(leaves), *lanes))
    return [jax.tree.map(lambda leaf, lane=lane: leaf[lane], stacked) for lane in range(len(lanes))]


def _scanned(bars: Callable[[Any], Any], lanes: list[Any]) -> list[Any]:
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *lanes)
    _, found = jax.lax.scan(lambda carry, inputs: (carry, bars(inputs)), 0, stacked)
    return [jax.tree.map(lambda leaf, lane=lane: leaf[lane], found) for lane in range(len(lanes))]


UNDER_CHECKS: Sequence[Check] = (
    _under("jit(grad)", lambda bars, inputs: jax.jit(bars)(inputs)),
    _under("grad(jit)", around=jax.jit),
    _under("remat", around=jax.checkpoint),
    _over_lanes("scan", _scanned),
    _over_lanes("vmap", _vmapped),
)
