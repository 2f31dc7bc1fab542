"""Users' needs about what a rule is put on; tests/test_demand.py has the table of all needs."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import pytest
from demand import each_outer, scalar, times, triple
from flax import nnx
from hosts import HOSTS, the_input
from rules import f, identity

import crossvjp
from crossvjp.adapters.haiku import bind
from crossvjp.testing import assert_close, assert_same_bits

KEY = jax.random.key(0)


@each_outer
@pytest.mark.parametrize("how", ["lift", "transparent_lift"])
def test_row_3_parameters_lifted_outside_of_a_scan_are_used_inside_it_under_their_names(how, outer):
    lift = getattr(hk, how)

    def net(x, use):
        inner = hk.transform(lambda x: hk.Linear(2, name="inner")(x))
        options = {"name": "lifted"} if how == "lift" else {}
        params = lift(inner.init, **options)(hk.next_rng_key() if hk.running_init() else None, x)
        call = use(lambda params, x: jnp.tanh(inner.apply(params, None, x)))
        return hk.scan(lambda x, _: (call(params, x), None), x, None, length=3)[0].sum()

    transformed = hk.transform(net)
    params = transformed.init(jax.random.PRNGKey(0), the_input(), lambda fn: fn)
    assert list(params) == ["lifted/inner" if how == "lift" else "inner"]
    loss = lambda use: lambda params: transformed.apply(params, None, the_input(), use)
    own = jax.grad(loss(lambda fn: fn))(params)
    assert_close(outer(jax.grad, loss(identity.lift))(params), own)
    assert_close(outer(jax.grad, loss(triple.lift))(params), times(3)(own))  # at each step, the parameters' part alone


def tied_plain(params, x):
    """What every tied pair of layers below computes."""
    return jnp.tanh(jnp.tanh(x @ params["kernel"] + params["bias"]) @ params["kernel"] + params["bias"])


TIED = {"kernel": jnp.array([[0.5, -1.0], [2.0, 0.25]]), "bias": jnp.array([0.1, -0.2])}


def call_both(mdls, x):
    return jnp.tanh(mdls[1](jnp.tanh(mdls[0](x))))


def linen_shared_attribute(use, params, x):
    """A submodule that has its parent's layer for an attribute, in one handle with that layer."""

    class Child(nn.Module):
        layer: nn.Module

        def __call__(self, x):
            return self.layer(x)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            dense = nn.Dense(2, name="dense")
            return use(call_both)((Child(dense), dense), x)

    return Net().apply({"params": {"dense": params}}, x)


def linen_module_that_holds_it_twice(use, params, x):
    """A module with one layer as two attributes."""

    class Twice(nn.Module):
        first: nn.Module
        second: nn.Module

        def __call__(self, x):
            return call_both((self.first, self.second), x)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            dense = nn.Dense(2, name="dense")
            return use(f)(Twice(dense, dense), x)

    return Net().apply({"params": {"dense": params}}, x)


def nnx_tied(*, graph: bool) -> Any:
    """Two layers with the same Variables."""

    def run(use, params, x):
        with nnx.set_graph_mode(graph), nnx.set_graph_updates(graph):
            first, second = (nnx.Linear(2, 2, rngs=nnx.Rngs(0)) for _ in range(2))
            first.kernel = second.kernel = nnx.Param(params["kernel"])
            first.bias = second.bias = nnx.Param(params["bias"])
            return use(call_both)((first, second), x)

    return run


def haiku_shared(use, params, x):
    """One layer twice in a handle, once held by another module."""

    def net(x):
        linear = hk.Linear(2, name="linear")
        return use(call_both)((hk.Sequential([linear]), linear), x)

    held = {"w": params["kernel"], "b": params["bias"]}
    return hk.transform(net).apply({"linear": held}, None, x)


def equinox_shared(use, params, x):
    """Two layers of which the second has the arrays of the first."""
    layer = eqx.nn.Linear(2, 2, key=KEY)
    layer = eqx.tree_at(lambda layer: (layer.weight, layer.bias), layer, (params["kernel"].T, params["bias"]))
    arrays = lambda layer: (layer.weight, layer.bias)
    shared = eqx.nn.Shared((layer, layer), where=lambda both: arrays(both[1]), get=lambda both: arrays(both[0]))
    return use(lambda mdl, x: call_both(mdl(), x))(shared, x)


