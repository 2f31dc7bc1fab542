"""Each framework's own transforms around a wrapped call."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from rules import identity

from crossvjp.testing import assert_close

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (4, 3))


def plain(mdl):
    """Leaves the module as it is."""
    return mdl


class LinenBlock(nn.Module):
    """Dense, batch norm and dropout under `wrap`, with `setup` in `self`."""

    wrap: Any

    def setup(self):
        self.dense = nn.Dense(3)
        self.norm = nn.BatchNorm(use_running_average=False)
        self.drop = nn.Dropout(0.5, deterministic=False)

    def __call__(self, x):
        return self.wrap(self.inner)(x)

    def inner(self, x):
        return self.drop(self.norm(self.dense(x)))


def linen_scan(wrap):
    body = nn.scan(
        lambda mdl, carry, _: (mdl(carry), None),
        variable_axes={"params": 0, "batch_stats": 0},
        split_rngs={"params": True, "dropout": True},
        length=3,
    )
    return lambda x: body(LinenBlock(wrap), x, None)[0]


def linen_vmap(wrap):
    block = nn.vmap(
        LinenBlock,
        variable_axes={"params": 0, "batch_stats": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=None,  # pyright: ignore[reportArgumentType]  annotated too narrowly in Flax
        axis_size=2,
    )
    return lambda x: block(wrap)(x)


LINEN = {
    "none": lambda wrap: LinenBlock(wrap),
    "jit": lambda wrap: nn.jit(LinenBlock)(wrap),
    "remat": lambda wrap: nn.remat(LinenBlock)(wrap),
    "scan": linen_scan,
    "vmap": linen_vmap,
}


@pytest.mark.parametrize("name", LINEN)
def test_linen(name):
    class Net(nn.Module):
        wrap: Any

        @nn.compact
        def __call__(self, x):
            return LINEN[name](self.wrap)(x)

    keys = {"params": KEY, "dropout": KEY}
    variables = Net(plain).init(keys, X)

    def loss(wrap):
        def run(params, x):
            collections = {**variables, "params": params}
            out: Any = Net(wrap).apply(collections, x, rngs={"dropout": KEY}, mutable=["batch_stats"])
            return jnp.sum(jnp.sin(out[0])), out

        return run

    compare(loss, variables["params"])


HAIKU = {
    "none": lambda block: block,
    "remat": hk.remat,
    "scan": lambda block: lambda x: hk.scan(lambda carry, _: (block(carry), None), x, None, length=3)[0],
    "vmap": lambda block: lambda x: hk.vmap(block, split_rng=False)(jnp.stack([x, 2 * x])),
    "layer_stack": lambda block: hk.layer_stack(3)(block),
}


@pytest.mark.parametrize("name", HAIKU)
def test_haiku(name):
    class Block(hk.Module):
        def __call__(self, x):
            x = hk.Linear(3)(x)
            # `hk.vmap` does not batch state, so this does not depend on the input
            hk.set_state("calls", hk.get_state("calls", (), init=jnp.zeros) + 1)
            return hk.dropout(hk.next_rng_key(), 0.5, x)

    stateless = name == "layer_stack"  # which takes no state

    def net(x, wrap):
        if stateless:
            return HAIKU[name](lambda x: wrap(hk.Linear(3))(x))(x)
        block = Block()
        return HAIKU[name](lambda x: wrap(block)(x))(x)

    transformed = hk.transform_with_state(net)
    key = jax.random.PRNGKey(0)
    params, state = hk.transform_with_state(
        net if name in ("none", "layer_stack") else lambda x, wrap: wrap(Block())(x)
    ).init(key, X, plain)

    def loss(wrap):
        def run(params, x):
            out = transformed.apply(params, state, key, x, wrap)
            return jnp.sum(jnp.sin(out[0])), out

        return run

    compare(loss, params)


class NnxBlock(nnx.Module):
    """Linear, batch norm and dropout."""

    def __init__(self, rngs):
        self.dense = nnx.Linear(3, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.drop(self.norm(self.dense(x)))


def nnx_scan(wrap, block, x):
    @nnx.scan(in_axes=(nnx.Carry, None), out_axes=nnx.Carry, length=3)
    def body(carry, params):
        block, x = carry
        return block, wrap(block)(x) + params

    return body((block, x), jnp.zeros(()))[1]


NNX = {
    "none": lambda wrap, block, x: wrap(block)(x),
    "jit": lambda wrap, block, x: nnx.jit(lambda block, x: wrap(block)(x))(block, x),
    "remat": lambda wrap, block, x: nnx.remat(lambda block, x: wrap(block)(x))(block, x),
    "scan": nnx_scan,
}


@pytest.mark.parametrize("name", NNX)
def test_nnx(name):
    graphdef, params, rest = nnx.split(NnxBlock(nnx.Rngs(0)), nnx.Param, ...)

    def loss(wrap):
        def run(params, x):
            block = nnx.merge(graphdef, params, rest, copy=True)
            out = NNX[name](wrap, block, x)
            return jnp.sum(jnp.sin(out)), (out, nnx.state(block, nnx.BatchStat))

        return run

    compare(loss, params)


def test_nnx_grad_with_respect_to_the_module():
    def grad(wrap):
        return nnx.grad(lambda block: jnp.sum(jnp.sin(wrap(block)(X))))(NnxBlock(nnx.Rngs(0)))

    assert_close(grad(identity), grad(plain))


EQUINOX = {
    "jit": eqx.filter_jit,
    "checkpoint": eqx.filter_checkpoint,
    "vmap": lambda fn: lambda mdl, x: eqx.filter_vmap(fn, in_axes=(None, 0))(mdl, x),
}


@pytest.mark.parametrize("name", EQUINOX)
def test_equinox(name):
    params, static = eqx.partition(eqx.nn.MLP(3, 3, 4, 2, key=KEY), eqx.is_inexact_array)
    x = X if name == "vmap" else X[0]

    def loss(wrap):
        def run(params, _):
            mdl = eqx.combine(params, static)
            out = EQUINOX[name](lambda mdl, x: wrap(mdl)(x))(mdl, x)
            return jnp.sum(jnp.sin(out)), out

        return run

    compare(loss, params)


def compare(loss, params):
    """Compares values, auxiliary results and gradients with and without the identity rule."""
    for outer in (plain, jax.jit):
        run = lambda wrap, outer=outer: jax.value_and_grad(outer(loss(wrap)), argnums=(0, 1), has_aux=True)(params, X)
        assert_close(run(identity), run(plain))
