"""The straight-through estimators against autodiff of what they stand for, and exact enumeration."""

from __future__ import annotations

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hosts import HOSTS

import crossvjp as cv
from crossvjp.rules import HardSigmoidSTE, RoundSTE, SignSTE, XNORWeights
from crossvjp.testing import assert_close, assert_same_bits

X = jnp.array([-3.4, -1.2, -0.6, 0.3, 0.8, 2.6])
C = jnp.array([1.0, -2.0, 0.5, 3.0, -0.7, 1.1])


def pulled(function, x=X, c=C):
    return jax.vjp(function, x)[1](c)[0]


def test_the_forward_pass_is_exact_where_the_idiom_with_stop_gradient_is_not():
    function = lambda x: jnp.clip(jnp.round(10 * x) / 10, -0.9, 0.9)
    x = jax.random.normal(jax.random.key(0), (1000,)) * 100
    idiom = x + jax.lax.stop_gradient(function(x) - x)
    assert jnp.any(idiom != function(x))
    y, pullback = jax.vjp(RoundSTE()(function), x)
    assert_same_bits(y, function(x))
    assert_same_bits(pullback(x)[0], x)  # as if it were the identity


@pytest.mark.parametrize("limit", [1.0, 0.5])
def test_the_sign_has_the_gradient_of_the_hard_tanh(limit):
    assert_same_bits(pulled(SignSTE(limit)(jnp.sign)), pulled(lambda x: jnp.clip(x, -limit, limit)))


def test_a_sign_without_a_limit_passes_all():
    assert_same_bits(pulled(SignSTE(jnp.inf)(jnp.sign)), C)


@pytest.mark.parametrize("seed", range(3))
def test_a_stochastic_neuron_has_the_gradient_of_its_mean_whatever_it_draws(seed):
    chance = lambda x: jnp.clip((x + 1) / 2, 0, 1)
    draw = lambda x: jax.random.bernoulli(jax.random.key(seed), chance(x)).astype(x.dtype)
    assert_same_bits(pulled(HardSigmoidSTE()(draw)), pulled(chance))


def test_the_binary_filter_is_the_nearest_of_all():
    filter_ = np.array([0.3, -1.4, 0.8, -0.1, 2.0], np.float32)
    found = XNORWeights().lift(lambda p: p["w"])({"w": filter_[:, None]})[:, 0]
    signs = np.array(list(itertools.product([-1, 1], repeat=5)))
    scales = signs @ filter_ / 5  # the best for each choice of signs
    distances = np.sum((filter_ - scales[:, None] * signs) ** 2, 1)
    assert float(np.sum((filter_ - found) ** 2)) == pytest.approx(distances.min(), rel=1e-6)


def derived(run, params, x):
    """Gives the value and all gradients of a loss behind a network."""
    return jax.jit(jax.value_and_grad(lambda params, x: jnp.sum(jnp.cos(run(params, x))), argnums=(0, 1)))(params, x)


def test_binary_weights_have_the_gradient_of_their_detached_form():
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"first": 1.5 * jax.random.normal(keys[0], (3, 4)), "bias": jnp.ones(4)}
    params["second"] = jax.random.normal(keys[1], (4, 2))
    x = jax.random.normal(keys[2], (5, 3))

    def net(params, x):
        return jnp.tanh(x @ params["first"] + params["bias"]) @ params["second"]

    def detached(w):
        if w.ndim < 2:
            return w
        alpha = jax.lax.stop_gradient(jnp.mean(jnp.abs(w), 0))
        slope = w / w.shape[0] + alpha * jnp.clip(w, -1, 1)
        return slope + jax.lax.stop_gradient(alpha * jnp.sign(w) - slope)

    found = derived(XNORWeights().lift(net), params, x)
    assert_close(found, derived(lambda params, x: net(jax.tree.map(detached, params), x), params, x))
    assert any(bool(jnp.any(jnp.abs(w) > 1)) for w in jax.tree.leaves(params))  # both sides of the limit occur


def test_the_filters_of_frameworks_lie_along_the_axes_that_the_documentation_names():
    kernel, c = jnp.array([[0.4, -1.3, 0.2], [-0.2, 0.5, 1.7]]), jnp.array([1.0, -0.5, 2.0])
    x = jnp.array([1.0, -2.0])

    def kernel_bar(host, unit_axis):
        turned = lambda leaf: kernel if leaf.shape == kernel.shape else kernel.T if leaf.ndim == 2 else leaf
        params = jax.tree.map(turned, HOSTS[host].params)
        use = lambda mdl, x: XNORWeights(unit_axis=unit_axis)(mdl)(x)
        grads = jax.grad(lambda params: HOSTS[host].run(params, use, x) @ c)(params)
        return next(leaf for leaf in jax.tree.leaves(grads) if leaf.ndim == 2)

    expected = kernel_bar("linen compact", -1)
    assert_close(kernel_bar("nnx graph", -1), expected)
    assert_close(kernel_bar("haiku module", -1), expected)
    assert_close(kernel_bar("equinox", 0), expected.T)
    assert not np.allclose(kernel_bar("equinox", -1), expected.T)


def test_a_module_whose_gradient_would_be_lost_is_refused():
    layer = eqx.nn.Linear(2, 2, key=jax.random.key(0))
    with pytest.raises(cv.ArgumentError, match=r"SignSTE\(limit=1.0\) .* the module has variables, whose"):
        jax.grad(lambda x: SignSTE()(layer)(x).sum())(jnp.ones(2))


def test_two_inputs_are_refused():
    with pytest.raises(cv.ArgumentError, match="a function of one array, but the call has 2 in 2 inputs"):
        jax.grad(lambda x: RoundSTE()(lambda x, y: jnp.round(x + y))(x, x).sum())(X)


def test_a_module_without_kernels_is_refused():
    with pytest.raises(cv.ArgumentError, match=r"XNORWeights\(unit_axis=-1\) changes the kernels.*\(3,\)"):
        XNORWeights().lift(lambda p: p["b"])({"b": jnp.ones(3)})


def test_a_limit_of_zero_is_refused():
    with pytest.raises(cv.ArgumentError, match="limit"):
        SignSTE(0.0)
