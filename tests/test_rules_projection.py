"""Rules that turn the gradient of whole weights, against what they are for, and optax."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optax import contrib
from twins import dense

import crossvjp as cv
from crossvjp import rules

KEYS = jax.random.split(jax.random.key(3), 4)
PARAMS = {"w": jax.random.normal(KEYS[0], (3, 2)), "b": jax.random.normal(KEYS[1], (2,))}
X = jax.random.normal(KEYS[2], (4, 3))
C = jax.random.normal(KEYS[3], (4, 2))


def bars(fn: Any, params: Any = PARAMS, c: Any = C) -> Any:
    return jax.vjp(fn, params, X)[1](c)


def update(tx: Any, grads: Any) -> Any:
    """Gives what a transformation of optax makes of gradients in its first step."""
    return tx.update(grads, tx.init(grads))[0]


@pytest.mark.parametrize(("unit_axis", "axes"), [(-1, 0), (0, 1), (None, (0, 1))])
def test_a_projected_gradient_is_orthogonal_to_the_weights(unit_axis, axes):
    found, x_bar = bars(rules.ProjectOrthogonal(unit_axis).lift(dense))
    own, own_x_bar = bars(dense)
    products = jnp.sum(found["w"] * PARAMS["w"], axis=axes)
    assert np.all(np.abs(products) < 1e-5)  # float32, of numbers near 1
    assert np.all(np.abs(jnp.sum(own["w"] * PARAMS["w"], axis=axes)) > 0.1)
    np.testing.assert_array_equal(found["b"], own["b"])
    np.testing.assert_array_equal(x_bar, own_x_bar)


def test_the_projection_is_the_gradient_of_weight_normalisation():
    norms = jnp.linalg.norm(PARAMS["w"], axis=0)
    normalised = lambda p, x: x @ (p["w"] / jnp.linalg.norm(p["w"], axis=0) * norms) + p["b"]
    found = bars(rules.ProjectOrthogonal().lift(dense))[0]["w"]
    # At g = ||v||, equation 3 is the projection alone.
    np.testing.assert_allclose(found, bars(normalised)[0]["w"], rtol=1e-5, atol=1e-5)


def test_weights_of_zero_keep_their_gradient():
    params = {"w": PARAMS["w"].at[:, 0].set(0.0), "b": PARAMS["b"]}
    found, own = (bars(fn, params)[0]["w"] for fn in (rules.ProjectOrthogonal().lift(dense), dense))
    np.testing.assert_array_equal(found[:, 0], own[:, 0])
    assert np.any(found[:, 1] != own[:, 1])


def muon(grad: Any, reduction_axis: Any, output_axis: int) -> Any:
    """Gives what optax makes of a gradient."""
    dims = {"w": contrib.MuonDimensionNumbers(reduction_axis, output_axis)}
    tx = contrib.scale_by_muon(beta=0.0, nesterov=False, weight_dimension_numbers=dims)
    return update(tx, {"w": grad})["w"]


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4)])
def test_muon_orthogonalises_as_optax_does(shape):
    grad = jax.random.normal(KEYS[0], shape)
    expected = muon(grad, 0, 1)
    found = jax.grad(rules.Muon().lift(lambda p: jnp.sum(p["w"] * grad)))({"w": jnp.zeros(shape)})
    # Some versions of optax scale what they give by a factor of the shape; the singular values say how large ours is.
    unit = lambda matrix: matrix / jnp.linalg.norm(matrix)
    np.testing.assert_allclose(unit(found["w"]), unit(expected), rtol=0, atol=2e-5)  # float32 through five steps
    values = jnp.linalg.svd(found["w"], compute_uv=False)
    assert np.all((values > 0.5) & (values < 1.3))


@pytest.mark.parametrize("unit_axis", [-1, 0])
def test_muon_takes_a_convolution_as_a_matrix_to_its_output_channels(unit_axis):
    grad = jax.random.normal(KEYS[0], (2, 3, 4))
    others = tuple(axis for axis in range(3) if axis != unit_axis % 3)
    expected = muon(grad, others, unit_axis)
    rule = rules.Muon(unit_axis=unit_axis)
    found = jax.grad(rule.lift(lambda p: jnp.sum(p["w"] * grad)))({"w": jnp.zeros_like(grad)})
    np.testing.assert_allclose(found["w"], expected, rtol=0, atol=2e-5)  # as above


def test_more_steps_of_muon_bring_small_singular_values_up():
    grad = jnp.diag(jnp.array([1.0, 0.01]))
    smallest = lambda steps: jnp.linalg.svd(
        jax.grad(rules.Muon(steps).lift(lambda p: jnp.sum(p["w"] * grad)))({"w": grad})["w"], compute_uv=False
    )[1]
    assert smallest(1) < 0.1 < smallest(5)


def test_muon_without_steps_is_an_error():
    with pytest.raises(cv.ArgumentError, match="`steps` of Muon must be >= 1, but is 0"):
        rules.Muon(0)


def conflicting(p, x):
    h = x @ p["w"]
    return jnp.sum(h), jnp.sum(x[:, :1] * h - 0.8 * h)


def alike(p, x):
    h = x @ p["w"]
    return jnp.sum(h), jnp.sum(x[:, :1] * h * 0.1 + h)


def task_bars(fn):
    return [jax.grad(lambda w, task=task: fn({"w": w}, X)[task])(PARAMS["w"]) for task in range(2)]


@pytest.mark.parametrize("shuffle", [False, True])
def test_of_two_conflicting_tasks_each_is_projected_on_the_plane_of_the_other(shuffle):
    one, other = task_bars(conflicting)
    assert jnp.vdot(one, other) < 0
    found = jax.grad(lambda p: sum(rules.PCGrad(shuffle).lift(conflicting, key=KEYS[0])(p, X)))({"w": PARAMS["w"]})
    without = lambda g, h: g - jnp.vdot(g, h) / jnp.vdot(h, h) * h
    np.testing.assert_allclose(found["w"], without(one, other) + without(other, one), rtol=1e-5, atol=1e-5)


def test_tasks_that_agree_are_added():
    one, other = task_bars(alike)
    assert jnp.vdot(one, other) > 0
    found = jax.grad(lambda p: sum(rules.PCGrad().lift(alike)(p, X)))({"w": PARAMS["w"]})
    np.testing.assert_allclose(found["w"], one + other, rtol=1e-5, atol=1e-6)


def test_a_task_that_nobody_uses_does_not_count():
    lifted = rules.PCGrad().lift(conflicting)
    found = jax.grad(lambda p: lifted(p, X)[1])({"w": PARAMS["w"]})
    np.testing.assert_allclose(found["w"], task_bars(conflicting)[1], rtol=1e-6)


def test_tasks_may_have_names():
    named = lambda p, x: dict(zip("ab", conflicting(p, x), strict=True))
    total = lambda fn: lambda p: sum(jax.tree.leaves(fn(p, X)))
    params = {"w": PARAMS["w"]}
    found = jax.grad(total(rules.PCGrad().lift(named)))(params)["w"]
    np.testing.assert_array_equal(found, jax.grad(total(rules.PCGrad().lift(conflicting)))(params)["w"])


def test_the_inputs_get_the_sum_of_all_tasks():
    total = lambda fn: lambda x: sum(fn({"w": PARAMS["w"]}, x))
    found, expected = (jax.grad(total(fn))(X) for fn in (rules.PCGrad().lift(conflicting), conflicting))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_surgery_on_a_single_output_is_an_error():
    with pytest.raises(
        cv.ArgumentError, match="a call that returns a tuple, list or dict with one entry for each task"
    ):
        bars(rules.PCGrad().lift(dense))


def actor_critic(p, x):
    h = jnp.tanh(x @ p["trunk"])
    return {"policy": h @ p["policy"], "value": h @ p["value"]}


ACTOR_CRITIC = {
    "trunk": jax.random.normal(KEYS[0], (3, 2)),
    "policy": jax.random.normal(KEYS[1], (2, 2)),
    "value": jax.random.normal(KEYS[2], (2,)),
}


def stopped(p, x):
    """The same, with the value's gradient stopped before the trunk by hand."""
    h = jnp.tanh(x @ p["trunk"])
    return {"policy": h @ p["policy"], "value": jax.lax.stop_gradient(h) @ p["value"]}


