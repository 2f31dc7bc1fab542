"""Highways: values carried backwards through a chain of calls."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from five import five

import crossvjp as cv

X = jnp.array([[1.0, -2.0, 0.5], [0.1, 0.3, 3.0]])
FEEDBACK = jnp.array([[1.0, -1.0, 0.5], [0.3, 2.0, -1.0]])


def layer(p, x, road):
    return jnp.tanh(x @ p["w"]), road


class DirectFeedback(cv.Rule):
    """Gives every layer the error at the end of the chain."""

    matrix: Any
    symbolic_zeros = False

    def backward(self, call, y_bar):
        _, road_bar = y_bar
        error = road_bar.read()
        bar = call.pullback((error @ self.matrix, None))
        return bar.replace(inputs=(None, road_bar.carry(error)))


PARAMS = {"w": jnp.array([[0.2, -1.4, 0.3], [0.7, 0.4, 0.1], [-0.1, 2.0, 1.0]])}
OUT = jnp.array([[1.0, 0.5], [-1.0, 0.2], [0.3, 0.1]])


def chain(run, x=X, layers=3, primal=False):
    road = cv.Highway(x[..., :2])
    for _ in range(layers):
        x, road = run(x, road)
    return road.depart(x @ OUT, primal=primal)


def expected_of_first(x, layers=3, primal=False):
    hidden = [x]
    for _ in range(layers):
        hidden.append(jnp.tanh(hidden[-1] @ PARAMS["w"]))
    y = hidden[-1] @ OUT
    error = (y if primal else 2 * y) @ FEEDBACK
    return sum(h.T @ (error * (1 - after**2)) for h, after in itertools.pairwise(hidden))


@pytest.mark.parametrize("subject", five(PARAMS, layer, (X, cv.Highway(X[:, :2]))), ids=lambda subject: subject.name)
@pytest.mark.parametrize("around", [lambda run: run, jax.jit, jax.checkpoint], ids=["eager", "jit", "remat"])
def test_the_error_arrives_at_every_layer_in_every_framework(subject, around):
    rule = DirectFeedback(FEEDBACK)

    @around
    def loss(held):
        run = lambda x, road: subject.run(held, (), lambda mdl, *args: rule(mdl)(*args), x, road)[0]
        return jnp.sum(chain(run) ** 2)

    found = subject.common(jax.grad(loss)(subject.variables))["w"]
    np.testing.assert_allclose(found, expected_of_first(X), rtol=1e-5)


@pytest.mark.parametrize("primal", [False, True], ids=["cotangent", "primal"])
def test_a_highway_carries_the_cotangent_or_the_value(primal):
    run = lambda p: lambda x, road: DirectFeedback(FEEDBACK).lift(layer)(p, x, road)
    found = jax.grad(lambda p: jnp.sum(chain(run(p), primal=primal) ** 2))(PARAMS)["w"]
    np.testing.assert_allclose(found, expected_of_first(X, primal=primal), rtol=1e-5)


def test_a_highway_runs_through_scan():
    def loss(p):
        step = lambda carry, _: (DirectFeedback(FEEDBACK).lift(layer)(p, *carry), None)
        (x, road), _ = jax.lax.scan(step, (X, cv.Highway(X[:, :2])), None, length=3)
        return jnp.sum(road.depart(x @ OUT) ** 2)

    np.testing.assert_allclose(jax.jit(jax.grad(loss))(PARAMS)["w"], expected_of_first(X), rtol=1e-5)


def test_the_lanes_of_vmap_have_highways_of_their_own():
    run = lambda p: lambda x, road: DirectFeedback(FEEDBACK).lift(layer)(p, x, road)
    loss = lambda p, x: jnp.sum(chain(run(p), x) ** 2)
    found = jax.vmap(jax.grad(loss), in_axes=(None, 0))(PARAMS, jnp.stack([X, -X, 2 * X]))["w"]
    for lane, x in enumerate([X, -X, 2 * X]):
        np.testing.assert_allclose(found[lane], expected_of_first(x), rtol=1e-5)


def test_a_highway_that_forks_carries_nan_and_no_sum():
    rule = DirectFeedback(FEEDBACK)

    def loss(p):
        road = cv.Highway(X[:, :2])
        x, road = rule.lift(layer)(p, X, road)
        one, first = rule.lift(layer)(p, x, road)
        two, second = rule.lift(layer)(p, x, road)
        return jnp.sum(first.depart(one @ OUT) ** 2 + second.depart(two @ OUT) ** 2)

    assert np.isnan(jax.grad(loss)(PARAMS)["w"]).any()


def test_a_highway_without_an_end_carries_nan_and_no_zero():
    rule = DirectFeedback(FEEDBACK)
    found = jax.grad(lambda p: jnp.sum(rule.lift(layer)(p, X, cv.Highway(X[:, :2]))[0]))(PARAMS)["w"]
    assert np.isnan(found).all()


@pytest.mark.parametrize(
    "changed",
    [
        lambda road: jax.tree.map(jnp.sin, road),
        lambda road: cv.Highway(road.value),
        lambda road: jax.tree.map(jnp.array, road),
    ],
    ids=["sine", "another", "copy"],
)
def test_a_function_that_calculates_with_a_highway_is_an_error(changed):
    wrong = lambda p, x, road: (x @ p["w"], changed(road))
    with pytest.raises(cv.ArgumentError, match=r"must return a highway as it came, but Highway\(float32\[2, 2\]\)"):
        DirectFeedback(FEEDBACK).lift(wrong)(PARAMS, X, cv.Highway(X[:, :2]))


@pytest.mark.parametrize("like", [None, jnp.arange(3), {}, "x"], ids=repr)
def test_a_highway_carries_floating_arrays(like):
    with pytest.raises(cv.ArgumentError, match="A highway carries floating arrays, but `like` has"):
        cv.Highway(like)


@pytest.mark.parametrize("value", [jnp.ones(3), (jnp.ones((2, 2)),)], ids=["shape", "structure"])
def test_what_is_sent_must_look_like_the_highway(value):
    with pytest.raises(cv.ArgumentError, match=r"This highway carries float32\[2, 2\], but got"):
        cv.Highway(X[:, :2]).depart(value)
