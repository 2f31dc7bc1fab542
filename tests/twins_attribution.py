"""Attribution, unit by unit."""

from __future__ import annotations

import jax
import numpy as np
from twins import twin

from crossvjp.rules import DeconvNet, GuidedBackprop, LRPEpsilon

X = np.random.default_rng(7).normal(size=(4, 3))


def relu(p, x):
    return jax.nn.relu(x)


@twin(GuidedBackprop(), fn=relu, inputs=(X,))
def guided_backprop(case):
    return np.maximum(X, 0), (np.where((X > 0) & (case.y_bar > 0), case.y_bar, 0),), None


@twin(DeconvNet(), fn=relu, inputs=(X,))
def deconvnet(case):
    return np.maximum(X, 0), (np.where(case.y_bar > 0, case.y_bar, 0),), None


@twin(LRPEpsilon(0.1), stops=("variables/*",))
def lrp_epsilon(case):
    (x,), w, y = case.inputs, case.variables["w"], case.y
    relevance = np.zeros_like(x)
    for n, i, j in np.ndindex(*x.shape, w.shape[1]):
        sign = -1 if y[n, j] < 0 else 1
        relevance[n, i] += x[n, i] * w[i, j] / (y[n, j] + 0.1 * sign) * case.y_bar[n, j]
    return y, (relevance,), None


@twin(LRPEpsilon(0.1), fn=relu, inputs=(X,))
def lrp_epsilon_of_an_activation(case):
    y = np.maximum(X, 0)
    return y, (y / (y + 0.1) * case.y_bar,), None
