"""Rules that multiply, round or guard cotangents, against optax, closed forms and what they are for."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hosts import HOSTS, Host, kernel_and_bias, the_input
from twins import dense

import crossvjp as cv
from crossvjp import rules

KEYS = jax.random.split(jax.random.key(0), 4)
PARAMS = {"w": jax.random.normal(KEYS[0], (3, 2)), "b": jax.random.normal(KEYS[1], (2,))}
X = jax.random.normal(KEYS[2], (4, 3))
C = jax.random.normal(KEYS[3], (4, 2))


def bars(rule, c=C, params=PARAMS):
    """Gives the cotangents of the dense layer's parameters and input."""
    return jax.vjp(rule.lift(dense), params, X)[1](c)


def own_bars(c=C):
    return jax.vjp(dense, PARAMS, X)[1](c)


def assert_equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def assert_close(found, expected):
    jax.tree.map(lambda f, e: np.testing.assert_allclose(f, e, rtol=1e-6), found, expected)  # float32


def test_signs_are_those_of_optax():
    expected, _ = optax.scale_by_sign().update(own_bars()[0], optax.EmptyState())
    assert_equal(bars(rules.SignGradient())[0], expected)
    assert_equal(bars(rules.SignGradient())[1], own_bars()[1])


def test_factors_by_path_are_those_of_multi_transform():
    tx = optax.multi_transform({"w": optax.scale(3.0), "b": optax.scale(0.5)}, {"w": "w", "b": "b"})
    expected, _ = tx.update(own_bars()[0], tx.init(PARAMS))
    assert_equal(bars(rules.ScaleGradient({"w": 3.0, "b": 0.5}))[0], expected)


def test_a_factor_of_zero_for_inputs_stops_the_gradient_there():
    params_bar, x_bar = bars(rules.ScaleGradient(inputs=0.0))
    assert_equal(params_bar, own_bars()[0])
    assert not np.any(x_bar)


def test_factors_may_be_traced():
    jitted = jax.jit(lambda factor: bars(rules.ScaleGradient({"w": factor}))[0])
    assert_close(jitted(2.0), {"w": 2.0 * own_bars()[0]["w"], "b": own_bars()[0]["b"]})


def test_a_factor_is_not_rounded_to_the_gradients_dtype():
    w = jnp.full(3, 2.0, jnp.bfloat16)
    grads = jax.grad(rules.ScaleGradient(1 + 1 / 256).lift(lambda w: jnp.sum(3 * w).astype(jnp.float32)))(w)
    assert grads.dtype == jnp.bfloat16
    np.testing.assert_array_equal(grads.astype(jnp.float32), 3 + 1 / 64)  # 3.0117 to the nearest; the factor is 1 there


@pytest.mark.parametrize("rule", [rules.Freeze("kernel"), rules.ScaleGradient({"kernel*": 2.0})], ids=str)
def test_a_path_that_no_variable_has_is_an_error(rule):
    with pytest.raises(cv.ArgumentError, match=r"chooses 'kernel\*?', but no variable .* Its paths are 'b', 'w'"):
        bars(rule)


@pytest.fixture(params=sorted(HOSTS))
def host(request: pytest.FixtureRequest) -> Host:
    """Each kind of handle in turn."""
    return HOSTS[request.param]


@pytest.mark.parametrize("where", [["b", "bias"], "b*", "*/b*"], ids=["names", "glob", "glob below"])
def test_a_frozen_bias_gets_no_gradient_in_any_framework(host, where):
    def kernel_and_bias_bars(wrap):
        loss = lambda params: host.run(params, lambda mdl, x: wrap(mdl)(x).sum(), the_input())
        return kernel_and_bias(jax.grad(loss)(host.params))

    kernel_bar, bias_bar = kernel_and_bias_bars(rules.Freeze(where))
    own_kernel_bar, own_bias_bar = kernel_and_bias_bars(lambda mdl: mdl)
    assert np.any(own_bias_bar)
    assert not np.any(bias_bar)
    assert_equal(kernel_bar, own_kernel_bar)


