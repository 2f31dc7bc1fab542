"""The README's table of what the frameworks' own transforms do and don't, entry by entry.

Each test pins the behaviour of a framework, not of crossvjp: one that fails after an upgrade says
that the table has to change.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import IMPLEMENTATIONS, custom_vjp_of

X = jnp.array([1.0, -2.0])
KEY = jax.random.key(0)


@pytest.fixture(params=IMPLEMENTATIONS)
def mode(request: pytest.FixtureRequest) -> Iterator[str]:
    """JAX's own `custom_vjp` in each of its implementations."""
    with custom_vjp_of(request.param):
        yield request.param


@pytest.fixture
def today() -> Iterator[None]:
    """The implementation under which the transforms of NNX and Equinox run at all."""
    with custom_vjp_of("today"):
        yield


def linen(fn, **options):
    """Puts Flax Linen's own transform on a function, with the function's own gradient."""
    return nn.custom_vjp(
        fn, forward_fn=lambda *args: nn.vjp(fn, *args), backward_fn=lambda pullback, y_bar: pullback(y_bar), **options
    )


class LinenNet(nn.Module):
    """Calls `make(self, x)` in a compact method."""

    make: Any

    @nn.compact
    def __call__(self, x):
        return self.make(self, x)


def apply(net: nn.Module, variables: Any, x: Any, **options: Any) -> Any:
    """Applies a module; its declared result is a union that few callers can use."""
    return net.apply(variables, x, **options)


def test_linen_the_documented_example_signs_the_inputs_gradient(mode):
    """Both unpack two cotangents, so that nothing but the result says which was which."""

    def sign_grad(mdl, x):
        def backward(vjp_fn, y_t):
            input_t, params_t = vjp_fn(y_t)
            return input_t, jax.tree_util.tree_map(jnp.sign, params_t)

        fn = lambda mdl, x: mdl(x)
        rule = nn.custom_vjp(fn, forward_fn=lambda mdl, x: nn.vjp(fn, mdl, x), backward_fn=backward)
        return rule(mdl, x).sum()

    net = LinenNet(lambda self, x: sign_grad(nn.Dense(1), x))
    variables = net.init(KEY, X)
    variables_bar, x_bar = jax.grad(lambda variables, x: apply(net, variables, x), argnums=(0, 1))(variables, X)
    np.testing.assert_array_equal(variables_bar["params"]["Dense_0"]["kernel"], X[:, None])
    kernel: Any = variables["params"]["Dense_0"]["kernel"]
    np.testing.assert_array_equal(x_bar, np.sign(kernel[:, 0]))


def test_linen_two_modules_in_one_call_raise(mode):
    class Pair(nn.Module):
        first: nn.Module
        second: nn.Module

        def __call__(self, x):
            return self.second(self.first(x))

    net = LinenNet(lambda self, x: linen(lambda mdl, x: mdl(x))(Pair(nn.Dense(3), nn.Dense(4)), x))
    with pytest.raises(NotImplementedError, match="Modules that include other Modules"):  # Flax's, not ours
        net.init(KEY, X)


def test_linen_keyword_arguments_are_dropped_with_a_warning(mode):
    def fn(mdl, x, scale=1.0):
        return mdl(x) * scale

    def make(scale):
        return LinenNet(lambda self, x: linen(fn)(nn.Dense(1), x, scale=scale))

    with pytest.warns(RuntimeWarning, match="kwargs are not supported in custom_vjp"):
        variables = make(1.0).init(KEY, X)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        assert float(make(1.0).apply(variables, X)[0]) == float(make(10.0).apply(variables, X)[0])


def test_linen_other_collections_leak_when_they_are_differentiated(mode):
    net = LinenNet(lambda self, x: linen(lambda mdl, x: mdl(x))(nn.BatchNorm(use_running_average=True), x))
    variables = net.init(KEY, jnp.ones((4, 3)))
    words = {"today": "escape the scope of the transformation", "coming": "closed over a LinearizeTracer"}[mode]
    with pytest.raises(jax.errors.UnexpectedTracerError, match=words):
        jax.grad(lambda variables: apply(net, variables, jnp.ones((4, 3))).sum())(variables)


