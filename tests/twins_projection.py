"""Twins of the rules that turn the gradient of whole weights."""

from __future__ import annotations

import jax
import numpy as np
from twins import twin

from crossvjp import rules


def without(g, w):
    """Takes the part along `w` out of `g`."""
    return g - np.sum(g * w) / np.sum(w * w) * w


@twin(rules.ProjectOrthogonal())
def project_orthogonal(case):
    inputs_bar, g = case.pull(case.y_bar)
    w = case.variables["w"]
    return case.y, inputs_bar, {"w": np.stack([without(g["w"][:, i], w[:, i]) for i in range(2)], 1), "b": g["b"]}


@twin(rules.ProjectOrthogonal(unit_axis=None))
def project_orthogonal_whole(case):
    inputs_bar, g = case.pull(case.y_bar)
    return case.y, inputs_bar, {"w": without(g["w"], case.variables["w"]), "b": g["b"]}


@twin(rules.Muon())
def muon(case):
    inputs_bar, g = case.pull(case.y_bar)
    left, values, right = np.linalg.svd(g["w"], full_matrices=False)
    values = values / (np.sqrt(np.sum(values**2)) + 1e-8)
    for _ in range(5):  # the polynomial acts on singular values alone
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return case.y, inputs_bar, {"w": left @ np.diag(values) @ right, "b": g["b"]}


def tasks(p, x):
    """Four tasks on one weight, of which some conflict and others don't."""
    h = x @ p["w"]
    return h[:, 0], 0.5 * h[:, 0] + h[:, 1], -(h[:, 1] ** 2), 0.1 * h[:, 0] * h[:, 1]


TRUNK = {"w": np.random.default_rng(2).normal(size=(3, 2))}
X = (np.random.default_rng(3).normal(size=(4, 3)),)


def surgery(case, orders):
    zeros = [np.zeros_like(part) for part in case.y_bar]
    alone = [[*zeros[:i], case.y_bar[i], *zeros[i + 1 :]] for i in range(4)]
    first = [case.pull(tuple(y_bar))[1]["w"] for y_bar in alone]
    total, conflicts, others = 0, 0, 0
    for i in range(4):
        g = first[i]
        for j in orders[i]:
            conflict = j != i and np.sum(g * first[j]) < 0
            if conflict:
                g = g - np.sum(g * first[j]) / np.sum(first[j] ** 2) * first[j]
            conflicts, others = conflicts + conflict, others + (j != i and not conflict)
        total = total + g
    assert conflicts > 2
    assert others > 2
    return case.y, case.pull(case.y_bar)[0], {"w": total}


@twin(rules.PCGrad(), tasks, TRUNK, X)
def pcgrad(case):
    return surgery(case, [[0, 1, 2, 3]] * 4)


@twin(rules.PCGrad(shuffle=True), tasks, TRUNK, X, key=1)
def pcgrad_in_random_order(case):
    keys = jax.random.split(case.key, 4)
    return surgery(case, [np.asarray(jax.random.permutation(key, np.arange(4))) for key in keys])


def heads(p, x):
    h = np.tanh(x) if isinstance(x, np.ndarray) else jax.numpy.tanh(x)
    h = h @ p["trunk"]
    return {"policy": h @ p["policy"], "value": h @ p["value"], "side": h[:, 0]}


HEADS = {
    "trunk": np.random.default_rng(4).normal(size=(3, 2)),
    "policy": np.random.default_rng(5).normal(size=(2, 2)),
    "value": np.random.default_rng(6).normal(size=(2,)),
}


@twin(rules.RouteCotangents({"value": "value", "policy": ["trunk*", "polic?"]}), heads, HEADS, X)
def route_cotangents(case):
    x = case.inputs[0]
    h = np.tanh(x)
    trunk, policy = case.variables["trunk"], case.variables["policy"]
    bar = case.y_bar
    side = np.stack([bar["side"], np.zeros_like(bar["side"])], 1)  # what no route chooses trains the trunk too
    variables_bar = {
        "policy": (h @ trunk).T @ bar["policy"],
        "value": (h @ trunk).T @ bar["value"],
        "trunk": h.T @ (bar["policy"] @ policy.T + side),
    }
    return case.y, case.pull(bar)[0], variables_bar
