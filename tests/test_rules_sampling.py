"""Rules for calls that draw: autodiff of the detached form, exact enumeration of all draws, means over many."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import crossvjp as cv
from crossvjp.rules import ReinMax, ScoreFunction, ShakeShake, StraightThroughGumbelSoftmax
from crossvjp.testing import assert_close, assert_same_bits

LOGITS = jnp.array([0.3, -0.8, 1.1])
KEYS = jax.random.split(jax.random.key(0), 20_000)


def identity(x):
    return x


def detached(key, logits, temperature):
    """The straight-through Gumbel softmax as it is usually written."""
    z = logits + jax.random.gumbel(key, logits.shape)
    soft = jax.nn.softmax(z / temperature)
    hard = jax.nn.one_hot(jnp.argmax(z, -1), z.shape[-1])
    return soft + jax.lax.stop_gradient(hard - soft)


def test_the_gumbel_softmax_is_its_detached_form():
    key, logits = jax.random.key(3), jax.random.normal(jax.random.key(4), (5, 4))
    c = jax.random.normal(jax.random.key(5), (5, 4))
    rule = lambda logits, tau: StraightThroughGumbelSoftmax(tau)(identity, key=key)(logits)
    y, pullback = jax.vjp(rule, logits, jnp.array(0.6))
    expected, expected_pullback = jax.vjp(lambda *args: detached(key, *args), logits, jnp.array(0.6))
    assert_close(y, expected)
    assert set(np.unique(np.asarray(y))) == {0.0, 1.0}
    assert_close(pullback(c), expected_pullback(c))


@pytest.mark.parametrize("rule", [StraightThroughGumbelSoftmax(0.5), ReinMax()], ids=["Gumbel softmax", "ReinMax"])
def test_draws_are_as_frequent_as_the_logits_say(rule):
    draws = jax.vmap(lambda key: rule(identity, key=key)(LOGITS))(KEYS)
    p = np.asarray(jax.nn.softmax(LOGITS))
    assert np.all(np.abs(np.asarray(draws.mean(0)) - p) < 5 * np.sqrt(p * (1 - p) / len(KEYS)))  # five standard errors


def mean_over_draws(rule, function):
    """Gives the mean of a rule's gradient over all categories, each with its exact probability."""

    def run(key):
        y, pullback = jax.vjp(rule(identity, key=key), LOGITS)
        return jnp.argmax(y), *pullback(jax.grad(function)(y))

    drawn, grads = jax.jit(jax.vmap(run))(KEYS[:100])
    assert set(np.asarray(drawn)) == set(range(LOGITS.size))
    return jax.nn.softmax(LOGITS) @ jnp.stack([grads[jnp.argmax(drawn == each)] for each in range(LOGITS.size)])


def gradient_of_the_mean(function):
    values = jnp.stack([function(y) for y in jnp.eye(LOGITS.size)])
    return jax.grad(lambda logits: jax.nn.softmax(logits) @ values)(LOGITS)


M = jnp.array([[1.0, -0.4, 0.3], [2.0, 0.5, -1.0], [0.2, 0.9, -2.0]])


def quadratic(y):
    return y @ M @ y + y @ jnp.array([0.5, -1.0, 2.0])


def cubic(y):
    return (y @ jnp.array([0.5, -1.0, 2.0])) ** 3


class PlainStraightThrough(cv.Rule):
    """Straight-through as it is without Heun's rule, of first order."""

    def forward(self, call):
        return ReinMax().forward(call)

    def backward(self, call, y_bar):
        return call.pullback(jax.vjp(jax.nn.softmax, call.inputs[0])[1](y_bar)[0])


def test_reinmax_is_exact_in_the_mean_for_quadratic_functions():
    assert_close(mean_over_draws(ReinMax(), quadratic), gradient_of_the_mean(quadratic))


def test_what_shows_that_reinmax_is_exact_shows_what_is_not():
    assert not np.allclose(mean_over_draws(ReinMax(), cubic), gradient_of_the_mean(cubic), rtol=0.05)
    first_order = mean_over_draws(PlainStraightThrough(), quadratic)
    assert not np.allclose(first_order, gradient_of_the_mean(quadratic), rtol=0.05)


PARAMS = {"w": jnp.array([[0.4, -1.3, 0.1], [-0.2, 0.6, 1.7]]), "penalty": jnp.array(0.7)}
X = jnp.array([[1.0, -2.0], [0.3, 0.7]])
COSTS = jnp.array([2.0, -1.0, 5.0])


def cost_and_score(p, x, action):
    cost = COSTS[action] + p["penalty"] * action * jnp.sum(x**2, -1)
    return cost, jnp.take_along_axis(jax.nn.log_softmax(x @ p["w"]), action[:, None], -1)[:, 0]