def test_linen_a_gradient_through_written_state_is_silently_zero(mode):
    class Keep(nn.Module):
        @nn.compact
        def __call__(self, x):
            self.variable("state", "kept", jnp.zeros, (2,)).value = x * self.param("w", nn.initializers.ones, ())
            return x

    def grad(wrap):
        net = LinenNet(lambda self, x: wrap(lambda mdl, x: mdl(x))(Keep(), x))
        variables = net.init(KEY, X)
        loss = lambda variables: jnp.sum(apply(net, variables, X, mutable=["state"])[1]["state"]["Keep_0"]["kept"] ** 2)
        return float(jax.grad(loss)(variables)["params"]["Keep_0"]["w"])

    assert grad(lambda fn: fn) == 10.0
    assert grad(linen) == 0.0


def test_linen_draws_another_dropout_mask_under_grad_of_jit(mode):
    net = LinenNet(lambda self, x: linen(lambda mdl, x: mdl(x))(nn.Dropout(0.5, deterministic=False), x).sum())
    x = jnp.arange(32.0)

    def loss(x):
        return apply(net, {}, x, rngs={"dropout": KEY})

    value, _ = jax.value_and_grad(jax.jit(loss))(x)
    assert float(value) != float(loss(x)) == float(jax.jit(loss)(x))


def test_linen_fails_under_remat_in_the_coming_mode(mode):
    net = LinenNet(lambda self, x: linen(lambda mdl, x: mdl(x))(nn.Dense(1), x).sum())
    variables = net.init(KEY, X)
    gradient = jax.grad(jax.checkpoint(lambda variables: apply(net, variables, X)))
    if mode == "today":
        kernel_bar = gradient(variables)["params"]["Dense_0"]["kernel"]
        np.testing.assert_array_equal(kernel_bar, X[:, None])
        return
    with pytest.raises(ValueError, match="safe_zip"):
        gradient(variables)


def test_haiku_has_no_transform_and_jax_own_fails_late(mode):
    assert not hasattr(hk, "custom_vjp")
    assert not hasattr(hk, "vjp")

    def net(x):
        dense = hk.Linear(1)
        rule = jax.custom_vjp(lambda x: dense(x))
        rule.defvjp(lambda x: (dense(x), x), lambda x, y_bar: (x,))
        return rule(x).sum()

    params = hk.transform(lambda x: hk.Linear(1)(x)).init(jax.random.PRNGKey(0), X)
    with pytest.raises(jax.errors.UnexpectedTracerError, match="inside a Haiku transformed function"):
        jax.grad(hk.transform(net).apply)(params, None, X)


def nnx_own(fn, forward, backward, **options):
    """Puts NNX's own transform on a function."""
    rule = nnx.custom_vjp(fn, **options)
    rule.defvjp(forward, backward)
    return rule