def test_the_box_around_an_array_is_no_part_of_its_path():
    loss = lambda mdl, word: rules.Freeze(word)(mdl)(the_input()).sum()
    grads = nnx.grad(loss)(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), "kernel")
    assert not np.any(grads["kernel"][...])
    assert np.any(grads["bias"][...])
    with pytest.raises(cv.ArgumentError, match="Its paths are 'bias', 'kernel'"):
        nnx.grad(loss)(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), "value")


def test_freezing_nothing_nameable_is_an_error():
    with pytest.raises(cv.ArgumentError, match="chosen by name, path glob, regex or predicate, but not by 3"):
        bars(rules.Freeze(3))


def test_what_is_chosen_can_be_said_by_a_predicate_of_path_and_leaf():
    params_bar, _ = bars(rules.Freeze(lambda path, leaf: path == ("w",) and leaf.ndim == 2))
    assert not np.any(params_bar["w"])
    assert np.any(params_bar["b"])


def features(p, x):
    return jnp.tanh(x @ p["features"])


def domain(p, h):
    return jnp.sum(jax.nn.softplus(h @ p["domain"]))


def test_features_under_a_reversed_classifier_descend_the_adversarial_loss():
    """The two gradients of Ganin's saddle point, each of a loss written out."""
    p = {"features": PARAMS["w"], "domain": jnp.array([1.0, -2.0])}
    labels = lambda p: jnp.sum(jnp.sin(features(p, X)))
    domains = lambda p: domain(p, features(p, X))

    def loss(p):
        return labels(p) + rules.GradientReversal(0.3).lift(domain)({"domain": p["domain"]}, features(p, X))

    found = jax.grad(loss)(p)
    saddle = lambda p: labels(p) - 0.3 * domains(p)
    np.testing.assert_allclose(found["features"], jax.grad(saddle)(p)["features"], rtol=1e-5)  # float32, other order
    np.testing.assert_allclose(found["domain"], jax.grad(domains)(p)["domain"], rtol=1e-6)


def test_a_reversed_input_by_keyword_is_reversed_too():
    lifted = rules.GradientReversal(2.0).lift(lambda p, *, x: jnp.sum(p * x))
    assert float(jax.grad(lambda x: lifted(jnp.float32(3.0), x=x))(jnp.float32(1.0))) == -6.0


