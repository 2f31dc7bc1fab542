"""Haiku: a module inside a transform, and a key drawn behind it."""

from __future__ import annotations

import haiku as hk
import jax
import jax.numpy as jnp

from crossvjp.testing import Subject
from crossvjp.testing.common import CLASSES, HIDDEN, MOMENTUM, RATE, batch, mlp_numbers


def subjects() -> list[Subject]:
    """Makes the subjects."""
    return [_mlp(), _block()]


class _Mlp(hk.Module):
    def __call__(self, x):
        return hk.Linear(CLASSES, name="second")(jnp.tanh(hk.Linear(HIDDEN, name="first")(x)))


class _Block(hk.Module):
    def __call__(self, x):
        x = hk.Linear(HIDDEN, with_bias=False)(x)
        x = hk.BatchNorm(create_scale=True, create_offset=True, decay_rate=MOMENTUM)(x, is_training=True)
        return hk.dropout(hk.next_rng_key(), RATE, jnp.tanh(x))


def _transformed(kind):
    def net(x, use):
        out = use(kind(name="inner"), x)
        return out, jax.random.normal(hk.next_rng_key())

    transformed = hk.transform_with_state(net)

    def run(variables, rest, use, x):
        (out, drawn), state = transformed.apply(variables, rest["state"], rest["key"], x, use)
        return out, (state, drawn)

    made = transformed.init(jax.random.PRNGKey(0), batch(), lambda mdl, x: mdl(x))
    return run, *made


def _mlp():
    run, _, state = _transformed(_Mlp)
    numbers = mlp_numbers()
    layers = {"inner/first": 1, "inner/second": 2}
    variables = {layer: {"w": numbers[f"kernel_{i}"], "b": numbers[f"bias_{i}"]} for layer, i in layers.items()}

    def common(variables):
        names = {"w": "kernel", "b": "bias"}
        return {f"{names[name]}_{i}": variables[layer][name] for layer, i in layers.items() for name in names}

    rest = {"state": state, "key": jax.random.PRNGKey(2)}
    return Subject("haiku mlp", variables, rest, (batch(),), run, common, "mlp")


def _block():
    run, variables, state = _transformed(_Block)
    return Subject("haiku block", variables, {"state": state, "key": jax.random.PRNGKey(2)}, (batch(),), run)
