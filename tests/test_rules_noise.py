"""Rules that draw: their means and spreads over many keys, and that a draw is the same wherever JAX runs it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from twins import dense

import crossvjp as cv
from crossvjp import rules

KEYS = jax.random.split(jax.random.key(2), 4)
PARAMS = {"w": jax.random.normal(KEYS[0], (3, 2)), "b": jax.random.normal(KEYS[1], (2,))}
X = jax.random.normal(KEYS[2], (4, 3))
C = jax.random.normal(KEYS[3], (4, 2))
MANY = 4000


def bars(rule, key, c=C):
    return jax.vjp(rule.lift(dense, key=key), PARAMS, X)[1](c)


def own_bars():
    return jax.vjp(dense, PARAMS, X)[1](C)


def many(rule, c=C):
    """Gives the cotangents for many keys, with the draw's axis in front."""
    return jax.jit(jax.vmap(lambda key: bars(rule, key, c)))(jax.random.split(jax.random.key(7), MANY))


def assert_mean(draws, expected):
    """Five standard errors: one entry in a million is further by chance, and the keys are fixed."""
    error = 5 * np.std(draws, axis=0) / np.sqrt(MANY) + 1e-5
    assert np.all(np.abs(np.mean(draws, axis=0) - expected) < error)


@pytest.mark.parametrize(("step", "sigma"), [(0.0, 1.0), (15.0, 16.0**-0.25)])
def test_noise_has_the_mean_and_the_variance_of_the_schedule(step, sigma):
    draws, x_draws = many(rules.GradientNoise(eta=1.0, step=step, gamma=0.5))
    own, own_x_bar = own_bars()
    for name, leaf in own.items():
        assert_mean(draws[name], leaf)
        # The standard deviation of a normal sample is known to 1 / sqrt(2 MANY), about 1 %.
        np.testing.assert_allclose(np.std(draws[name], axis=0), sigma, rtol=0.06)
    np.testing.assert_allclose(x_draws[0], own_x_bar, rtol=1e-5, atol=1e-6)  # compiled, the one of them


def test_each_parameter_gets_noise_of_its_own():
    draws, _ = many(rules.GradientNoise(eta=1.0))
    flat = np.concatenate([draws["w"].reshape(MANY, -1), draws["b"]], axis=1)
    off_diagonal = np.corrcoef(flat.T) - np.eye(flat.shape[1])
    assert np.max(np.abs(off_diagonal)) < 0.1  # the spread of a correlation of nothing is 1 / sqrt(MANY), 0.016


def test_keeping_by_chance_is_right_in_the_mean():
    draws, x_draws = many(rules.KeepWithProbability(0.25))
    own, own_x_bar = own_bars()
    assert_mean(draws["w"], own["w"])
    assert_mean(x_draws, own_x_bar)


def test_what_is_kept_by_chance_is_made_larger():
    draws, _ = many(rules.KeepWithProbability(0.25), jnp.zeros_like(C).at[0, 0].set(3.0))
    kept = draws["b"][:, 0]
    assert set(np.unique(kept).tolist()) == {0.0, 12.0}
    assert abs(np.mean(kept > 0) - 0.25) < 5 * np.sqrt(0.25 * 0.75 / MANY)


def test_keeping_all_is_the_modules_own_gradient():
    jax.tree.map(np.testing.assert_array_equal, bars(rules.KeepWithProbability(1.0), KEYS[0]), own_bars())


def rounded(c, mantissa_bits=7):
    """Gives what one output's cotangent becomes, for many keys."""
    rule = rules.StochasticRounding(mantissa_bits)
    identity = lambda key: jax.vjp(rule(lambda x: x, key=key), jnp.float32(0.0))[1](c)[0]
    return np.asarray(jax.jit(jax.vmap(identity))(jax.random.split(jax.random.key(7), MANY)))


