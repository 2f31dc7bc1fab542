"""Flax NNX: the model is split outside of the loss and merged inside; by hand, each layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from benchmarks.cases import (
    DROPOUT,
    MOMENTUM,
    WIDTH,
    Apply,
    Case,
    Layer,
    Variant,
    activate,
    by_hand,
    chain,
    lifted,
    sign,
)


class Block(nnx.Module):
    """Linear, BatchNorm and Dropout."""

    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.norm = nnx.BatchNorm(WIDTH, momentum=MOMENTUM, use_running_average=False, rngs=rngs)
        self.dropout = nnx.Dropout(DROPOUT, deterministic=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the three."""
        return self.dropout(self.norm(self.linear(x)))


def case(layer: Layer, variant: Variant, depth: int) -> Case:
    """Builds the model of `depth` layers under one variant of the rule."""
    rngs = nnx.Rngs(0)
    layers = [Block(rngs) if layer == "block" else nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(depth)]
    if variant == "by hand":
        graphdefs, params, rests = zip(*(nnx.split(mdl, nnx.Param, ...) for mdl in layers), strict=True)
        calls = [by_hand(_apply(graphdef, _call)) for graphdef in graphdefs]
        return Case(lambda params, rests, x: chain(calls, params, rests, x), params, rests)
    call = _own() if variant == "own" else lifted(_call, variant)

    def run(mdl: Any, x: jax.Array) -> jax.Array:
        for index, own in enumerate(mdl):
            y = call(own, x)
            x = activate(y) if index + 1 < depth else y
        return x

    graphdef, params, rest = nnx.split(nnx.List(layers), nnx.Param, ...)
    return Case(_apply(graphdef, run), params, rest)


def _apply(graphdef: Any, run: Callable[..., Any]) -> Apply:
    def apply(params: Any, rest: Any, x: Any) -> tuple[Any, Any]:
        mdl = nnx.merge(graphdef, params, rest, copy=True)
        return run(mdl, x), nnx.state(mdl, nnx.Not(nnx.Param))

    return apply


def _call(mdl: Any, x: jax.Array) -> jax.Array:
    return mdl(x)


def _own() -> Callable[..., Any]:
    """`nnx.custom_vjp`, whose forward function has to make its pullback from the split module."""
    call = nnx.custom_vjp(_call, nondiff_argnums=(nnx.DiffState(0, nnx.Param),), graph_updates=True)

    def forward(mdl: Any, x: jax.Array) -> Any:
        graphdef, params, rest = nnx.split(mdl, nnx.Param, ...)
        apply = _apply(graphdef, _call)
        y, pullback, new_rest = jax.vjp(lambda params, x: apply(params, rest, x), params, x, has_aux=True)
        nnx.update(mdl, new_rest)
        return y, pullback

    def backward(pullback: Any, bars: Any) -> Any:
        _, y_bar = bars
        params_bar, x_bar = pullback(y_bar)
        return sign(params_bar), x_bar

    call.defvjp(forward, backward)
    return call
