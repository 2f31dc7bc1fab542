"""Flax Linen: by hand the rule stands around each layer's `apply`, else inside a compact method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn

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
    some_input,
)


class Block(nn.Module):
    """Dense, BatchNorm and Dropout."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the three."""
        y = nn.BatchNorm(use_running_average=False, momentum=MOMENTUM)(nn.Dense(WIDTH)(x))
        return nn.Dropout(DROPOUT, deterministic=False)(y)


class Stack(nn.Module):
    """Layers, each called through `call`."""

    layer: Callable[..., nn.Module]
    call: Callable[[nn.Module, jax.Array], jax.Array]
    depth: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies all layers."""
        for index in range(self.depth):
            y = self.call(self.layer(), x)
            x = activate(y) if index + 1 < self.depth else y
        return x


def case(layer: Layer, variant: Variant, depth: int) -> Case:
    """Builds the model of `depth` layers under one variant of the rule."""
    make = Block if layer == "block" else _dense
    if variant != "by hand":
        stack = Stack(make, _lifted(variant), depth)
        return Case(_apply(stack), *_init(Stack(make, _call, depth)))
    call = by_hand(_apply(make()))
    params, rests = zip(*(_init(make()) for _ in range(depth)), strict=True)
    return Case(lambda params, rests, x: chain([call] * depth, params, rests, x), params, rests)


def _init(module: nn.Module) -> tuple[Any, Any]:
    variables = module.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, some_input())
    stats = variables.get("batch_stats")
    return variables["params"], None if stats is None else (stats, jax.random.key(1))


def _apply(module: nn.Module) -> Apply:
    def apply(params: Any, rest: Any, x: Any) -> tuple[Any, Any]:
        if rest is None:
            return module.apply({"params": params}, x), None
        stats, key = rest
        y, updates = module.apply(
            {"params": params, "batch_stats": stats}, x, rngs={"dropout": key}, mutable=["batch_stats"]
        )
        return y, updates["batch_stats"]

    return apply


def _dense() -> nn.Module:
    return nn.Dense(WIDTH)


def _call(mdl: Any, x: jax.Array) -> jax.Array:
    return mdl(x)


def _lifted(variant: Variant) -> Callable[..., Any]:
    return nn.custom_vjp(_call, _forward, _backward) if variant == "own" else lifted(_call, variant)


def _forward(mdl: Any, x: jax.Array) -> Any:
    return nn.vjp(_call, mdl, x)


def _backward(pullback: Any, y_bar: Any) -> Any:
    variables_bar, x_bar = pullback(y_bar)  # Flax's order since v0.6.1
    return sign(variables_bar), x_bar
