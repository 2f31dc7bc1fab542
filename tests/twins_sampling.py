"""Slow twins of the rules for calls that draw; the draws are JAX's, the formulas around them NumPy's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from twins import twin

from crossvjp.rules import ReinMax, ScoreFunction, ShakeShake, StraightThroughGumbelSoftmax


def _softmax(logits):
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    return shares / shares.sum(-1, keepdims=True)


def _jacobian(p):
    """Gives the softmax's matrix of derivatives for each row of shares."""
    return np.stack([np.diag(row) - np.outer(row, row) for row in p])


@twin(StraightThroughGumbelSoftmax(temperature=0.7), key=0)
def perturbed_softmax(case):
    z = case.y + np.asarray(jax.random.gumbel(case.key, case.y.shape, jnp.float64))
    tau = case.rule.temperature
    jacobian = _jacobian(_softmax(z / tau))
    logits_bar = np.einsum("bji,bj->bi", jacobian, case.y_bar) / tau
    tau_bar = -np.einsum("bj,bji,bi->", case.y_bar, jacobian, z) / tau**2
    return np.eye(z.shape[-1])[z.argmax(-1)], *case.pull(logits_bar), {"temperature": tau_bar}


@twin(ReinMax(), key=1)
def heuns_rule(case):
    drawn = np.eye(case.y.shape[-1])[np.asarray(jax.random.categorical(case.key, jnp.asarray(case.y)))]
    p = _softmax(case.y)
    jacobian = 2 * _jacobian((p + drawn) / 2) - _jacobian(p) / 2
    return drawn, *case.pull(np.einsum("bji,bj->bi", jacobian, case.y_bar))


def cost_and_score(p, x, action):
    logits = x @ p["w"]
    cost = jnp.sum(x**2, -1) * (1 + action) + p["b"][action]
    return cost, jnp.take_along_axis(jax.nn.log_softmax(logits), action[:, None], -1)[:, 0]


VARIABLES = {"w": np.array([[0.4, -1.3], [-0.2, 0.0], [1.7, 0.9]]), "b": np.array([0.3, -0.2])}
X, ACTION = np.array([[1.0, -2.0, 0.5], [0.3, 0.7, -1.1]]), np.array([1, 0])


@twin(ScoreFunction(baseline=0.8), cost_and_score, VARIABLES, (X, ACTION))
def reinforce(case):
    w, (x, action) = case.variables["w"], case.inputs
    (cost, log_prob), (cost_bar, log_prob_bar) = case.y, case.y_bar
    weight = log_prob_bar + cost_bar * (cost - case.rule.baseline)
    drawn = np.eye(2)[action]
    logits_bar = weight[:, None] * (drawn - _softmax(x @ w))
    x_bar = logits_bar @ w.T + (cost_bar * (1 + action))[:, None] * 2 * x
    return (cost, log_prob), (x_bar, None), {"w": x.T @ logits_bar, "b": drawn.T @ cost_bar}


def _shares(key, batch):
    return [np.asarray(jax.random.uniform(jax.random.fold_in(key, at), (batch, 1), jnp.float64)) for at in (0, 1)]


@twin(ShakeShake(), lambda p, a, b: (a + b) / 2, inputs=(X, X**2), key=2)
def mixed_branches(case):
    a, b = case.inputs
    alpha, beta = _shares(case.key, len(a))
    return alpha * a + (1 - alpha) * b, (beta * case.y_bar, (1 - beta) * case.y_bar), None


@twin(ShakeShake(), lambda p, a, b: p["scale"] * (a + b) / 2, {"scale": np.array(3.0)}, (X, X**2), key=3)
def mixed_branches_of_a_module(case):
    a, b = case.inputs
    alpha, beta = _shares(case.key, len(a))
    mixed, c = alpha * a + (1 - alpha) * b, 3 * case.y_bar
    return 3 * mixed, (beta * c, (1 - beta) * c), {"scale": (case.y_bar * mixed).sum()}
