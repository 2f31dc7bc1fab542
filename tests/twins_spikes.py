"""Slow twins of the surrogate gradients."""

from __future__ import annotations

import numpy as np
from twins import twin

from crossvjp.rules import ArcTan, SigmoidDerivative, SuperSpike, Triangle


def spike(p, u):
    return (u > 0).astype(u.dtype)


U = np.array([[-1.3, -0.2, 0.0], [0.05, 0.7, 2.0]])


@twin(SuperSpike(beta=4.0), spike, inputs=(U,))
def fast_sigmoid(case):
    (u,) = case.inputs
    return np.where(u > 0, 1.0, 0.0), (case.y_bar / (case.rule.beta * abs(u) + 1) ** 2,), None


@twin(SigmoidDerivative(beta=4.0), spike, inputs=(U,))
def sigmoid(case):
    (u,), beta = case.inputs, case.rule.beta
    s = 1 / (1 + np.exp(-beta * u))
    return np.where(u > 0, 1.0, 0.0), (case.y_bar * beta * s * (1 - s),), None


@twin(ArcTan(alpha=3.0), spike, inputs=(U,))
def arc_tangent(case):
    (u,), alpha = case.inputs, case.rule.alpha
    return np.where(u > 0, 1.0, 0.0), (case.y_bar * alpha / 2 / (1 + (np.pi / 2 * alpha * u) ** 2),), None


@twin(Triangle(gamma=0.3, width=0.8), spike, inputs=(U,))
def triangle(case):
    (u,), rule = case.inputs, case.rule
    slope = [rule.gamma * max(0, 1 - abs(each) / rule.width) for each in u.ravel()]
    return np.where(u > 0, 1.0, 0.0), (case.y_bar * np.reshape(slope, u.shape),), None
