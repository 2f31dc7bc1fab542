"""Slow twins of the rules in `crossvjp.rules._implicit`."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from twins import twin

from crossvjp.rules import FixedPoint, NeuralODEAdjoint

rng = np.random.default_rng(0)
CELL = {"w": 0.3 * rng.normal(size=(3, 3)), "u": rng.normal(size=(2, 3))}
STARTS = rng.normal(size=(4, 2)), rng.normal(size=(4, 3))


def cell(p, x, z):
    return jnp.tanh(z @ p["w"] + x @ p["u"])


@twin(FixedPoint(steps=200, backward_steps=200), cell, CELL, STARTS, stops=("inputs/1",))
@twin(FixedPoint(steps=200, backward_steps=300, damping=0.7), cell, CELL, STARTS, stops=("inputs/1",))
def fixed_point(case):
    w, u = case.variables["w"], case.variables["u"]
    x, z = case.inputs
    for _ in range(500):
        z = np.tanh(z @ w + x @ u)
    before_bar = np.zeros_like(z)  # the cotangent of what tanh is taken of
    for row, y_bar in enumerate(case.y_bar):
        slope = 1 - z[row] ** 2
        jacobian = slope[:, None] * w.T  # d cell / d z
        before_bar[row] = slope * np.linalg.solve(np.eye(3) - jacobian.T, y_bar)
    return z, (before_bar @ u.T, None), {"w": z.T @ before_bar, "u": x.T @ before_bar}


@twin(FixedPoint(steps=200, backward_steps=1), cell, CELL, STARTS, stops=("inputs/1",))
@twin(FixedPoint(steps=200, backward_steps=3, damping=0.7), cell, CELL, STARTS, stops=("inputs/1",))
def jacobian_free_and_phantom(case):
    w, u = case.variables["w"], case.variables["u"]
    x, z = case.inputs
    for _ in range(500):
        z = np.tanh(z @ w + x @ u)
    terms, damping = case.rule.backward_steps, case.rule.damping
    before_bar = np.zeros_like(z)
    for row, y_bar in enumerate(case.y_bar):
        slope = 1 - z[row] ** 2
        damped = damping * slope[:, None] * w.T + (1 - damping) * np.eye(3)
        series = damping * sum(np.linalg.matrix_power(damped.T, i) for i in range(terms))
        before_bar[row] = slope * (series @ y_bar)
    return z, (before_bar @ u.T, None), {"w": z.T @ before_bar, "u": x.T @ before_bar}


@twin(
    NeuralODEAdjoint(time=0.8, steps=6),
    lambda p, z: jnp.tanh(z @ p["w"]),
    {"w": rng.normal(size=(3, 3))},
    (rng.normal(size=(2, 3)),),
)
def neural_ode_adjoint(case):
    w, steps = case.variables["w"], case.rule.steps
    h = case.rule.time / steps

    def runge_kutta(slope, state):
        for _ in range(steps):
            k1 = slope(state)
            k2 = slope([s + h / 2 * k for s, k in zip(state, k1, strict=True)])
            k3 = slope([s + h / 2 * k for s, k in zip(state, k2, strict=True)])
            k4 = slope([s + h * k for s, k in zip(state, k3, strict=True)])
            state = [s + h / 6 * (a + 2 * b + 2 * c + d) for s, a, b, c, d in zip(state, k1, k2, k3, k4, strict=True)]
        return state

    def backwards(state):  # time turned round: dz = -f, da = a^T df/dz, dw_bar = a^T df/dw
        z, a, _ = state
        f = np.tanh(z @ w)
        before_bar = a * (1 - f**2)
        return [-f, before_bar @ w.T, z.T @ before_bar]

    (y,) = runge_kutta(lambda state: [np.tanh(state[0] @ w)], [case.inputs[0]])
    _, z_bar, w_bar = runge_kutta(backwards, [y, case.y_bar, np.zeros_like(w)])
    return y, (z_bar,), {"w": w_bar}, {"time": np.sum(case.y_bar * np.tanh(y @ w))}