@pytest.mark.parametrize("baseline", [0.0, 3.5, np.array([1.0, -2.0], np.float32)], ids=["none", "one", "each"])
def test_the_score_function_is_exact_in_the_mean_over_all_actions(baseline):
    with_rule = ScoreFunction(baseline).lift(cost_and_score)

    def mean_cost(params, x):
        p = jax.nn.softmax(x @ params["w"])
        costs = [cost_and_score(params, x, jnp.full(2, action))[0] for action in range(3)]
        return jnp.sum(p * jnp.stack(costs, 1))

    actions = jnp.array(list(itertools.product(range(3), repeat=2)))
    p = jax.nn.softmax(X @ PARAMS["w"])
    weights = p[0, actions[:, 0]] * p[1, actions[:, 1]]
    grads = jax.vmap(jax.grad(lambda p, x, action: with_rule(p, x, action)[0].sum(), argnums=(0, 1)), (None, None, 0))
    found = jax.tree.map(lambda grad: jnp.tensordot(weights, grad, 1), jax.jit(grads)(PARAMS, X, actions))
    assert_close(found, jax.grad(mean_cost, argnums=(0, 1))(PARAMS, X))


def test_autodiff_alone_misses_the_score():
    plain = jax.grad(lambda params: cost_and_score(params, X, jnp.array([1, 2]))[0].sum())(PARAMS)
    ruled = jax.grad(lambda params: ScoreFunction().lift(cost_and_score)(params, X, jnp.array([1, 2]))[0].sum())(PARAMS)
    assert not jnp.any(plain["w"])
    assert jnp.all(ruled["w"] != 0)
    assert_close(ruled["penalty"], plain["penalty"])


def test_the_cost_may_be_a_black_box():
    def on_host(p, action):
        cost = jax.pure_callback(lambda a: np.float32(a) ** 2, jax.ShapeDtypeStruct((), jnp.float32), action)
        return jax.lax.stop_gradient(cost), jax.nn.log_softmax(p)[action]

    logits_bar = jax.grad(lambda p: ScoreFunction(1.0).lift(on_host)(p, jnp.array(2))[0])(LOGITS)
    assert_close(logits_bar, 3 * (jnp.array([0.0, 0.0, 1.0]) - jax.nn.softmax(LOGITS)))


@pytest.mark.parametrize(
    ("function", "came"),
    [(lambda x: x, "returns ArrayImpl|returns .*Tracer"), (lambda x: (x, x.sum()), r"shapes \[\(3,\), \(\)\]")],
    ids=["one array", "two shapes"],
)
def test_what_is_no_cost_with_its_score_is_refused(function, came):
    with pytest.raises(cv.ArgumentError, match=came):
        jax.grad(lambda x: jax.tree.leaves(ScoreFunction()(function)(x))[0].sum())(LOGITS)


def mean_of_two(a, b):
    return (a + b) / 2


def shaken(key, a, b):
    return ShakeShake()(mean_of_two, key=key)(a, b)


def test_branches_are_mixed_by_one_number_an_example_and_the_gradient_by_another():
    key, a, b = jax.random.key(1), *jax.random.normal(jax.random.key(2), (2, 4, 3, 2))
    ones, zeros = jnp.ones_like(a), jnp.zeros_like(a)
    alpha = shaken(key, ones, zeros)
    y, pullback = jax.vjp(lambda *ab: shaken(key, *ab), a, b)
    assert_close(y, alpha * a + (1 - alpha) * b)
    (beta, rest), (a_bar, b_bar) = pullback(ones), pullback(y)
    assert_close(beta + rest, ones)
    assert_close((a_bar, b_bar), (beta * y, (1 - beta) * y))
    for numbers in (alpha, beta):
        each = np.asarray(numbers).reshape(4, -1)
        assert np.ptp(each, axis=1).max() < 1e-6  # the same in all of an example, up to rounding of 1 - alpha
        assert len(np.unique(each[:, 0])) == 4
        assert 0 <= each.min() < each.max() < 1
    assert np.abs(np.asarray(alpha - beta)).min() > 1e-3


def test_the_mean_over_shakes_is_the_mean_of_the_branches():
    a, b, c = jnp.array([[2.0]]), jnp.array([[-1.0]]), jnp.array([[3.0]])

    def run(key):
        y, pullback = jax.vjp(lambda *ab: shaken(key, *ab), a, b)
        return y, *pullback(c)

    y, a_bar, b_bar = (np.asarray(each).mean() for each in jax.vmap(run)(KEYS))
    # Five standard errors of a mean of uniform numbers on an interval of length 3.
    tolerance = 5 * 3 / np.sqrt(12 * len(KEYS))
    np.testing.assert_allclose([y, a_bar, b_bar], [0.5, 1.5, 1.5], atol=tolerance)


def test_a_shake_is_the_same_under_remat():
    key, a = jax.random.key(1), jnp.arange(6.0).reshape(3, 2)
    run = lambda a: jnp.sum(jnp.sin(shaken(key, a, a**2)))
    assert_same_bits(jax.grad(jax.checkpoint(run))(a), jax.grad(run)(a))


def test_one_branch_is_refused():
    with pytest.raises(cv.ArgumentError, match="expects a function of two arrays, its branches, but got 1"):
        ShakeShake()(lambda a: a, key=jax.random.key(0))(jnp.ones((2, 2)))


def test_a_temperature_of_zero_is_refused():
    with pytest.raises(cv.ArgumentError, match="temperature"):
        StraightThroughGumbelSoftmax(0.0)
