"""Flax NNX: the model is split outside of the loss and merged inside; by hand, each layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from benchmarks.cases import (
    CHANNELS,
    DROPOUT,
    FEATURES,
    HEADS,
    MOMENTUM,
    WIDTH,
    Apply,
    Case,
    Layer,
    Variant,
    activate,
    by_hand,
    lifted,
    sign,
    stack,
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


class Transformer(nnx.Module):
    """Self-attention and a network of two layers, each after LayerNorm, with Dropout, and skipped."""

    def __init__(self, rngs: nnx.Rngs):
        self.norm1, self.norm2 = (nnx.LayerNorm(FEATURES, rngs=rngs) for _ in range(2))
        self.attention = nnx.MultiHeadAttention(HEADS, FEATURES, decode=False, rngs=rngs)
        self.wide = nnx.Linear(FEATURES, 4 * FEATURES, rngs=rngs)
        self.narrow = nnx.Linear(4 * FEATURES, FEATURES, rngs=rngs)
        self.dropout = nnx.Dropout(DROPOUT, deterministic=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies both."""
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.dropout(self.narrow(nnx.gelu(self.wide(self.norm2(x)))))


class Residual(nnx.Module):
    """Two convolutions with BatchNorm, skipped."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv1, self.conv2 = (nnx.Conv(CHANNELS, CHANNELS, (3, 3), rngs=rngs) for _ in range(2))
        self.norm1, self.norm2 = (
            nnx.BatchNorm(CHANNELS, momentum=MOMENTUM, use_running_average=False, rngs=rngs) for _ in range(2)
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies both."""
        y = self.norm1(self.conv1(x))
        y = self.norm2(self.conv2(nnx.relu(y)))
        return nnx.relu(x + y)


def _linear(rngs: nnx.Rngs) -> nnx.Module:
    return nnx.Linear(WIDTH, WIDTH, rngs=rngs)


LAYERS: dict[Layer, Callable[[nnx.Rngs], nnx.Module]] = {
    "dense": _linear,
    "block": Block,
    "transformer": Transformer,
    "residual": Residual,
}


def case(layer: Layer, variant: Variant, depth: int) -> Case:
    """Builds the model of `depth` layers under one variant of the rule."""
    rngs = nnx.Rngs(0)
    layers = [LAYERS[layer](rngs) for _ in range(depth)]
    if variant == "by hand":
        graphdefs, params, rests = zip(*(nnx.split(mdl, nnx.Param, ...) for mdl in layers), strict=True)
        return stack(layer, [by_hand(_apply(graphdef, _call)) for graphdef in graphdefs], params, rests)
    call = _own() if variant == "own" else lifted(_call, variant)

    def run(mdl: Any, x: jax.Array) -> jax.Array:
        for index, own in enumerate(mdl):
            y = call(own, x)
            x = activate(layer, y) if index + 1 < depth else y
        return x

    graphdef, params, rest = nnx.split(nnx.List(layers), nnx.Param, ...)
    return Case(layer, _apply(graphdef, run), params, rest)


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
