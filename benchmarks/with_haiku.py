"""Haiku: by hand the rule stands around each layer's own transform. Haiku has no custom_vjp."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import haiku as hk
import jax

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
    some_input,
    stack,
)


class Block(hk.Module):
    """Linear, BatchNorm and dropout."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the three."""
        return hk.dropout(hk.next_rng_key(), DROPOUT, _batch_norm(hk.Linear(WIDTH)(x)))


class Transformer(hk.Module):
    """Self-attention and a network of two layers, each after LayerNorm, with dropout, and skipped."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies both."""
        y = _layer_norm(x)
        initial = hk.initializers.VarianceScaling()
        y = hk.MultiHeadAttention(HEADS, FEATURES // HEADS, w_init=initial, model_size=FEATURES)(y, y, y)
        x = x + hk.dropout(hk.next_rng_key(), DROPOUT, y)
        y = hk.Linear(FEATURES)(jax.nn.gelu(hk.Linear(4 * FEATURES)(_layer_norm(x))))
        return x + hk.dropout(hk.next_rng_key(), DROPOUT, y)


class Residual(hk.Module):
    """Two convolutions with BatchNorm, skipped."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies both."""
        y = _batch_norm(hk.Conv2D(CHANNELS, 3)(x))
        y = _batch_norm(hk.Conv2D(CHANNELS, 3)(jax.nn.relu(y)))
        return jax.nn.relu(x + y)


def _batch_norm(x: jax.Array) -> jax.Array:
    return hk.BatchNorm(create_scale=True, create_offset=True, decay_rate=MOMENTUM)(x, is_training=True)


def _layer_norm(x: jax.Array) -> jax.Array:
    return hk.LayerNorm(-1, create_scale=True, create_offset=True)(x)


def _linear() -> hk.Module:
    return hk.Linear(WIDTH)


LAYERS: dict[Layer, Callable[[], Any]] = {
    "dense": _linear,
    "block": Block,
    "transformer": Transformer,
    "residual": Residual,
}


def case(layer: Layer, variant: Variant, depth: int) -> Case:
    """Builds the model of `depth` layers under one variant of the rule."""
    make = LAYERS[layer]
    if variant == "by hand":
        transformed = hk.transform_with_state(lambda x: make()(x))
        params, rest = _init(layer, transformed)
        return stack(layer, [by_hand(_apply(transformed))] * depth, [params] * depth, [rest] * depth)
    call = lifted(_call, variant)

    def forward(x: jax.Array) -> jax.Array:
        for index in range(depth):
            y = call(make(), x)
            x = activate(layer, y) if index + 1 < depth else y
        return x

    transformed = hk.transform_with_state(forward)
    return Case(layer, _apply(transformed), *_init(layer, transformed))


def _init(layer: Layer, transformed: hk.TransformedWithState) -> tuple[Any, Any]:
    params, state = transformed.init(jax.random.key(0), some_input(layer))
    key = jax.random.key(1) if layer in ("block", "transformer") else None
    return params, None if layer == "dense" else (state, key)


def _apply(transformed: hk.TransformedWithState) -> Apply:
    def apply(params: Any, rest: Any, x: Any) -> tuple[Any, Any]:
        state, key = ({}, None) if rest is None else rest
        return transformed.apply(params, state, key, x)

    return apply


def _call(mdl: Any, x: jax.Array) -> jax.Array:
    return mdl(x)