def test_nnx_has_a_signature_of_its_own_but_takes_two_modules_keywords_and_state(today):
    class Counting(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(2, 2, rngs=rngs)
            self.count = nnx.BatchStat(jnp.array(0.0))

        def __call__(self, x):
            self.count.set_value(self.count.get_value() + 1)
            return self.dense(x)

    got = []

    def fn(one, other, x, scale):
        return other(one(x)) * scale

    def forward(one, other, x, scale):
        return fn(one, other, x, scale), x

    def backward(x, bars):
        inputs_updates_bar, y_bar = bars
        got.append((inputs_updates_bar, y_bar))
        one_bar, other_bar, _, _ = inputs_updates_bar
        return one_bar, other_bar, x, jnp.zeros(())

    rule = nnx_own(fn, forward, backward)
    one, other = Counting(nnx.Rngs(0)), Counting(nnx.Rngs(1))
    expected = fn(one, other, X, jnp.array(3.0))
    np.testing.assert_allclose(rule(one, other, X, scale=jnp.array(3.0)), expected, rtol=1e-6)
    assert float(one.count.get_value()) == 2.0
    nnx.grad(lambda one, other: rule(one, other, X, jnp.array(1.0)).sum(), argnums=(0, 1))(one, other)
    assert len(got) == 1


def test_nnx_other_variables_leak_when_they_are_differentiated(today):
    def fn(mdl, x):
        return mdl(x)

    rule = nnx_own(
        fn,
        lambda mdl, x: (fn(mdl, x), None),
        lambda residuals, bars: (bars[0][0], bars[1]),
        nondiff_argnums=(nnx.DiffState(0, nnx.Param),),
    )
    norm = nnx.BatchNorm(2, use_running_average=True, rngs=nnx.Rngs(0))
    wrt = nnx.DiffState(0, (nnx.Param, nnx.BatchStat))
    with pytest.raises(jax.errors.UnexpectedTracerError, match="escape the scope of the transformation"):
        nnx.grad(lambda norm: rule(norm, jnp.ones((4, 2))).sum(), argnums=wrt)(norm)


def test_nnx_draws_the_same_dropout_mask_under_grad_of_jit(today):
    rule = nnx_own(lambda mdl, x: mdl(x), lambda mdl, x: (mdl(x), None), lambda residuals, bars: (bars[0][0], bars[1]))

    def loss(x):
        return rule(nnx.Dropout(0.5, rngs=nnx.Rngs(dropout=1)), x).sum()

    x = jnp.arange(32.0)
    assert float(jax.value_and_grad(jax.jit(loss))(x)[0]) == float(loss(x))


def test_nnx_own_transform_does_not_run_in_the_coming_mode(mode):
    rule = nnx_own(lambda mdl, x: mdl(x), lambda mdl, x: (mdl(x), None), lambda residuals, bars: (bars[0][0], bars[1]))
    error = pytest.raises(TypeError, match="'NodeStates' object is not callable")
    with contextlib.nullcontext() if mode == "today" else error:
        rule(nnx.Linear(2, 1, rngs=nnx.Rngs(0)), X)


def test_equinox_takes_two_modules_and_keywords(today):
    @eqx.filter_custom_vjp
    def fn(mdls, x, *, scale):
        return mdls[1](mdls[0](x)) * scale

    @fn.def_fwd
    def forward(perturbed, mdls, x, *, scale):
        del perturbed
        return fn(mdls, x, scale=scale), None

    @fn.def_bwd
    def backward(residuals, y_bar, perturbed, mdls, x, *, scale):
        del residuals, y_bar, perturbed, x, scale
        return eqx.filter(mdls, eqx.is_inexact_array)

    layers = eqx.nn.Linear(2, 2, key=KEY), eqx.nn.Linear(2, 2, key=jax.random.key(1))
    bar = eqx.filter_grad(lambda layers: fn(layers, X, scale=2.0).sum())(layers)
    np.testing.assert_array_equal(bar[0].weight, layers[0].weight)
    with pytest.raises(Exception, match="cannot be autodifferentiated"):
        jax.grad(lambda x: fn(layers, x, scale=2.0).sum())(X)


def test_equinox_own_transform_does_not_run_in_the_coming_mode(mode):
    def run(mdl):
        rule = eqx.filter_custom_vjp(lambda mdl, x: mdl(x))
        rule.def_fwd(lambda perturbed, mdl, x: (mdl(x), None))
        rule.def_bwd(lambda residuals, y_bar, perturbed, mdl, x: eqx.filter(mdl, eqx.is_inexact_array))
        rule(mdl, X)

    error = pytest.raises(ValueError, match="Non-hashable static arguments")
    with contextlib.nullcontext() if mode == "today" else error:
        run(eqx.nn.Linear(2, 1, key=KEY))
