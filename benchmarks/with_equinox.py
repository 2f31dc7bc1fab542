"""Equinox: modules are partitioned outside of the loss and combined inside; state is an argument and a result."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax

from benchmarks.cases import (
    BATCH,
    CHANNELS,
    DROPOUT,
    FEATURES,
    HEADS,
    MOMENTUM,
    SMALL_BATCH,
    WIDTH,
    Case,
    Layer,
    Variant,
    by_hand,
    lifted,
    sign,
    stack,
)


class Dense(eqx.Module):
    """A linear layer over a batch."""

    linear: eqx.nn.Linear

    def __init__(self, key: jax.Array):
        self.linear = eqx.nn.Linear(WIDTH, WIDTH, key=key)

    def __call__(self, rest: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        """Applies it to every row."""
        return jax.vmap(self.linear)(x), rest


class Block(eqx.Module):
    """Linear, BatchNorm and Dropout over a batch."""

    linear: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    dropout: eqx.nn.Dropout

    def __init__(self, key: jax.Array):
        self.linear = eqx.nn.Linear(WIDTH, WIDTH, key=key)
        self.norm = eqx.nn.BatchNorm(WIDTH, "batch", mode="batch", momentum=MOMENTUM)
        self.dropout = eqx.nn.Dropout(DROPOUT)

    def __call__(self, rest: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        """Applies the three; the statistics are those of the batch."""
        state, key = rest

        def one(row: jax.Array, state: Any, key: jax.Array) -> tuple[jax.Array, Any]:
            y, state = self.norm(self.linear(row), state)
            return self.dropout(y, key=key), state

        batched = jax.vmap(one, axis_name="batch", in_axes=(0, None, 0), out_axes=(0, None))
        return batched(x, state, jax.random.split(key, BATCH))


class Transformer(eqx.Module):
    """Self-attention and a network of two layers, each after LayerNorm, with Dropout, and skipped, over a batch."""

    norm1: eqx.nn.LayerNorm
    norm2: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    wide: eqx.nn.Linear
    narrow: eqx.nn.Linear
    dropout: eqx.nn.Dropout

    def __init__(self, key: jax.Array):
        keys = jax.random.split(key, 3)
        self.norm1, self.norm2 = eqx.nn.LayerNorm(FEATURES), eqx.nn.LayerNorm(FEATURES)
        self.attention = eqx.nn.MultiheadAttention(HEADS, FEATURES, key=keys[0])
        self.wide = eqx.nn.Linear(FEATURES, 4 * FEATURES, key=keys[1])
        self.narrow = eqx.nn.Linear(4 * FEATURES, FEATURES, key=keys[2])
        self.dropout = eqx.nn.Dropout(DROPOUT)

    def __call__(self, rest: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        """Applies both to every sequence."""
        return jax.vmap(self._one)(x, jax.random.split(rest, SMALL_BATCH)), rest

    def _one(self, x: jax.Array, key: jax.Array) -> jax.Array:
        keys = jax.random.split(key)
        y = jax.vmap(self.norm1)(x)
        x = x + self.dropout(self.attention(y, y, y), key=keys[0])
        y = jax.nn.gelu(jax.vmap(self.wide)(jax.vmap(self.norm2)(x)))
        return x + self.dropout(jax.vmap(self.narrow)(y), key=keys[1])


class Residual(eqx.Module):
    """Two convolutions with BatchNorm, skipped, over a batch, whose channels stand before rows and columns."""

    conv1: eqx.nn.Conv2d
    conv2: eqx.nn.Conv2d
    norm1: eqx.nn.BatchNorm
    norm2: eqx.nn.BatchNorm

    def __init__(self, key: jax.Array):
        self.conv1, self.conv2 = (
            eqx.nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, key=each) for each in jax.random.split(key)
        )
        self.norm1, self.norm2 = (
            eqx.nn.BatchNorm(CHANNELS, "batch", mode="batch", momentum=MOMENTUM) for _ in range(2)
        )

    def __call__(self, rest: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        """Applies both; the statistics are those of the batch."""
        return jax.vmap(self._one, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, rest)

    def _one(self, x: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        y, state = self.norm1(self.conv1(x), state)
        y, state = self.norm2(self.conv2(jax.nn.relu(y)), state)
        return jax.nn.relu(x + y), state


LAYERS: dict[Layer, Callable[..., eqx.Module]] = {
    "dense": Dense,
    "block": Block,
    "transformer": Transformer,
    "residual": Residual,
}


def case(layer: Layer, variant: Variant, depth: int) -> Case:
    """Builds the model of `depth` layers under one variant of the rule."""
    keys = jax.random.split(jax.random.key(0), depth)
    made = [eqx.nn.make_with_state(LAYERS[layer])(key) for key in keys]
    params, statics = zip(*(eqx.partition(mdl, eqx.is_inexact_array) for mdl, _ in made), strict=True)
    rests = [_rest(layer, state) for _, state in made]
    if variant == "by hand":
        calls = [by_hand(functools.partial(_combined, static)) for static in statics]
    else:
        call = _own if variant == "own" else lifted(_call, variant)
        calls = [functools.partial(_recombined, call, static) for static in statics]
    return stack(layer, calls, params, rests)


def _rest(layer: Layer, state: Any) -> Any:
    rests = {"block": (state, jax.random.key(1)), "transformer": jax.random.key(1), "residual": state}
    return rests.get(layer)


def _combined(static: Any, own: Any, rest: Any, x: jax.Array) -> tuple[jax.Array, Any]:
    return eqx.combine(own, static)(rest, x)


def _recombined(call: Callable[..., Any], static: Any, own: Any, rest: Any, x: jax.Array) -> tuple[jax.Array, Any]:
    return call(eqx.combine(own, static), rest, x)


def _call(mdl: Any, rest: Any, x: jax.Array) -> tuple[jax.Array, Any]:
    return mdl(rest, x)


def _own(mdl: Any, rest: Any, x: jax.Array) -> Any:
    return _filtered((mdl, x), rest)


@eqx.filter_custom_vjp
def _filtered(differentiated: Any, rest: Any) -> Any:
    mdl, x = differentiated
    return mdl(rest, x)


@_filtered.def_fwd
def _forward(perturbed: Any, differentiated: Any, rest: Any) -> Any:
    mdl, x = differentiated
    arrays, static = eqx.partition(mdl, eqx.is_inexact_array)
    y, pullback, new_rest = jax.vjp(lambda arrays, x: eqx.combine(arrays, static)(rest, x), arrays, x, has_aux=True)
    return (y, new_rest), pullback


@_filtered.def_bwd
def _backward(pullback: Any, bars: Any, perturbed: Any, differentiated: Any, rest: Any) -> Any:
    y_bar, _ = bars
    mdl_bar, x_bar = pullback(y_bar)
    return sign(mdl_bar), x_bar