def loss(fn):
    def total(p, x):
        y = fn(p, x)
        return jnp.sum(jnp.sin(y["policy"])) + jnp.sum(jnp.cos(y["value"]))

    return total


def assert_close(found, expected):
    jax.tree.map(lambda f, e: np.testing.assert_allclose(f, e, rtol=1e-5, atol=1e-6), found, expected)  # float32


ROUTES = [
    {"value": "value"},
    {"value": ["value", "none*"], "polic?": True},
    {"val*": lambda path, leaf: path == ("value",)},
    {"value": "val*", lambda path, leaf: path[0] == "value": "value"},  # chosen twice, counted once
]


@pytest.mark.parametrize("routes", ROUTES, ids=["name", "list", "predicate", "twice"])
def test_a_route_is_a_gradient_stopped_by_hand(routes):
    found = jax.grad(loss(rules.RouteCotangents(routes).lift(actor_critic)))(ACTOR_CRITIC, X)
    assert_close(found, jax.grad(loss(stopped))(ACTOR_CRITIC, X))
    assert not np.allclose(found["trunk"], jax.grad(loss(actor_critic))(ACTOR_CRITIC, X)["trunk"], rtol=1e-2)


def test_two_routes_from_one_output_train_the_variables_of_both():
    routes = {"value": "value", "valu?": "trunk"}
    found = jax.grad(loss(rules.RouteCotangents(routes).lift(actor_critic)))(ACTOR_CRITIC, X)
    assert_close(found, jax.grad(loss(actor_critic))(ACTOR_CRITIC, X))


def test_the_inputs_get_the_whole_gradient_whatever_the_routes():
    lifted = rules.RouteCotangents({"value": "value"}).lift(actor_critic)
    found, expected = (jax.grad(loss(fn), 1)(ACTOR_CRITIC, X) for fn in (lifted, actor_critic))
    assert_close(found, expected)


def test_an_output_that_is_routed_may_be_unused():
    lifted = rules.RouteCotangents({"value": "value"}).lift(actor_critic)
    policy = lambda fn: jax.grad(lambda p: jnp.sum(jnp.sin(fn(p, X)["policy"])))(ACTOR_CRITIC)
    assert_close(policy(lifted), policy(actor_critic))


@pytest.mark.parametrize(
    ("routes", "match"),
    [
        ({"advantage": "value"}, "chooses 'advantage', but no output .* Its paths are 'policy', 'value'"),
        ({"value": "critic"}, "chooses 'critic', but no variable .* Its paths are 'policy', 'trunk', 'value'"),
    ],
)
def test_a_route_that_leads_nowhere_is_an_error(routes, match):
    with pytest.raises(cv.ArgumentError, match=match):
        jax.grad(loss(rules.RouteCotangents(routes).lift(actor_critic)))(ACTOR_CRITIC, X)
