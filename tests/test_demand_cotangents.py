"""Users' needs about cotangents and residuals; tests/test_demand.py has the table of all needs."""

from __future__ import annotations

from typing import Any

import flax.core
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from demand import FRAMEWORKS, each_framework, each_outer, gradients, scalar, times
from flax import nnx
from hosts import the_input
from rules import f, fwd, sign_gradient

import crossvjp
from crossvjp.testing import assert_close, assert_same_bits


def containers_of(host: Any) -> dict[str, Any]:
    """Lists what users of a framework put parameter cotangents into, as functions of the variables."""
    if host.name.startswith("linen"):
        return {"dict": flax.core.unfreeze, "FrozenDict": flax.core.freeze}
    if host.name.startswith("nnx"):
        return {
            "State": lambda tree: tree,
            "dict": nnx.to_pure_dict,
            "Module": lambda tree: nnx.merge(nnx.split(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))[0], tree, copy=True),
        }
    if host.name.startswith("haiku"):
        return {"dict": hk.data_structures.to_mutable_dict, "FlatMapping": hk.data_structures.to_immutable_dict}
    return {"own": lambda tree: tree}


CONTAINERS = [(host, kind) for host in FRAMEWORKS for kind in containers_of(host)]


@pytest.mark.parametrize(("host", "kind"), CONTAINERS, ids=str)
def test_row_6_parameter_cotangents_may_come_in_every_container_of_the_framework(host, kind):

    def backward(pullback, y_bar):
        x_bar, variables_bar = pullback(y_bar)
        return x_bar, containers_of(host)[kind](times(3)(variables_bar))

    params_bar, x_bar = gradients(host, crossvjp.custom_vjp(f, fwd, backward))
    own_params_bar, own_x_bar = gradients(host, f)
    assert_same_bits(params_bar, times(3)(own_params_bar))
    assert_same_bits(x_bar, own_x_bar)


GIVEN = {
    "None": lambda bar: None,
    "float0": lambda bar: np.zeros((), jax.dtypes.float0),
    "integer": lambda bar: jnp.array(5),
    "float": lambda bar: jnp.array(5.0),
}


@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN)
@each_framework
def test_row_19_whatever_a_rule_gives_for_an_integer_its_gradient_is_none(host, given):
    @crossvjp.rule
    def answer(call, y_bar):
        bar = call.pullback(y_bar)
        assert bar.inputs[1] is None
        return bar.replace(inputs=(bar.inputs[0], given(bar.inputs[1])))

    use = answer.lift(lambda mdl, x, index: mdl(x)[index])
    loss = lambda params, index: host.run(params, use, the_input(), index)
    params_bar, index_bar = jax.grad(loss, argnums=(0, 1), allow_int=True)(host.params, jnp.array(1))
    own = jax.grad(lambda params: host.run(params, lambda mdl, x: mdl(x)[1], the_input()))
    assert index_bar.dtype == jax.dtypes.float0
    assert_close(params_bar, own(host.params))


@each_framework
def test_rows_11_and_19_none_stands_for_any_cotangent_in_every_framework(host):
    params_bar, x_bar = gradients(host, crossvjp.custom_vjp(f, fwd, lambda pullback, y_bar: (None, None)))
    assert not any(leaf.any() for leaf in jax.tree.leaves((params_bar, x_bar)))
    assert jax.tree.map(jnp.shape, params_bar) == jax.tree.map(jnp.shape, host.params)


def once(run, x):
    return run(x).sum()


def in_a_scan(run, x):
    step = lambda total, shift: (total + run(x + shift).sum(), None)
    return jax.lax.scan(step, jnp.bfloat16(0), jnp.arange(3.0, dtype=jnp.bfloat16))[0]


@pytest.mark.parametrize("total", [once, in_a_scan])
@each_framework
def test_row_20_a_cotangent_of_another_dtype_is_cast_to_that_of_its_parameter(host, total):
    half = lambda tree: jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tree)
    widen = crossvjp.rule(lambda call, y_bar: jax.tree.map(lambda leaf: leaf.astype(jnp.float32), call.pullback(y_bar)))

    def bars(use):
        loss = lambda params, x: total(lambda x: host.run(params, use, x), x)
        return jax.grad(loss, argnums=(0, 1))(half(host.params), half(the_input()))

    got = bars(widen.lift(f))
    assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {jnp.dtype(jnp.bfloat16)}
    assert_close(got, bars(f))  # to eight spacings of bfloat16 at the largest entry: XLA may add in another order


@each_framework
def test_row_28_a_rule_that_speaks_of_the_parameters_alone_leaves_the_layers_above_their_gradient(host):
    """A plain tuple has to have a place for every input; `replace` keeps what it does not name."""
    upstream = lambda use: lambda params, scale: host.run(params, scalar(use), jnp.sin(scale) * the_input())
    got = jax.grad(upstream(sign_gradient.lift(f)), argnums=1)(host.params, jnp.array(0.3))
    own = jax.grad(upstream(f), argnums=1)(host.params, jnp.array(0.3))
    assert float(own) != 0.0
    assert_same_bits(got, own)
    omitted = crossvjp.custom_vjp(f, fwd, lambda pullback, y_bar: (pullback(y_bar).variables,))
    with pytest.raises(crossvjp.CotangentError, match="one cotangent for each of the 1 differentiable inputs"):
        jax.grad(upstream(omitted), argnums=1)(host.params, jnp.array(0.3))


@each_outer
@each_framework
def test_row_29_residuals_of_every_kind_reach_the_backward_pass(host, outer):
    def forward(mdl, x):
        y, pullback = crossvjp.vjp(f, mdl, x)
        return y, {"pullback": pullback, "act": jnp.tanh, "note": "kept", "count": 3, "nothing": None, "x": x}

    def backward(residuals, y_bar):
        assert residuals["act"] is jnp.tanh
        assert (residuals["note"], residuals["count"], residuals["nothing"]) == ("kept", 3, None)
        bar = residuals["pullback"](y_bar)
        return bar.replace(inputs=(residuals["act"](residuals["x"]),))

    params_bar, x_bar = gradients(host, crossvjp.custom_vjp(f, forward, backward), outer=outer)
    assert_close(params_bar, gradients(host, f)[0])
    assert_close(x_bar, jnp.tanh(the_input()))