TIES = {
    "linen shared attribute": linen_shared_attribute,
    "linen held twice": linen_module_that_holds_it_twice,
    "nnx graph": nnx_tied(graph=True),
    "nnx tree": nnx_tied(graph=False),
    "haiku": haiku_shared,
    "equinox": equinox_shared,
    "plain": lambda use, params, x: use(tied_plain)(params, x),
}


@each_outer
@pytest.mark.parametrize("run", TIES.values(), ids=TIES)
def test_row_5_tied_weights_are_one_leaf_with_one_summed_cotangent(run, outer):
    seen: list[int] = []

    @crossvjp.rule
    def sign_of_the_sum(call, y_bar):
        bar = call.pullback(y_bar)
        seen.append(len(jax.tree.leaves(bar.variables)))
        return bar.replace(variables=jax.tree.map(jnp.sign, bar.variables))

    x = the_input()
    own = jax.grad(lambda params: tied_plain(params, x).sum())(TIED)
    got = outer(jax.grad, lambda params: run(sign_of_the_sum.lift, params, x).sum())(TIED)
    assert_same_bits(got, jax.tree.map(jnp.sign, own))
    assert set(seen) == {2}
    assert_close(outer(jax.grad, lambda params: run(identity.lift, params, x).sum())(TIED), own)


def linen_frozen_bound(wrap, x):
    """A bound module, outside of the function that is differentiated."""
    bound = nn.Dense(3).bind(HOSTS["linen bound"].params)
    return jax.grad(lambda x: scalar(lambda x: wrap(bound)(x))(x))(x)


def linen_frozen_inside(wrap, x):
    """A submodule, in a gradient that is taken inside of a compact method."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            dense = nn.Dense(3)
            dense(x)
            return jax.grad(lambda x: scalar(lambda x: wrap(dense)(x))(x))(x)

    return Net().apply(HOSTS["linen compact"].params, x)


def nnx_frozen(*, graph: bool) -> Any:
    """A module outside of the function that is differentiated."""

    def run(wrap, x):
        with nnx.set_graph_mode(graph), nnx.set_graph_updates(graph):
            model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
            return jax.grad(lambda x: scalar(lambda x: wrap(model)(x))(x))(x)

    return run


def haiku_frozen_inside(wrap, x):
    """A module, in a gradient that is taken inside of a transform."""

    def net(x):
        linear = hk.Linear(3, name="dense")
        return jax.grad(lambda x: scalar(lambda x: wrap(linear)(x))(x))(x)

    return hk.transform(net).apply(HOSTS["haiku module"].params, None, x)


def haiku_frozen_outside(wrap, x):
    """A transformed function with its parameters."""
    host = HOSTS["haiku transformed"]
    bound = bind(hk.transform(lambda x: hk.Linear(3)(x)), host.params)
    return jax.grad(lambda x: scalar(lambda x: wrap(bound)(x))(x))(x)


def equinox_frozen(wrap, x):
    """A layer outside of the function that is differentiated."""
    layer = eqx.nn.Linear(2, 3, key=KEY)
    return jax.grad(lambda x: scalar(lambda x: wrap(layer)(x))(x))(x)


def plain_frozen(wrap, x):
    """Parameters outside of the function that is differentiated."""
    model = jax.tree_util.Partial(lambda w, x: x @ w, jnp.arange(6.0).reshape(2, 3))
    return jax.grad(lambda x: scalar(lambda x: wrap(model)(x))(x))(x)


FROZEN = {
    "linen bound": linen_frozen_bound,
    "linen inside": linen_frozen_inside,
    "nnx graph": nnx_frozen(graph=True),
    "nnx tree": nnx_frozen(graph=False),
    "haiku inside": haiku_frozen_inside,
    "haiku outside": haiku_frozen_outside,
    "equinox": equinox_frozen,
    "plain": plain_frozen,
}


@pytest.mark.parametrize("outer", [lambda run: run, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("run", FROZEN.values(), ids=FROZEN)
def test_row_12_a_frozen_module_has_a_gradient_of_its_input_alone(run, outer):
    @crossvjp.rule
    def halve(call, y_bar):
        bar = call.pullback(y_bar)
        return bar.replace(inputs=times(0.5)(bar.inputs))

    got = outer(lambda x: run(halve, x))(the_input())
    assert_close(got, run(lambda mdl: mdl, the_input()) / 2)
