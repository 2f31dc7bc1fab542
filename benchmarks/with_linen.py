"""Flax Linen: by hand the rule stands around each layer's `apply`, else inside a compact method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn

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
    some_input,
    stack,
)


class Block(nn.Module):
    """Dense, BatchNorm and Dropout."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the three."""
        y = nn.BatchNorm(use_running_average=False, momentum=MOMENTUM)(nn.Dense(WIDTH)(x))
        return nn.Dropout(DROPOUT, deterministic=False)(y)


class Transformer(nn.Module):
    """Self-attention and a network of two layers, each after LayerNorm, with Dropout, and skipped."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies both."""
        y = nn.MultiHeadDotProductAttention(HEADS)(nn.LayerNorm()(x))
        x = x + nn.Dropout(DROPOUT, deterministic=False)(y)
        y = nn.Dense(FEATURES)(nn.gelu(nn.Dense(4 * FEATURES)(nn.LayerNorm()(x))))
        return x + nn.Dropout(DROPOUT, deterministic=False)(y)


class Residual(nn.Module):
    """Two convolutions with BatchNorm, skipped."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies both."""
        y = nn.BatchNorm(use_running_average=False, momentum=MOMENTUM)(nn.Conv(CHANNELS, (3, 3))(x))
        y = nn.BatchNorm(use_running_average=False, momentum=MOMENTUM)(nn.Conv(CHANNELS, (3, 3))(nn.relu(y)))
        return nn.relu(x + y)


class Stack(nn.Module):
    """Layers, each called through `call`."""

    layer: Layer
    call: Callable[[nn.Module, jax.Array], jax.Array]
    depth: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies all layers."""
        for index in range(self.depth):
            y = self.call(LAYERS[self.layer](), x)
            x = activate(self.layer, y) if index + 1 < self.depth else y
        return x


def case(layer: Layer, variant: Variant, depth: int) -> Case:
    """Builds the model of `depth` layers under one variant of the rule."""
    if variant == "by hand":
        module = LAYERS[layer]()
        params, rest = _init(layer, module)
        return stack(layer, [by_hand(_apply(module))] * depth, [params] * depth, [rest] * depth)
    return Case(layer, _apply(Stack(layer, _lifted(variant), depth)), *_init(layer, Stack(layer, _call, depth)))


def _init(layer: Layer, module: nn.Module) -> tuple[Any, Any]:
    variables = module.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, some_input(layer))
    key = jax.random.key(1) if layer in ("block", "transformer") else None
    return variables["params"], None if layer == "dense" else (variables.get("batch_stats", {}), key)


def _apply(module: nn.Module) -> Apply:
    def apply(params: Any, rest: Any, x: Any) -> tuple[Any, Any]:
        if rest is None:
            return module.apply({"params": params}, x), None
        stats, key = rest
        rngs = {} if key is None else {"dropout": key}
        y, updates = module.apply({"params": params, "batch_stats": stats}, x, rngs=rngs, mutable=["batch_stats"])
        return y, updates.get("batch_stats", {})

    return apply


def _dense() -> nn.Module:
    return nn.Dense(WIDTH)


LAYERS: dict[Layer, Callable[[], nn.Module]] = {
    "dense": _dense,
    "block": Block,
    "transformer": Transformer,
    "residual": Residual,
}


def _call(mdl: Any, x: jax.Array) -> jax.Array:
    return mdl(x)


def _lifted(variant: Variant) -> Callable[..., Any]:
    return nn.custom_vjp(_call, _forward, _backward) if variant == "own" else lifted(_call, variant)


def _forward(mdl: Any, x: jax.Array) -> Any:
    return nn.vjp(_call, mdl, x)


def _backward(pullback: Any, y_bar: Any) -> Any:
    variables_bar, x_bar = pullback(y_bar)  # Flax's order since v0.6.1
    return sign(variables_bar), x_bar
