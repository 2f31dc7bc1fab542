"""Slow twins of the rules for training with few bits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from twins import twin

from crossvjp.rules import LSQ, PACT, DoReFa, OnKernels, SignSTE


def _lsq(v, g, step, low, high, size):
    """Gives what LSQ makes of one array, and the cotangents of the array and of the step, number by number."""
    v_hat, v_bar, step_bar = np.empty_like(v), np.empty_like(v), 0.0
    for at, number in np.ndenumerate(v):
        ratio = number / step
        v_hat[at] = np.rint(min(max(ratio, low), high)) * step
        v_bar[at] = g[at] if low < ratio < high else 0
        slope = low if ratio <= low else high if ratio >= high else np.rint(ratio) - ratio
        step_bar += g[at] * slope / np.sqrt(size * high)
    return v_hat, v_bar, step_bar


W = np.array([[0.4, -1.3], [-0.2, 0.05], [1.7, 0.9]])  # with a step of 0.25 and 3 bits, 3 of 6 are clipped
X = np.array([[1.0, -2.0, 0.5], [0.3, 0.7, -1.1]])


@twin(LSQ(step=0.25, bits=3))
def quantised_weights(case):
    y, v_bar, step_bar = _lsq(case.y, case.y_bar, case.rule.step, -4, 3, case.y.size)
    return y, *case.pull(v_bar), {"step": step_bar}


@twin(LSQ(step=0.5, bits=2, activation=True))
def quantised_activations(case):
    features = case.y.shape[1]
    y, v_bar, step_bar = _lsq(case.y, case.y_bar, case.rule.step, 0, 3, features)
    return y, *case.pull(v_bar), {"step": step_bar}


def two_layers(p, x):
    return jnp.tanh(x @ p["first"] + p["b"]) @ p["second"]


W = np.array([[0.4, -1.3], [-0.2, 0.05], [5.0, 0.9]])
X = np.array([[1.0, -2.0, 0.5], [0.3, 0.7, -1.1]])
LAYERS = {"first": W, "b": np.array([0.3, -0.2]), "second": np.array([[-0.3], [5.0]])}


@twin(OnKernels(LSQ(step=0.5, bits=4)), two_layers, LAYERS, (X,))
def one_step_of_two_kernels(case):
    first, b, second = (case.variables[name] for name in LAYERS)
    step, (x,) = case.rule.rule.step, case.inputs
    h = np.tanh(x @ _lsq(first, first, step, -8, 7, 1)[0] + b)
    second_hat, second_bar, second_step = _lsq(second, h.T @ case.y_bar, step, -8, 7, second.size)
    pre_bar = (case.y_bar @ second_hat.T) * (1 - h**2)
    first_hat, first_bar, first_step = _lsq(first, x.T @ pre_bar, step, -8, 7, first.size)
    bars = {"first": first_bar, "b": pre_bar.sum(0), "second": second_bar}
    rule_bar = jax.tree.map(lambda _: first_step + second_step, case.rule.rule)
    return h @ second_hat, (pre_bar @ first_hat.T,), bars, {"rule": rule_bar}


@twin(OnKernels(SignSTE(), jnp.sign), two_layers, LAYERS, (X,))
def binary_kernels(case):
    first, b, second = (case.variables[name] for name in LAYERS)
    (x,) = case.inputs
    h = np.tanh(x @ np.sign(first) + b)
    pre_bar = (case.y_bar @ np.sign(second).T) * (1 - h**2)
    first_bar, second_bar = x.T @ pre_bar, h.T @ case.y_bar
    first_bar[abs(first) > 1], second_bar[abs(second) > 1] = 0, 0
    bars = {"first": first_bar, "b": pre_bar.sum(0), "second": second_bar}
    return h @ np.sign(second), (pre_bar @ np.sign(first).T,), bars


@twin(PACT(alpha=1.2, bits=3))  # of the 8 outputs some are below 0, some above alpha
def learned_clipping(case):
    h, alpha, unit = case.y, case.rule.alpha, case.rule.alpha / 7
    y, h_bar, alpha_bar = np.empty_like(h), np.zeros_like(h), 0.0
    for at, number in np.ndenumerate(h):
        y[at] = np.rint((abs(number) - abs(number - alpha) + alpha) / 2 / unit) * unit
        if number >= alpha:
            alpha_bar += case.y_bar[at]
        elif number >= 0:
            h_bar[at] = case.y_bar[at]
    return y, *case.pull(h_bar), {"alpha": alpha_bar}


@twin(DoReFa(bits=2), inputs=(np.random.default_rng(0).normal(size=(20, 3)),), key=0)
def quantised_gradient(case):
    steps = 2**case.rule.bits - 1
    (key,) = jax.random.split(case.key, 1)
    noise = np.asarray(jax.random.uniform(key, case.y_bar.shape, jnp.float64, -0.5, 0.5)) / steps
    rows = []
    for row, its_noise in zip(case.y_bar, noise, strict=True):
        largest = max(abs(row))
        quantised = np.rint(steps * (row / (2 * largest) + 1 / 2 + its_noise)) / steps
        rows.append(2 * largest * (quantised - 1 / 2))
    return case.y, *case.pull(np.array(rows))
