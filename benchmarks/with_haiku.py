"""Haiku: by hand the rule stands around each layer's own transform. Haiku has no custom_vjp."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import haiku as hk
import jax

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
    some_input,
)


class Block(hk.Module):
    """Linear, BatchNorm and dropout."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the three."""
        norm = hk.BatchNorm(create_scale=True, create_offset=True, decay_rate=MOMENTUM)
        y = norm(hk.Linear(WIDTH)(x), is_training=True)
        return hk.dropout(hk.next_rng_key(), DROPOUT, y)


def case(layer: Layer, variant: Variant, depth: int) -> Case:
    """Builds the model of `depth` layers under one variant of the rule."""
    make: Callable[..., Any] = Block if layer == "block" else _linear
    if variant == "by hand":
        transformed = hk.transform_with_state(lambda x: make()(x))
        call = by_hand(_apply(transformed))
        params, rests = zip(*(_init(transformed) for _ in range(depth)), strict=True)
        return Case(lambda params, rests, x: chain([call] * depth, params, rests, x), params, rests)
    call = lifted(_call, variant)

    def forward(x: jax.Array) -> jax.Array:
        for index in range(depth):
            y = call(make(), x)
            x = activate(y) if index + 1 < depth else y
        return x

    transformed = hk.transform_with_state(forward)
    return Case(_apply(transformed), *_init(transformed))


def _init(transformed: hk.TransformedWithState) -> tuple[Any, Any]:
    params, state = transformed.init(jax.random.key(0), some_input())
    return params, (state, jax.random.key(1)) if state else None


def _apply(transformed: hk.TransformedWithState) -> Apply:
    def apply(params: Any, rest: Any, x: Any) -> tuple[Any, Any]:
        state, key = ({}, None) if rest is None else rest
        return transformed.apply(params, state, key, x)

    return apply


def _linear() -> hk.Module:
    return hk.Linear(WIDTH)


def _call(mdl: Any, x: jax.Array) -> jax.Array:
    return mdl(x)