@pytest.mark.parametrize("progress", [0.0, 0.05, 0.5, 1.0])
def test_the_strength_is_a_hyperbolic_tangent(progress):
    # 2 / (1 + exp(-a)) - 1 = tanh(a / 2)
    np.testing.assert_allclose(rules.reversal_strength(progress), np.tanh(5 * progress), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(rules.reversal_strength(progress, 2.0), np.tanh(progress), rtol=1e-5, atol=1e-7)


def test_a_strength_may_follow_a_schedule_inside_scan():
    def step(carry, progress):
        return carry, bars(rules.GradientReversal(rules.reversal_strength(progress)))[1]

    _, found = jax.lax.scan(step, 0, jnp.array([0.0, 1.0]))
    assert not np.any(found[0])
    np.testing.assert_allclose(found[1], -np.tanh(5.0) * own_bars()[1], rtol=1e-5)


def test_cotangents_are_rounded_as_reduce_precision_rounds():
    expected = own_bars(jax.lax.reduce_precision(C, exponent_bits=8, mantissa_bits=7))
    assert_equal(bars(rules.CastCotangents(jnp.bfloat16)), expected)
    assert np.any(expected[1] != own_bars()[1])


def test_beyond_the_range_of_a_dtype_a_cotangent_is_infinite():
    assert np.isinf(bars(rules.CastCotangents(jnp.float16), C.at[0, 0].set(1e6))[0]["b"][0])


def test_a_dtype_that_is_no_real_float_is_an_error():
    with pytest.raises(cv.ArgumentError, match=r"`dtype` must be a real floating dtype, but is .*int32"):
        rules.CastCotangents(jnp.int32)


@pytest.mark.parametrize("scale", [2.0**-8, 2.0**20])
def test_scaling_by_a_power_of_two_leaves_every_bit(scale):
    assert_equal(bars(rules.LossScaling(scale)), own_bars())


def in_half(p, x):
    """A layer that computes in float16, on parameters of float32."""
    return (x.astype(jnp.float16) @ p["w"].astype(jnp.float16)).astype(jnp.float32)


def test_scaling_saves_what_float16_loses():
    grads = lambda fn: jax.vjp(fn, PARAMS, X)[1](C * 1e-9)[0]["w"]
    exact = grads(lambda p, x: x @ p["w"])
    assert not np.any(grads(in_half))  # all below float16's range
    found = grads(rules.LossScaling(2.0**30).lift(in_half))
    np.testing.assert_allclose(found, exact, rtol=0, atol=4e-3 * np.max(np.abs(exact)))  # float16 has 11 bits


@pytest.mark.parametrize("scale", [0.0, -1.0])
def test_a_scale_that_is_not_positive_is_an_error(scale):
    with pytest.raises(cv.ArgumentError, match="scale"):
        rules.LossScaling(scale)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_one_bad_number_costs_only_the_gradients_that_it_reaches(bad):
    params_bar, x_bar = bars(rules.ZeroNonFinite(), C.at[1, 0].set(bad))
    own, own_x_bar = own_bars(C.at[1, 0].set(bad))
    assert_equal(params_bar["w"][:, 0], jnp.zeros(3))
    assert_equal(params_bar["w"][:, 1], own["w"][:, 1])
    assert_equal(params_bar["b"], own["b"].at[0].set(0.0))
    assert_equal(x_bar, own_x_bar)
    assert not np.all(np.isfinite(x_bar))


def test_what_is_not_a_number_is_zeroed_as_by_optax():
    c = C.at[1, 0].set(jnp.nan)
    tx = optax.zero_nans()
    expected, _ = tx.update(own_bars(c)[0], tx.init(PARAMS))
    assert_equal(bars(rules.ZeroNonFinite(), c)[0], expected)


def test_guarding_the_output_keeps_the_rest_of_the_batch():
    found = bars(rules.ZeroNonFinite("output"), C.at[1, 0].set(jnp.nan))
    assert_equal(found, own_bars(C.at[1, 0].set(0.0)))


@pytest.mark.parametrize(("on", "count"), [("variables", 4.0), ("output", 1.0)])
def test_bad_numbers_are_counted(on, count):
    def run(rule, c):
        return jax.vjp(lambda rule: rule.lift(dense)(PARAMS, X), rule)[1](c)[0]

    rule = rules.ZeroNonFinite(on, cv.Sum(()))
    seen = run(rule, C.at[1, 0].set(jnp.inf)).zeroed
    assert (float(seen.value), float(seen.count)) == (count, 1.0)
    assert float(run(rule, C).zeroed.value) == 0.0


def test_guarding_another_place_is_an_error():
    with pytest.raises(cv.ArgumentError, match="`on` must be 'variables' or 'output', but is 'inputs'"):
        rules.ZeroNonFinite("inputs")


def two_outputs(p, x):
    y = dense(p, x)
    return y, jnp.argmax(y, axis=-1), 2.0 * y


@pytest.mark.parametrize(
    "rule",
    [rules.CastCotangents(jnp.bfloat16), rules.LossScaling(8.0), rules.ZeroNonFinite("output")],
    ids=lambda rule: type(rule).__name__,
)
@pytest.mark.parametrize("optimize_remat", [False, True])  # with it, JAX has no symbolic zeros
def test_outputs_that_are_whole_numbers_or_unused_get_no_cotangent(rule, optimize_remat):
    loss = lambda fn: lambda p: jnp.sum(fn(p, X)[2])
    lifted = rule.lift(two_outputs, optimize_remat=optimize_remat)
    found, expected = (jax.grad(loss(fn))(PARAMS) for fn in (lifted, two_outputs))
    assert_equal(found, expected)
