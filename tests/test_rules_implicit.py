"""Gradients of fixed points and of ODEs, against dense solves, closed forms, other solvers and unrolled loops."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.ode import odeint
from memory_use import kept_bytes, temporary_bytes

import crossvjp as cv
from crossvjp.rules import FixedPoint, NeuralODEAdjoint


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def arrays(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape)) for shape in shapes]


def cell(p, x, z):
    return jnp.tanh(z @ p["w"] + x @ p["u"])


def a_cell():
    w, u, x, z_bar = arrays((5, 5), (3, 5), (3,), (5,))
    return {"w": 0.2 * w, "u": u}, x, jnp.zeros(5), z_bar


def pulled(fn, *primals, bar):
    y, pull = jax.vjp(fn, *primals)
    return y, pull(bar)


def assert_same(one, other, atol):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol), one, other)


def distance(one, other):
    return float(jnp.sqrt(sum(jnp.sum((a - b) ** 2) for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True))))


@pytest.mark.parametrize("damping", [1.0, 0.6])
def test_the_gradient_of_a_fixed_point_is_that_of_a_dense_solve(damping):
    p, x, z, z_bar = a_cell()
    y, (p_bar, x_bar, start_bar) = pulled(FixedPoint(300, 300, damping).lift(cell), p, x, z, bar=z_bar)
    u = jnp.linalg.solve(jnp.eye(5) - jax.jacobian(cell, 2)(p, x, y).T, z_bar)
    _, expected = pulled(lambda p, x: cell(p, x, y), p, x, bar=u)
    assert_same((y, p_bar, x_bar), (cell(p, x, y), *expected), 1e-12)  # rounding of numbers of size 1
    assert not jnp.any(start_bar)


def test_the_gradient_of_a_fixed_point_is_that_of_many_unrolled_steps():
    p, x, z, z_bar = a_cell()
    unrolled = lambda p, x: jax.lax.fori_loop(0, 300, lambda _, z: cell(p, x, z), z)
    found = pulled(lambda p, x: FixedPoint(300, 300).lift(cell)(p, x, z), p, x, bar=z_bar)
    assert_same(found, pulled(unrolled, p, x, bar=z_bar), 1e-12)


def test_the_second_derivative_of_a_fixed_point_is_that_of_unrolled_steps():
    p, x, z, z_bar = a_cell()
    of = lambda run: jax.hessian(lambda x: jnp.vdot(z_bar, run(p, x, z)))(x)
    unrolled = lambda p, x, z: jax.lax.fori_loop(0, 100, lambda _, z: cell(p, x, z), z)
    hessian = of(unrolled)
    assert float(jnp.max(jnp.abs(hessian))) > 0.01
    assert_same(of(FixedPoint(100, 100).lift(cell)), hessian, 1e-12)


def test_one_backward_step_is_jacobian_free_backpropagation():
    p, x, z, z_bar = a_cell()
    y, (p_bar, x_bar, _) = pulled(FixedPoint(300, 1).lift(cell), p, x, z, bar=z_bar)
    _, expected = pulled(lambda p, x: cell(p, x, y), p, x, bar=z_bar)
    assert_same((p_bar, x_bar), expected, 1e-14)


def test_some_damped_backward_steps_are_the_terms_of_the_phantom_gradient():
    p, x, z, z_bar = a_cell()
    y, (p_bar, x_bar, _) = pulled(FixedPoint(300, 4, 0.6).lift(cell), p, x, z, bar=z_bar)
    damped = 0.6 * jax.jacobian(cell, 2)(p, x, y) + 0.4 * jnp.eye(5)
    u = 0.6 * sum(z_bar @ jnp.linalg.matrix_power(damped, term) for term in range(4))
    _, expected = pulled(lambda p, x: cell(p, x, y), p, x, bar=u)
    assert_same((p_bar, x_bar), expected, 1e-13)


def test_each_backward_step_comes_nearer_to_the_gradient_by_the_contraction():
    p, x, z, z_bar = a_cell()
    bar = lambda steps: pulled(FixedPoint(300, steps).lift(cell), p, x, z, bar=z_bar)[1][:2]
    y = FixedPoint(300).lift(cell)(p, x, z)
    contraction = float(jnp.max(jnp.abs(jnp.linalg.eigvals(jax.jacobian(cell, 2)(p, x, y)))))
    errors = [distance(bar(steps), bar(300)) for steps in (1, 11, 21)]
    assert errors[0] > 0.01
    for before, after in itertools.pairwise(errors):
        assert 0.1 < after / before / contraction**10 < 10  # the factor is exact only for many steps


def test_a_state_of_several_arrays_of_which_one_is_differentiated():
    p, x, z, z_bar = a_cell()

    def two(p, x, z):
        return {"a": jnp.tanh(z["b"] @ p["w"] + x @ p["u"]), "b": 0.5 * jnp.sin(z["a"])}

    def loss(run):
        return jax.grad(lambda p: jnp.vdot(z_bar, run(p, x, {"a": z, "b": z})["a"]))(p)

    unrolled = lambda p, x, z: jax.lax.fori_loop(0, 200, lambda _, z: two(p, x, z), z)
    assert_same(loss(FixedPoint(200, 200).lift(two)), loss(unrolled), 1e-12)


def test_an_input_by_keyword_has_its_gradient():
    p, x, z, z_bar = a_cell()
    by_keyword = FixedPoint(300, 300).lift(lambda p, z, *, x: cell(p, x, z))
    _, (x_bar,) = pulled(lambda x: by_keyword(p, z, x=x), x, bar=z_bar)
    _, (expected,) = pulled(lambda x: FixedPoint(300, 300).lift(cell)(p, x, z), x, bar=z_bar)
    assert_same(x_bar, expected, 1e-14)


def test_the_memory_of_a_fixed_point_does_not_grow_with_its_steps():
    shapes = {"w": (64, 64), "u": (64, 64)}
    p = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    x = jax.ShapeDtypeStruct((32, 64), jnp.float32)

    def unrolled(steps):
        return lambda p, x, z: jax.lax.scan(lambda z, _: (cell(p, x, z), None), z, length=steps)[0]

    def needs(make, steps):
        run = make(steps)
        return kept_bytes(run, p, x, x), temporary_bytes(jax.grad(lambda p, x, z: jnp.sum(run(p, x, z))), p, x, x)

    implicit = lambda steps: FixedPoint(steps, steps).lift(cell)
    kept, temporary = needs(implicit, 10)
    assert kept == 32 * 64 * 4  # the output
    assert needs(implicit, 100) == needs(implicit, 400) == (kept, temporary)
    for few, many in zip(needs(unrolled, 10), needs(unrolled, 100), strict=True):
        assert many > 5 * few


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": 0}, "`steps` of FixedPoint must be >= 1, but is 0"),
        ({"backward_steps": 0}, "`backward_steps` of FixedPoint must be >= 1"),
        ({"damping": 0.0}, "`damping` of FixedPoint must be > 0"),
    ],
)
def test_a_fixed_point_refuses_wrong_fields(wrong, message):
    with pytest.raises(cv.ArgumentError, match=message):
        FixedPoint(**wrong)


def linear(a, z):
    return a @ z


def test_the_adjoint_of_a_linear_ode_is_that_of_the_matrix_exponential():
    a, z, z_bar = arrays((4, 4), (4,), (4,))
    exact = lambda time, a, z: jax.scipy.linalg.expm(time * a) @ z
    solved = lambda time, a, z: NeuralODEAdjoint(time, 200).lift(linear)(0.5 * a, z)
    found = pulled(solved, jnp.array(0.8), a, z, bar=z_bar)
    expected = pulled(lambda time, a, z: exact(time, 0.5 * a, z), jnp.array(0.8), a, z, bar=z_bar)
    assert_same(found, expected, 1e-9)  # Runge-Kutta's error with steps of 0.004


def test_the_adjoint_of_an_ode_in_time_with_a_control_is_that_of_odeint():
    w, z, control, z_bar = arrays((3, 3), (3,), (3,), (3,))
    slope = lambda w, z, t, control: jnp.tanh(z @ w + control * jnp.sin(3 * t))

    def in_time(w, state, control):
        return {"z": slope(w, state["z"], state["t"], control), "t": jnp.ones(())}

    def solved(w, z, control):
        return NeuralODEAdjoint(1.5, 200).lift(in_time)(w, {"z": z, "t": jnp.zeros(())}, control)["z"]

    def reference(w, z, control):
        times = jnp.array([0.0, 1.5])
        return odeint(lambda z, t: slope(w, z, t, control), z, times, rtol=1e-10, atol=1e-10)[-1]

    found, expected = (pulled(run, w, z, control, bar=z_bar) for run in (solved, reference))
    assert_same(found, expected, 1e-7)  # the tolerance of odeint, with its own factor


def test_the_error_of_the_adjoint_is_of_fourth_order():
    a, z, z_bar = arrays((3, 3), (3,), (3,))
    _, expected = pulled(lambda a, z: jax.scipy.linalg.expm(a) @ z, a, z, bar=z_bar)
    bars = lambda steps: pulled(NeuralODEAdjoint(1.0, steps).lift(linear), a, z, bar=z_bar)[1]
    coarse, fine = (distance(bars(steps), expected) for steps in (20, 40))
    assert 14 < coarse / fine < 18  # 16 in the limit


def test_an_ode_is_solved_back_with_negative_time():
    w, z = arrays((3, 3), (3,))
    solve = lambda time, z: NeuralODEAdjoint(time, 100).lift(lambda w, z: jnp.tanh(z @ w))(w, z)
    assert distance(solve(1.0, z), z) > 0.1
    assert_same(solve(-1.0, solve(1.0, z)), z, 1e-8)  # Runge-Kutta's error


def test_the_memory_of_an_adjoint_does_not_grow_with_its_steps():
    w, z = jax.ShapeDtypeStruct((64, 64), jnp.float32), jax.ShapeDtypeStruct((32, 64), jnp.float32)

    def needs(steps):
        run = NeuralODEAdjoint(1.0, steps).lift(lambda w, z: jnp.tanh(z @ w))
        return kept_bytes(run, w, z), temporary_bytes(jax.grad(lambda w, z: jnp.sum(run(w, z))), w, z)

    assert needs(10)[0] == 32 * 64 * 4  # the output
    assert needs(10) == needs(100) == needs(1000)


def test_an_adjoint_refuses_no_steps():
    with pytest.raises(cv.ArgumentError, match="`steps` of NeuralODEAdjoint must be >= 1, but is 0"):
        NeuralODEAdjoint(1.0, 0)
