"""Equinox: modules as values; state and keys are inputs and outputs of their calls."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp

from crossvjp.testing import Subject
from crossvjp.testing.common import CLASSES, FEATURES, HIDDEN, MOMENTUM, RATE, batch, mlp_numbers


def subjects() -> list[Subject]:
    """Makes the subjects."""
    return [_mlp(), _block()]


class _Mlp(eqx.Module):
    first: eqx.nn.Linear
    second: eqx.nn.Linear

    def __call__(self, x):
        return jax.vmap(lambda x: self.second(jnp.tanh(self.first(x))))(x)


class _Block(eqx.Module):
    dense: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    dropout: eqx.nn.Dropout

    def __call__(self, x, state, *, key):
        x = jax.vmap(self.dense)(x)
        normalise = jax.vmap(self.norm, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
        x, state = normalise(x, state)
        return self.dropout(jnp.tanh(x), key=key), state


def _mlp():
    key, numbers = jax.random.key(0), mlp_numbers()
    model = _Mlp(eqx.nn.Linear(FEATURES, HIDDEN, key=key), eqx.nn.Linear(HIDDEN, CLASSES, key=key))
    where = lambda model: (model.first.weight, model.first.bias, model.second.weight, model.second.bias)
    values = (numbers["kernel_1"].T, numbers["bias_1"], numbers["kernel_2"].T, numbers["bias_2"])
    variables, static = eqx.partition(eqx.tree_at(where, model, values), eqx.is_array)

    def common(variables):
        first, first_bias, second, second_bias = where(variables)
        return {"kernel_1": first.T, "bias_1": first_bias, "kernel_2": second.T, "bias_2": second_bias}

    def run(variables, rest, use, x):
        return use(eqx.combine(variables, static), x), ()

    return Subject("equinox mlp", variables, (), (batch(),), run, common, "mlp")


def _block():
    def make(key):
        norm = eqx.nn.BatchNorm(HIDDEN, axis_name="batch", momentum=MOMENTUM, mode="batch")
        return _Block(eqx.nn.Linear(FEATURES, HIDDEN, use_bias=False, key=key), norm, eqx.nn.Dropout(RATE))

    block, state = eqx.nn.make_with_state(make)(jax.random.key(0))
    variables, static = eqx.partition(block, eqx.is_inexact_array)

    def run(variables, rest, use, x):
        first, second = jax.random.split(rest["key"])
        out = use(eqx.combine(variables, static), x, rest["state"], key=first)
        return out, jax.random.normal(second)

    return Subject("equinox block", variables, {"state": state, "key": jax.random.key(2)}, (batch(),), run)
