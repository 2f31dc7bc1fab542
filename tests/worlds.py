"""The same two small models in every framework, as pure functions, with a place to put a rule.

A world's `run(variables, x, wrap)` calls its block through `wrap`, which is `lambda block: block`
for the unwrapped model. Everything that a call can depend on or change is in `variables` and in the
result, so wrapped and unwrapped runs can be compared under any transform of JAX.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
from flax import nnx

Wrap = Callable[[Any], Any]
FEATURES, BATCH, UNITS, RATE = 3, 4, 5, 0.5


@dataclasses.dataclass(frozen=True)
class World:
    """One framework's model.

    Args:
        name: the framework.
        variables: `{"params": ..., "rest": ...}`, the second with state and keys.
        run: `(variables, x, wrap) -> (out, after)`, where `after` is the state after the call and
            a number drawn from the RNG stream behind the block.
    """

    name: str
    variables: dict[str, Any]
    run: Callable[[dict[str, Any], Any, Wrap], tuple[Any, Any]]

    def __repr__(self) -> str:
        return self.name


def block_inputs() -> Any:
    """Makes inputs of shape (batch, features)."""
    return jax.random.normal(jax.random.key(7), (BATCH, FEATURES))


def linen_world() -> World:
    """Dense, batch norm and dropout in a compact Linen module."""

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(UNITS)(x)
            x = nn.BatchNorm(use_running_average=False, momentum=0.9)(x)
            return nn.Dropout(RATE, deterministic=False)(nn.tanh(x))

    class Net(nn.Module):
        wrap: Any

        @nn.compact
        def __call__(self, x):
            out = self.wrap(Block())(x)
            return out, jax.random.normal(self.make_rng("dropout"))

    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    variables = Net(lambda block: block).init(keys, block_inputs())

    def run(variables, x, wrap):
        collections = {"params": variables["params"], "batch_stats": variables["rest"]["batch_stats"]}
        (out, drawn), state = Net(wrap).apply(
            collections, x, rngs={"dropout": variables["rest"]["key"]}, mutable=["batch_stats"]
        )
        return out, (state, drawn)

    rest = {"batch_stats": variables["batch_stats"], "key": jax.random.key(2)}
    return World("linen", {"params": variables["params"], "rest": rest}, run)


def nnx_world() -> World:
    """The same in NNX."""

    class Block(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(FEATURES, UNITS, rngs=rngs)
            self.norm = nnx.BatchNorm(UNITS, momentum=0.9, rngs=rngs)
            self.dropout = nnx.Dropout(RATE, rngs=rngs)

        def __call__(self, x):
            return self.dropout(nnx.tanh(self.norm(self.dense(x))))

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.block = Block(rngs)
            self.rngs = rngs

    graphdef, params, rest = nnx.split(Net(nnx.Rngs(0, dropout=1)), nnx.Param, ...)

    def run(variables, x, wrap):
        net = nnx.merge(graphdef, variables["params"], variables["rest"], copy=True)
        out = wrap(net.block)(x)
        drawn = jax.random.normal(net.rngs.dropout())
        return out, (nnx.state(net, nnx.Not(nnx.Param)), drawn)

    return World("nnx", {"params": params, "rest": rest}, run)


def haiku_world() -> World:
    """The same in Haiku."""

    class Block(hk.Module):
        def __call__(self, x):
            x = hk.Linear(UNITS)(x)
            x = hk.BatchNorm(create_scale=True, create_offset=True, decay_rate=0.9)(x, is_training=True)
            return hk.dropout(hk.next_rng_key(), RATE, jnp.tanh(x))

    def net(x, wrap):
        out = wrap(Block())(x)
        return out, jax.random.normal(hk.next_rng_key())

    transformed = hk.transform_with_state(net)
    params, state = transformed.init(jax.random.PRNGKey(0), block_inputs(), lambda block: block)

    def run(variables, x, wrap):
        (out, drawn), state = transformed.apply(
            variables["params"], variables["rest"]["state"], variables["rest"]["key"], x, wrap
        )
        return out, (state, drawn)

    return World("haiku", {"params": params, "rest": {"state": state, "key": jax.random.PRNGKey(2)}}, run)


def equinox_world() -> World:
    """The same in Equinox, where state and keys are inputs and outputs of the block."""

    class Block(eqx.Module):
        dense: eqx.nn.Linear
        norm: eqx.nn.BatchNorm
        dropout: eqx.nn.Dropout

        def __call__(self, x, state, *, key):
            x = jax.vmap(self.dense)(x)
            normalise = jax.vmap(self.norm, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
            x, state = normalise(x, state)
            return self.dropout(jnp.tanh(x), key=key), state

    def make(key):
        norm = eqx.nn.BatchNorm(UNITS, axis_name="batch", momentum=0.9, mode="batch")
        return Block(eqx.nn.Linear(FEATURES, UNITS, key=key), norm, eqx.nn.Dropout(RATE))

    block, state = eqx.nn.make_with_state(make)(jax.random.key(0))
    params, static = eqx.partition(block, eqx.is_inexact_array)

    def run(variables, x, wrap):
        first, second = jax.random.split(variables["rest"]["key"])
        model = eqx.combine(variables["params"], static)
        out, state = wrap(model)(x, variables["rest"]["state"], key=first)
        return out, (state, jax.random.normal(second))

    return World("equinox", {"params": params, "rest": {"state": state, "key": jax.random.key(2)}}, run)


def plain_world() -> World:
    """The same in plain JAX: a function of parameters, as a `Partial`."""

    def block(params, x, mean, key):
        x = x @ params["w"] + params["b"]
        batch_mean, var = x.mean(0), x.var(0)
        x = params["scale"] * (x - batch_mean) * jax.lax.rsqrt(var + 1e-5) + params["offset"]
        kept = jax.random.bernoulli(key, 1 - RATE, x.shape)
        return jnp.where(kept, jnp.tanh(x) / (1 - RATE), 0), 0.9 * mean + 0.1 * batch_mean

    w = jax.random.normal(jax.random.key(0), (FEATURES, UNITS))
    params = {"w": w, "b": jnp.zeros(UNITS), "scale": jnp.ones(UNITS), "offset": jnp.zeros(UNITS)}

    def run(variables, x, wrap):
        first, second = jax.random.split(variables["rest"]["key"])
        model = jax.tree_util.Partial(block, variables["params"])
        out, mean = wrap(model)(x, variables["rest"]["mean"], first)
        return out, (mean, jax.random.normal(second))

    return World("plain", {"params": params, "rest": {"mean": jnp.zeros(UNITS), "key": jax.random.key(2)}}, run)


WORLDS = {
    "linen": linen_world,
    "nnx": nnx_world,
    "haiku": haiku_world,
    "equinox": equinox_world,
    "plain": plain_world,
}
