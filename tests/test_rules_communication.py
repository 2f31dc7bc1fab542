"""Error feedback loses nothing over many steps."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import crossvjp as cv
from crossvjp.rules import TopKErrorFeedback

RNG = np.random.default_rng(0)
PARAMS = {"w": jnp.asarray(RNG.normal(size=(5, 3)), jnp.float32), "b": jnp.zeros(3)}
BATCHES = jnp.asarray(RNG.normal(size=(12, 4, 5)), jnp.float32)
SIZE = 18


def dense(p, x):
    return x @ p["w"] + p["b"]


def loss(y):
    return jnp.sum(jnp.tanh(y - 1) ** 2)


def flat(tree):
    return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def sent_and_errors(k: int, uses: int = 1):
    """Gives what each step sends, and the errors that are left after it; the parameters stay."""
    rule, found = TopKErrorFeedback(cv.Overwrite(jnp.zeros(SIZE)), k=k), []

    def total(params, rule, x):
        return sum(loss(rule.lift(dense)(params, x)) for _ in range(uses))

    for x in BATCHES:
        g, rule_bar = jax.grad(total, argnums=(0, 1))(PARAMS, rule, x)
        rule = TopKErrorFeedback(rule.error.settle(rule_bar.error), k=k)
        found.append((flat(g), rule.error.value))
    return found


def gradients():
    return [flat(jax.grad(lambda p, x=x: loss(dense(p, x)))(PARAMS)) for x in BATCHES]


@pytest.mark.parametrize("k", [1, 4, 17])
def test_what_was_sent_and_the_error_add_up_to_all_gradients(k):
    steps = sent_and_errors(k)
    total = jnp.cumsum(jnp.stack(gradients()), axis=0)
    sent = jnp.cumsum(jnp.stack([g for g, _ in steps]), axis=0)
    for step, (g, error) in enumerate(steps):
        assert int(jnp.sum(g != 0)) == k
        np.testing.assert_allclose(sent[step] + error, total[step], rtol=0, atol=1e-5)  # float32 sums of 12 steps


def test_the_entries_sent_are_the_largest():
    for g, error in sent_and_errors(4):
        assert float(jnp.min(jnp.abs(g[g != 0]))) >= float(jnp.max(jnp.abs(error)))


def test_all_entries_are_the_gradient_itself():
    for (g, error), own in zip(sent_and_errors(SIZE), gradients(), strict=True):
        np.testing.assert_array_equal(g, own)
        np.testing.assert_array_equal(error, jnp.zeros(SIZE))


def test_two_uses_leave_the_mean_of_their_errors():
    (g, error), (twice, error_twice) = sent_and_errors(4)[0], sent_and_errors(4, uses=2)[0]
    np.testing.assert_array_equal(twice, 2 * g)
    np.testing.assert_array_equal(error_twice, error)


@pytest.mark.parametrize(("k", "size"), [(4, 17), (19, 18)], ids=["another size", "too many"])
def test_what_does_not_fit_the_module_is_an_error(k, size):
    rule = TopKErrorFeedback(cv.Overwrite(jnp.zeros(size)), k=k)
    with pytest.raises(cv.ArgumentError, match="does not fit a module with 18 parameters"):
        jax.grad(lambda p: loss(rule.lift(dense)(p, BATCHES[0])))(PARAMS)


def test_at_least_one_entry_is_sent():
    with pytest.raises(cv.ArgumentError, match="k"):
        TopKErrorFeedback(cv.Overwrite(jnp.zeros(SIZE)), k=0)
