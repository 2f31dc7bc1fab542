"""The black-box solver on shortest paths, against all paths of a small grid."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import crossvjp as cv
from crossvjp.rules import BlackBoxSolver
from crossvjp.testing import assert_close, assert_same_bits

SIZE = 4


def all_paths():
    """Lists all paths from corner to corner that go right and down, as 0 and 1 on the grid."""
    paths = []
    for rights in itertools.combinations(range(2 * SIZE - 2), SIZE - 1):
        path = np.zeros((SIZE, SIZE), np.float32)
        row = column = 0
        path[0, 0] = 1
        for step in range(2 * SIZE - 2):
            row, column = (row, column + 1) if step in rights else (row + 1, column)
            path[row, column] = 1
        paths.append(path)
    return np.stack(paths)


PATHS = all_paths()


def shortest_path(costs):
    """Finds the cheapest path by dynamic programming, from the far corner back."""
    costs = np.asarray(costs)
    total = np.full((SIZE + 1, SIZE + 1), np.inf)
    for row, column in itertools.product(reversed(range(SIZE)), repeat=2):
        ahead = min(total[row + 1, column], total[row, column + 1])
        total[row, column] = costs[row, column] + (ahead if np.isfinite(ahead) else 0)
    path = np.zeros((SIZE, SIZE), np.float32)
    row = column = 0
    path[0, 0] = 1
    while (row, column) != (SIZE - 1, SIZE - 1):
        row, column = (row, column + 1) if total[row, column + 1] < total[row + 1, column] else (row + 1, column)
        path[row, column] = 1
    return path


def solver(costs):
    shape = jax.ShapeDtypeStruct(costs.shape, jnp.float32)
    return jax.pure_callback(shortest_path, shape, costs, vmap_method="sequential")


def interpolated(costs, c, lambda_):
    """Gives the paper's piecewise linear function for the loss c.y, by looking at all paths."""
    cheapest = lambda costs: np.min(np.tensordot(PATHS.astype(float), costs, 2))
    return (cheapest(costs + lambda_ * c) - cheapest(costs)) / lambda_


COSTS, C = np.random.default_rng(3).uniform(0.5, 2, (2, SIZE, SIZE)).astype(np.float32)
C = C - 1


def test_the_solver_finds_the_cheapest_of_all_paths():
    assert len(PATHS) == 20
    assert_same_bits(jnp.asarray(shortest_path(COSTS)), PATHS[np.argmin(np.tensordot(PATHS, COSTS, 2))])


@pytest.mark.parametrize("lambda_", [0.5, 2.0, 20.0])
def test_the_gradient_is_that_of_the_papers_interpolation(lambda_):
    y, pullback = jax.vjp(BlackBoxSolver(lambda_)(solver), jnp.asarray(COSTS))
    assert_same_bits(y, jnp.asarray(shortest_path(COSTS)))
    step, numeric = 1e-4, np.zeros((SIZE, SIZE))
    for at in np.ndindex(SIZE, SIZE):
        unit = np.zeros((SIZE, SIZE))
        unit[at] = step
        ahead, behind = (interpolated(COSTS + sign * unit, C, lambda_) for sign in (1, -1))
        numeric[at] = (ahead - behind) / (2 * step)
    (found,) = pullback(jnp.asarray(C))
    # Linear in between, so differences are exact up to rounding: 1e-16 / 1e-4 in float64, the rest in float32.
    np.testing.assert_allclose(found, numeric, atol=1e-6)
    assert np.abs(numeric).max() > 0


def test_costs_learn_to_have_a_given_path():
    target = jnp.asarray(PATHS[7])
    loss = lambda costs: jnp.sum(jnp.abs(BlackBoxSolver(20.0)(solver)(costs) - target))
    costs = jnp.asarray(COSTS)
    assert loss(costs) > 0
    descend = jax.jit(lambda costs: costs - 0.3 * jax.grad(loss)(costs))
    for _ in range(40):
        costs = descend(costs)
    assert_same_bits(jnp.asarray(shortest_path(costs)), target)


def test_a_batch_is_solved_one_by_one():
    costs = jnp.stack([COSTS, COSTS[::-1]])
    grads = lambda costs: jax.vjp(BlackBoxSolver(5.0)(solver), costs)[1](jnp.asarray(C))[0]
    assert_close(jax.jit(jax.vmap(grads))(costs), jnp.stack([grads(each) for each in costs]))


def test_a_solver_with_variables_is_refused():
    with pytest.raises(cv.ArgumentError, match=r"BlackBoxSolver\(lambda_=2.0\) .* the module has variables, whose"):
        jax.grad(lambda w: BlackBoxSolver(2.0).lift(lambda p, w: p * w)(jnp.ones(2), w).sum())(jnp.ones(2))


def test_a_step_of_zero_is_refused():
    with pytest.raises(cv.ArgumentError, match="lambda_"):
        BlackBoxSolver(0.0)