@pytest.mark.parametrize("c", [1 + 1 / 512, -(1 + 3 / 512), np.pi * 1e-30, -1e30])
def test_a_cotangent_is_rounded_to_one_of_its_two_neighbours_in_bfloat16(c):
    c = jnp.float32(c)
    draws = rounded(c)
    towards = lambda limit: float(jnp.nextafter(nearest, jnp.bfloat16(limit)))
    nearest = c.astype(jnp.bfloat16)
    below, above = (float(nearest), towards(np.inf)) if nearest < c else (towards(-np.inf), float(nearest))
    assert set(np.unique(draws).tolist()) == {below, above}
    chance = (float(c) - below) / (above - below)
    assert abs(np.mean(draws == above) - chance) < 5 * np.sqrt(chance * (1 - chance) / MANY)


@pytest.mark.parametrize("c", [0.0, 1.0, -0.5, 384.0, np.inf, -np.inf])
def test_what_bfloat16_has_stays_as_it_is(c):
    np.testing.assert_array_equal(rounded(jnp.float32(c)), c)


def test_what_is_not_a_number_stays_none():
    for bits in (0x7FC00000, 0x7FFFFFFF):  # the second would overflow into the sign
        assert np.all(np.isnan(rounded(jax.lax.bitcast_convert_type(jnp.uint32(bits), jnp.float32))))


def test_the_number_of_bits_may_be_another():
    assert set(np.unique(rounded(jnp.float32(1.3), 1)).tolist()) == {1.0, 1.5}


RULES = [rules.GradientNoise(), rules.KeepWithProbability(), rules.StochasticRounding()]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_a_draw_is_the_same_wherever_it_runs(rule):
    expected = bars(rule, KEYS[0])
    lifted = rule.lift(dense, key=KEYS[0])
    ways = [lifted, jax.jit(lifted), jax.checkpoint(lifted)]
    for found in [jax.vjp(way, PARAMS, X)[1](C) for way in ways] + [jax.jit(lambda key: bars(rule, key))(KEYS[0])]:
        jax.tree.map(lambda f, e: np.testing.assert_allclose(f, e, rtol=1e-5, atol=1e-6), found, expected)  # compiled
    other, _ = bars(rule, KEYS[1])
    assert not np.allclose(other["w"], expected[0]["w"], rtol=1e-4)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_a_call_without_a_key_is_an_error(rule):
    with pytest.raises(cv.ArgumentError, match=r"draws random numbers, but the call has no key"):
        bars(rule, None)


@pytest.mark.parametrize("rule", [rules.KeepWithProbability(), rules.StochasticRounding()], ids=str)
def test_complex_and_unused_outputs_pass(rule):
    fn = lambda p, x: (dense(p, x), jnp.argmax(x, -1), dense(p, x) * (1 + 2j))
    loss = lambda fn: lambda p: jnp.sum(fn(p, X)[2].real)
    grads = jax.grad(loss(rule.lift(fn, key=KEYS[0])))(PARAMS)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(grads))
    assert np.any(grads["w"])


@pytest.mark.parametrize("probability", [0.0, -0.1, 1.5])
def test_a_probability_outside_of_its_range_is_an_error(probability):
    with pytest.raises(cv.ArgumentError, match="`probability` of KeepWithProbability must be"):
        rules.KeepWithProbability(probability)


@pytest.mark.parametrize("mantissa_bits", [-1, 23])
def test_a_number_of_bits_outside_of_its_range_is_an_error(mantissa_bits):
    with pytest.raises(cv.ArgumentError, match="`mantissa_bits` must be 0 to 22"):
        rules.StochasticRounding(mantissa_bits)


@pytest.mark.parametrize("name", ["eta", "step", "gamma"])
def test_a_negative_schedule_is_an_error(name):
    with pytest.raises(cv.ArgumentError, match=f"`{name}` of GradientNoise must be >= 0"):
        rules.GradientNoise(**{name: -1.0})
