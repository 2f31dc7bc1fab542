"""Slow twins of the straight-through estimators."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from twins import twin

from crossvjp.rules import HardSigmoidSTE, RoundSTE, SignSTE, XNORWeights


@twin(RoundSTE(), lambda p, x: jnp.round(x), inputs=(np.array([-2.4, 0.6, 7.5]),))
def straight_through(case):
    return np.rint(case.inputs[0]), (case.y_bar,), None


# The numbers lie on both sides of each limit.
@twin(SignSTE(), lambda p, x: jnp.sign(x), inputs=(np.array([-1.2, -0.9, 0.3, 1.1]),))
@twin(SignSTE(limit=0.5), lambda p, x: jnp.sign(x), inputs=(np.array([-0.6, -0.4, 0.3, 0.9]),))
def saturated_straight_through(case):
    (x,), rule = case.inputs, case.rule
    x_bar = [c if -rule.limit <= each <= rule.limit else 0 for each, c in zip(x, case.y_bar, strict=True)]
    return np.sign(x), (np.array(x_bar),), None


@twin(HardSigmoidSTE(), lambda p, x: (x > 0).astype(x.dtype), inputs=(np.array([-1.2, -0.9, 0.3, 1.1]),))
def slope_of_the_hard_sigmoid(case):
    (x,) = case.inputs
    x_bar = [c / 2 if -1 <= each <= 1 else 0 for each, c in zip(x, case.y_bar, strict=True)]
    return np.where(x > 0, 1.0, 0.0), (np.array(x_bar),), None


def _binary_filters(w):
    """Gives the binary kernel of filters on the last axis, and what each weight's cotangent is multiplied by."""
    binary, factor = np.empty_like(w), np.empty_like(w)
    for column in range(w.shape[-1]):
        filter_ = w[..., column]
        alpha = np.abs(filter_).sum() / filter_.size
        binary[..., column] = alpha * np.where(filter_ >= 0, 1, -1)
        factor[..., column] = 1 / filter_.size + alpha * np.where(np.abs(filter_) <= 1, 1, 0)
    return binary, factor


W = np.array([[0.4, -1.3], [-0.2, 0.0], [1.7, 0.9]])


@twin(XNORWeights(), variables={"w": W, "b": np.array([0.3, -0.2])}, inputs=(np.array([[1.0, -2.0, 0.5]] * 2),))
def binary_filters(case):
    w, b = case.variables["w"], case.variables["b"]
    (x,) = case.inputs
    binary, factor = _binary_filters(w)
    return x @ binary + b, (case.y_bar @ binary.T,), {"w": factor * (x.T @ case.y_bar), "b": case.y_bar.sum(0)}


@twin(XNORWeights(unit_axis=0), lambda p, x: jnp.tanh(p["w"] @ x), {"w": W.T}, (np.array([1.0, -2.0, 0.5]),))
def binary_filters_in_front_of_a_nonlinearity(case):
    w = case.variables["w"]
    (x,) = case.inputs
    binary, factor = (each.T for each in _binary_filters(w.T))
    y = np.tanh(binary @ x)
    h_bar = case.y_bar * (1 - y**2)
    return y, (binary.T @ h_bar,), {"w": factor * np.outer(h_bar, x)}
