"""What the frameworks' own bridges do and don't, as reasons for what `host` does by itself.

Each test pins the behaviour of a framework, not of crossvjp: one that fails after an upgrade says that the bridge could
be used instead.
"""

from __future__ import annotations

from typing import Any

import flax.errors
import flax.linen as nn
import haiku as hk
import haiku.experimental.flax as hk_flax
import jax
import numpy as np
import pytest
from flax import nnx
from hosting import LinenNet, NnxNet, an_input, haiku_net

import crossvjp as cv

KEY = jax.random.key(0)
X = an_input()


def test_to_nnx_does_not_write_a_linen_modules_state_unless_a_call_asks_for_it():
    module = nnx.bridge.ToNNX(LinenNet(), rngs=nnx.Rngs(0)).lazy_init(X)
    with pytest.raises(flax.errors.ModifyScopeVariableError, match='collection "batch_stats" is immutable'):
        module(X)
    hosted = cv.host(LinenNet(), "nnx", X, rngs=nnx.Rngs(0))
    hosted(X)
    assert np.any(hosted.norm["mean"][...] != 0)


def test_to_nnx_needs_a_mesh_for_a_module_with_shardings():
    dense = nn.Dense(6, kernel_init=nn.with_partitioning(nn.initializers.ones, ("in", "out")))
    with pytest.raises(ValueError, match="auto mesh context or metadata is required"):
        nnx.bridge.ToNNX(dense, rngs=nnx.Rngs(0)).lazy_init(X)
    assert cv.host(dense, "nnx", X, rngs=nnx.Rngs(0)).kernel.shape == (5, 6)


def test_to_linen_draws_from_seed_0_where_the_host_has_no_key():
    net = nnx.bridge.to_linen(NnxNet)
    variables = net.init({"params": KEY, "dropout": KEY}, X)
    y, _ = net.apply(variables, X, mutable=["batch_stats"])
    again, _ = net.apply(variables, X, mutable=["batch_stats"])
    np.testing.assert_array_equal(y, again)
    assert np.any(y == 0)


def test_to_linen_drops_state_where_the_host_may_not_write_it():
    net = nnx.bridge.to_linen(NnxNet)
    variables = net.init({"params": KEY, "dropout": KEY}, X)
    y: Any = net.apply(variables, X)
    assert y.shape == (4, 6)


def test_haikus_module_for_flax_needs_another_stream_than_the_parameters_to_be_initialised():
    net = hk_flax.Module(hk.transform_with_state(haiku_net()))
    with pytest.raises(ValueError, match="must pass a non-None PRNGKey"):
        net.init(KEY, X)


def test_haikus_lift_of_flax_gives_no_key_to_a_call():
    net = hk.transform_with_state(lambda x: hk_flax.lift(LinenNet(), name="guest")(x))
    with pytest.raises(flax.errors.InvalidRngError, match='needs PRNG for "dropout"'):
        net.init(KEY, X)


def test_haikus_lift_of_flax_hides_parameters_from_getters():
    seen = []

    def getter(next_getter, value, context):
        seen.append(context.full_name)
        return next_getter(value)

    def net(x):
        with hk.custom_getter(getter):
            return hk_flax.lift(nn.Dense(3), name="guest")(x)

    hk.transform(net).init(KEY, X)
    assert seen == []
