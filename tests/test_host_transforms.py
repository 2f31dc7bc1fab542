"""The hosts' own transforms on modules that hold guests."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hosting import LinenNet, NnxNet, an_input

import crossvjp as cv
from crossvjp.testing import assert_same_bits

KEY = jax.random.key(3)
X = an_input()


class Layer(nnx.Module):
    """An NNX layer with as many outputs as inputs, a sharding, state and a mask."""

    def __init__(self, rngs):
        init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("in", "out"), eager_sharding=False)
        self.dense = nnx.Linear(5, 5, kernel_init=init, rngs=rngs)
        self.calls = nnx.BatchStat(jnp.zeros(()))
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        self.calls[...] += 1.0
        return self.drop(self.dense(x))


class LinenHost(nn.Module):
    """Calls `wrap(hosted, x)`."""

    wrap: Any = lambda mdl, x: mdl(x)

    @nn.compact
    def __call__(self, x, _=None):
        return self.wrap(cv.host(Layer, "linen", name="guest"), x), None


def run_linen(net: nn.Module, variables: Any) -> tuple[Any, Any]:
    """Runs a module and gives its output and state."""
    (y, _), after = net.apply(variables, X, None, rngs={"dropout": KEY}, mutable=["batch_stats"])
    return y, after["batch_stats"]


def test_linen_scans_over_a_guest_and_names_the_new_axis_in_its_metadata():
    net: Any = nn.scan(
        LinenHost,
        variable_axes={"params": 0, "batch_stats": 0},
        split_rngs={"params": True, "dropout": True},
        length=3,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )()
    variables = net.init(jax.random.key(0), X, None)
    kernel = variables["params"]["guest"]["dense"]["kernel"]
    assert isinstance(kernel, nn.Partitioned)
    assert kernel.names == ("layers", "in", "out")
    assert not np.array_equal(kernel.value[0], kernel.value[1])
    y, after = run_linen(net, variables)
    np.testing.assert_array_equal(after["guest"]["calls"], np.ones(3))
    assert y.shape == X.shape
    assert 0 < np.count_nonzero(y) < y.size


def test_linen_remat_of_a_guest_changes_nothing():
    plain, net = LinenHost(), LinenHost(lambda mdl, x: nn.remat(lambda mdl, x: mdl(x))(mdl, x))
    variables = plain.init(jax.random.key(0), X)

    def grad(net):
        return jax.grad(lambda params: run_linen(net, {**variables, "params": params})[0].sum())(variables["params"])

    assert_same_bits(run_linen(net, variables), run_linen(plain, variables))
    assert_same_bits(grad(net), grad(plain))


def test_linen_jit_of_a_guest_publishes_its_state():
    net = LinenHost(lambda mdl, x: nn.jit(lambda mdl, x: mdl(x))(mdl, x))
    y, after = run_linen(net, net.init(jax.random.key(0), X))
    assert float(after["guest"]["calls"]) == 1.0
    assert 0 < np.count_nonzero(y) < y.size


def test_linen_vmap_over_a_guest_makes_an_ensemble():
    axes: Any = {"params": 0, "batch_stats": 0}
    split: Any = {"params": True, "dropout": True}
    everywhere: Any = None
    names = {nn.PARTITION_NAME: None}
    wrap = lambda mdl, x: nn.vmap(
        lambda mdl, x: mdl(x),
        variable_axes=axes,
        split_rngs=split,
        axis_size=3,
        in_axes=everywhere,
        metadata_params=names,
    )(mdl, x)
    net = LinenHost(wrap)
    variables = net.init(jax.random.key(0), X)
    y, after = run_linen(net, variables)
    assert y.shape == (3, *X.shape)
    assert after["guest"]["calls"].shape == (3,)
    assert np.any((y[0] == 0) != (y[1] == 0))


def linen_in_nnx(**streams: int) -> Any:
    """Hosts the Linen network in NNX."""
    return cv.host(LinenNet(), "nnx", X, rngs=nnx.Rngs(0, **streams))


def test_nnx_jit_and_grad_of_a_guest_update_its_state_and_its_stream():
    hosted = linen_in_nnx(dropout=1)
    eager, compiled = nnx.clone(hosted), nnx.clone(hosted)
    y = eager(X)
    np.testing.assert_allclose(nnx.jit(lambda module, x: module(x))(compiled, X), y, atol=1e-6)
    assert_same_bits(compiled.rngs.dropout.count[...], eager.rngs.dropout.count[...])
    np.testing.assert_allclose(compiled.norm["mean"][...], eager.norm["mean"][...], atol=1e-6)
    bars = nnx.grad(lambda module: module(X).sum())(hosted)
    assert set(nnx.to_pure_dict(bars)) == {"first", "norm"}
    assert_same_bits(hosted.norm["mean"][...], eager.norm["mean"][...])


def test_nnx_tree_mode_runs_a_guest():
    hosted = linen_in_nnx(dropout=1)
    y = nnx.clone(hosted)(X)
    with nnx.set_graph_mode(False), nnx.set_graph_updates(False):
        assert_same_bits(nnx.clone(hosted)(X), y)


def test_nnx_vmap_makes_a_stack_of_guests_and_scan_runs_through_it():
    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def make(rngs):
        return cv.host(nn.Dense(5), "nnx", X, rngs=rngs)

    stack = make(nnx.Rngs(0))
    assert stack.kernel.shape == (3, 5, 5)
    through = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    one_by_one = X
    for kernel, bias in zip(stack.kernel[...], stack.bias[...], strict=True):
        one_by_one = one_by_one @ kernel + bias
    np.testing.assert_allclose(through(X, stack), one_by_one, atol=1e-5)


def in_haiku(use: Any, guest: Any = None) -> hk.Transformed:
    """Makes a stateless Haiku host that calls `use(hosted, x)`."""
    return hk.transform(lambda x: use(cv.host(guest or nn.Dense(5), "haiku", name="guest"), x))


@pytest.mark.parametrize(
    "use",
    [
        lambda mdl, x: hk.remat(mdl)(x),
        lambda mdl, x: hk.scan(lambda x, _: (mdl(x), None), x, None, length=1)[0],
        lambda mdl, x: hk.vmap(mdl, split_rng=False)(x),
        lambda mdl, x: hk.cond(True, mdl, mdl, x) if not hk.running_init() else mdl(x),
    ],
    ids=["remat", "scan", "vmap", "cond"],
)
def test_haikus_transforms_run_a_guest(use):
    plain = in_haiku(lambda mdl, x: mdl(x))
    params = plain.init(KEY, X)
    assert jax.tree.map(jnp.shape, params) == {"guest": {"bias": (5,), "kernel": (5, 5)}}
    assert jax.tree.structure(in_haiku(use).init(KEY, X)) == jax.tree.structure(params)
    np.testing.assert_allclose(in_haiku(use).apply(params, None, X), plain.apply(params, None, X), atol=1e-6)


def test_haiku_layer_stack_stacks_guests():
    net = hk.transform(hk.layer_stack(3)(lambda x: cv.host(nn.Dense(5), "haiku", name="guest")(x)))
    params = net.init(KEY, X)
    (name,) = params
    assert name.endswith("/guest")
    assert params[name]["kernel"].shape == (3, 5, 5)
    assert net.apply(params, None, X).shape == X.shape


def test_haikus_creators_and_getters_see_a_guests_parameters():
    seen = []

    def getter(next_getter, value, context):
        seen.append(context.full_name)
        return next_getter(value.astype(jnp.bfloat16))

    def use(mdl, x):
        with hk.custom_getter(getter):
            return mdl(x.astype(jnp.bfloat16))

    net = in_haiku(use, nn.Dense(5, dtype=jnp.bfloat16))
    params = net.init(KEY, X)
    assert params["guest"]["kernel"].dtype == jnp.float32
    seen.clear()
    assert net.apply(params, None, X).dtype == jnp.bfloat16
    assert set(seen) == {"guest/kernel", "guest/bias"}


def test_equinoxs_transforms_run_a_guest():
    hosted = cv.host(nn.Dense(3), "equinox", X, key=KEY)
    y, bars = eqx.filter_jit(eqx.filter_value_and_grad(lambda hosted: hosted(X).sum()))(hosted)
    np.testing.assert_allclose(y, hosted(X).sum(), rtol=1e-5)
    np.testing.assert_allclose(bars.params["bias"], jnp.full(3, 4.0), rtol=1e-6)
    ensemble = eqx.filter_vmap(lambda key: cv.host(nn.Dense(3), "equinox", X, key=key))(jax.random.split(KEY, 2))
    each = eqx.filter_vmap(lambda hosted, x: hosted(x), in_axes=(eqx.if_array(0), None))(ensemble, X)
    assert each.shape == (2, 4, 3)
    assert not np.array_equal(each[0], each[1])


def test_the_gradient_of_a_compiled_loss_has_the_mask_of_the_loss_with_a_rule_around_a_guest():
    """Dropout alone: what is not zero is twice the input."""

    class Drop(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dropout(0.5, deterministic=False)(x)

    @cv.rule
    def triple(call, y_bar):
        return call.pullback(3 * y_bar)

    net = hk.transform(lambda x: triple(cv.host(Drop(), "haiku"))(x))
    loss = lambda x: jnp.sum(net.apply({}, KEY, x) * jnp.arange(20.0).reshape(4, 5))
    value, bar = jax.value_and_grad(jax.jit(loss))(X)
    np.testing.assert_allclose(value, loss(X), rtol=1e-6)
    mask = net.apply({}, KEY, jnp.ones_like(X))
    np.testing.assert_allclose(bar, 3 * mask * jnp.arange(20.0).reshape(4, 5), rtol=1e-6)


def test_an_nnx_guest_of_a_constructor_draws_the_mask_of_its_framework_for_the_hosts_key():
    hosted, state = eqx.nn.make_with_state(cv.host)(NnxNet, "equinox", key=KEY)
    y, _ = hosted(X, state, key=KEY)
    module = NnxNet(nnx.Rngs(KEY))
    nnx.reseed(module, default=KEY)
    assert_same_bits(y, module(X))
