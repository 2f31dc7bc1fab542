"""Equinox: modules are partitioned outside of the loss and combined inside; state is an argument and a result."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax

from benchmarks.cases import (
    BATCH,
    DROPOUT,
    MOMENTUM,
    WIDTH,
    Apply,
    Case,
    Layer,
    Variant,
    by_hand,
    chain,
    lifted,
    sign,
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


def case(layer: Layer, variant: Variant, depth: int) -> Case:
    """Builds the model of `depth` layers under one variant of the rule."""
    make = Block if layer == "block" else Dense
    made = [eqx.nn.make_with_state(make)(key) for key in jax.random.split(jax.random.key(0), depth)]
    params, statics = zip(*(eqx.partition(mdl, eqx.is_inexact_array) for mdl, _ in made), strict=True)
    rests = [(state, jax.random.key(1)) if layer == "block" else None for _, state in made]
    calls = [_under(variant, static) for static in statics]
    return Case(lambda params, rests, x: chain(calls, params, rests, x), params, rests)


def _under(variant: Variant, static: Any) -> Apply:
    if variant == "by hand":
        return by_hand(lambda own, rest, x: eqx.combine(own, static)(rest, x))
    call = _own if variant == "own" else lifted(_call, variant)
    return lambda own, rest, x: call(eqx.combine(own, static), rest, x)


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
