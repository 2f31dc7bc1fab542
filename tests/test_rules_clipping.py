"""Rules that bound or centre cotangents, against optax."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hosts import HOSTS, kernel_and_bias, the_input
from optax import contrib
from twins import dense

import crossvjp as cv
from crossvjp import rules

KEYS = jax.random.split(jax.random.key(1), 4)
PARAMS = {"w": jax.random.normal(KEYS[0], (3, 2)), "b": jnp.array([1e-4, 0.0])}
X = jax.random.normal(KEYS[2], (4, 3))
C = jax.random.normal(KEYS[3], (4, 2))


def bars(fn: Any, params: Any = PARAMS, c: Any = C) -> Any:
    return jax.vjp(fn, params, X)[1](c)


def update(tx: Any, grads: Any, params: Any = None) -> Any:
    """Gives what a transformation of optax makes of gradients in its first step."""
    return tx.update(grads, tx.init(grads if params is None else params), params)[0]


def assert_close(found, expected):
    jax.tree.map(lambda f, e: np.testing.assert_allclose(f, e, rtol=2e-6, atol=1e-7), found, expected)  # float32


def assert_differ(found, other):
    assert any(not np.array_equal(f, o) for f, o in zip(jax.tree.leaves(found), jax.tree.leaves(other), strict=True))


PAIRS = {
    "value": (rules.ClipByValue(0.4), optax.clip(0.4)),
    "norm": (rules.ClipByNorm(0.5), optax.clip_by_global_norm(0.5)),
    "unit-wise": (rules.AdaptiveGradientClipping(0.9), optax.adaptive_grad_clip(0.9)),
    "unit-wise, by eps": (rules.AdaptiveGradientClipping(0.01, 2.0), optax.adaptive_grad_clip(0.01, 2.0)),
    "unit-wise, rows": (rules.AdaptiveGradientClipping(0.9, unit_axis=0), optax.adaptive_grad_clip(0.9, axis=1)),
    "centred, rows": (rules.Centralize(unit_axis=0), optax.centralize()),
}


@pytest.mark.parametrize("name", PAIRS)
def test_the_variables_get_what_optax_gives(name):
    rule, tx = PAIRS[name]
    params = {"w": PARAMS["w"]} if name == "unit-wise, rows" else PARAMS  # optax's axis is for all leaves
    fn = dense if "b" in params else lambda p, x: x @ p["w"]
    found, x_bar = bars(rule.lift(fn), params)
    own, own_x_bar = bars(fn, params)
    assert_close(found, update(tx, own, params))
    assert_differ(found, own)
    np.testing.assert_array_equal(x_bar, own_x_bar)


def test_the_units_of_a_kernel_are_centred_over_its_inputs():
    found, _ = bars(rules.Centralize().lift(dense))
    own, _ = bars(dense)
    expected = update(optax.centralize(), own["w"].T).T
    np.testing.assert_allclose(found["w"], expected, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(found["b"], own["b"])


def conv(p, x):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, p["w"], (1, 1), "SAME", dimension_numbers=numbers)


@pytest.mark.parametrize("clipping", [0.5, 30.0])
def test_the_units_of_a_convolution_are_its_output_channels(clipping):
    params = {"w": jax.random.normal(KEYS[0], (3, 3, 2, 4))}
    x = jax.random.normal(KEYS[1], (2, 5, 5, 2))
    loss = lambda fn: lambda p: jnp.sum(jnp.sin(fn(p, x)))
    expected = update(optax.adaptive_grad_clip(clipping), jax.grad(loss(conv))(params), params)
    found = jax.grad(loss(rules.AdaptiveGradientClipping(clipping).lift(conv)))(params)
    np.testing.assert_allclose(found["w"], expected["w"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [rules.AdaptiveGradientClipping, rules.Centralize], ids=lambda make: make.__name__)
def test_kernels_that_start_with_the_outputs_have_their_units_on_axis_0(make):
    def kernel_bar(name, rule):
        host = HOSTS[name]
        loss = lambda params: host.run(params, lambda mdl, x: jnp.sum(jnp.sin(rule(mdl)(x))), the_input())
        return kernel_and_bias(jax.grad(loss)(params_of(host)))[0]

    def params_of(host):
        kernel = jnp.arange(1.0, 7.0).reshape(2, 3) / 10
        kernel = kernel.T if host.name == "equinox" else kernel
        return jax.tree.map(lambda leaf: kernel if leaf.ndim == 2 else jnp.ones(3), host.params)

    found = kernel_bar("equinox", make(unit_axis=0))
    np.testing.assert_allclose(found.T, kernel_bar("linen compact", make()), rtol=1e-6, atol=1e-7)


def test_a_gradient_within_the_norm_stays_as_it_is():
    jax.tree.map(np.testing.assert_array_equal, bars(rules.ClipByNorm(1e3).lift(dense)), bars(dense))


def test_the_clipped_norm_is_the_norm_of_all_outputs_together():
    fn = lambda p, x: {"a": dense(p, x), "b": x @ p["w"]}
    c = {"a": C, "b": 2 * C}
    assert_close(bars(rules.ClipOutputNorm(0.5).lift(fn), c=c), bars(fn, c=update(optax.clip_by_global_norm(0.5), c)))


def test_only_outputs_that_are_used_count_in_the_norm():
    fn = lambda p, x: (dense(p, x), jnp.argmax(x, -1), x @ p["w"])
    loss = lambda fn, c: lambda p: jnp.sum(fn(p, X)[0] * c)
    clipped = update(optax.clip_by_global_norm(0.5), C)
    assert_close(jax.grad(loss(rules.ClipOutputNorm(0.5).lift(fn), C))(PARAMS), jax.grad(loss(fn, clipped))(PARAMS))


def test_clipping_each_lane_of_vmap_is_the_clipping_of_dp_sgd():
    one = lambda fn: lambda x, c: jax.grad(lambda p: jnp.sum(fn(p, x) * c))(PARAMS)
    tx = contrib.differentially_private_aggregate(0.7, noise_multiplier=0.0, key=0)
    expected = update(tx, jax.vmap(one(dense))(X, C), PARAMS)
    found = jax.vmap(one(rules.ClipByNorm(0.7).lift(dense)))(X, C)
    assert_close(jax.tree.map(lambda leaf: jnp.mean(leaf, 0), found), expected)
    whole, _ = bars(rules.ClipByNorm(0.7).lift(dense))
    assert not np.allclose(whole["w"] / 4, expected["w"], rtol=0.1)  # the clipped sum is another thing


RULES = [rules.ClipByValue(), rules.ClipByNorm(), rules.ClipOutputNorm(), rules.AdaptiveGradientClipping()]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_a_gradient_of_zero_stays_zero(rule):
    for leaf in jax.tree.leaves(bars(rule.lift(dense), c=jnp.zeros_like(C))):
        np.testing.assert_array_equal(leaf, jnp.zeros_like(leaf))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_a_bound_may_be_traced(rule):
    name = next(iter(rule.data_fields()))
    make = lambda bound: type(rule)(**{name: bound})
    found = jax.jit(lambda bound: bars(make(bound).lift(dense)))(0.3)
    assert_close(found, bars(make(0.3).lift(dense)))
    assert_differ(found, bars(make(0.2).lift(dense)))


def test_a_norm_in_bfloat16_is_summed_in_float32():
    w = jnp.ones(2**16, jnp.bfloat16)  # a sum in bfloat16 would stop at 256
    found = jax.grad(lambda w: rules.ClipByNorm(1.0).lift(lambda w: jnp.sum(w))(w).astype(jnp.float32))(w)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, jnp.full_like(w, 1 / 256))


def test_complex_gradients_are_clipped_by_their_modulus():
    w = jnp.array([3.0 + 4.0j, 0.0])
    grads = jax.grad(lambda w: rules.ClipByNorm(1.0).lift(lambda w: jnp.sum(w.real * 3.0 - w.imag * 4.0))(w))(w)
    np.testing.assert_allclose(jnp.linalg.norm(grads), 1.0, rtol=1e-6)
    np.testing.assert_allclose(grads[0] / grads[0].real, 1 + 4 / 3 * 1j, rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (rules.ClipByValue, "limit"),
        (rules.ClipByNorm, "max_norm"),
        (rules.ClipOutputNorm, "max_norm"),
        (rules.AdaptiveGradientClipping, "clipping"),
        (rules.AdaptiveGradientClipping, "eps"),
    ],
)
def test_a_negative_bound_is_an_error(make, name):
    with pytest.raises(cv.ArgumentError, match=name):
        make(**{name: -0.1})


@pytest.mark.parametrize(
    ("rule", "match"),
    [
        (rules.ClipByValue(jnp.ones(2)), r"`limit` of ClipByValue must be a scalar, but has the shape \[2\]"),
        (rules.ClipByNorm(jnp.ones(2)), r"multiplied by a scalar, but here by an array of shape \(2,\)"),
        (rules.AdaptiveGradientClipping(eps=jnp.ones(2)), "`eps` of AdaptiveGradientClipping must be a scalar"),
        (rules.KeepWithProbability(jnp.full(2, 0.5)), "`probability` of KeepWithProbability must be a scalar"),
        (rules.LossScaling(jnp.ones(2)), "multiplied by a scalar"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_number_that_is_an_array_is_an_error_though_it_would_broadcast(rule, match):
    with pytest.raises(cv.ArgumentError, match=match):
        bars(rule.lift(dense, key=KEYS[0]))


def test_a_stack_of_rules_is_taken_apart_by_vmap():
    found = jax.vmap(lambda rule: bars(rule.lift(dense))[0]["w"])(rules.ClipByNorm(jnp.array([0.5, 1e3])))
    np.testing.assert_allclose(found[0], bars(rules.ClipByNorm(0.5).lift(dense))[0]["w"], rtol=1e-5)  # compiled
    np.testing.assert_allclose(found[1], bars(dense)[0]["w"], rtol=1e-6)


def test_clipping_variables_of_a_module_without_any_is_an_error():
    with pytest.raises(cv.ArgumentError, match="acts on variables, but the module has none"):
        jax.grad(lambda x: rules.ClipByNorm()(jnp.sin)(x))(1.0)
