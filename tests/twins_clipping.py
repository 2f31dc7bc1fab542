"""Twins of the rules that bound cotangents, or move them to their mean."""

from __future__ import annotations

import numpy as np
from twins import twin

from crossvjp import rules


def norm(leaves):
    return np.sqrt(sum(np.sum(leaf**2) for leaf in leaves))


@twin(rules.ClipByValue(limit=0.4))
def clip_by_value(case):
    inputs_bar, g = case.pull(case.y_bar)
    return case.y, inputs_bar, {name: np.where(abs(leaf) > 0.4, 0.4 * np.sign(leaf), leaf) for name, leaf in g.items()}


@twin(rules.ClipByNorm(max_norm=0.5))
def clip_by_norm(case):
    inputs_bar, g = case.pull(case.y_bar)
    length = norm(g.values())
    assert length > 0.5  # so that the case clips
    return case.y, inputs_bar, {name: leaf * 0.5 / length for name, leaf in g.items()}


@twin(rules.ClipByNorm(max_norm=100.0))
def clip_by_norm_within(case):
    inputs_bar, g = case.pull(case.y_bar)
    return case.y, inputs_bar, g


@twin(rules.ClipOutputNorm(max_norm=0.5))
def clip_output_norm(case):
    length = norm([case.y_bar])
    assert length > 0.5
    return case.y, *case.pull(case.y_bar * 0.5 / length)


def clipped_unit(g, w, clipping, eps):
    limit = clipping * max(norm([w]), eps)
    return g * min(1.0, limit / norm([g]))


@twin(rules.AdaptiveGradientClipping(clipping=4.0, eps=1e-2))
def adaptive_gradient_clipping(case):
    inputs_bar, g = case.pull(case.y_bar)
    w, b = case.variables["w"], case.variables["b"]
    units = [clipped_unit(g["w"][:, i], w[:, i], 4.0, 1e-2) for i in range(2)]
    same = [np.array_equal(unit, g["w"][:, i]) for i, unit in enumerate(units)]
    assert sum(same) == 1  # one unit is clipped, the other not
    return case.y, inputs_bar, {"w": np.stack(units, 1), "b": clipped_unit(g["b"], b, 4.0, 1e-2)}


@twin(rules.AdaptiveGradientClipping(clipping=0.01, eps=5.0, unit_axis=0))
def adaptive_gradient_clipping_rows(case):
    inputs_bar, g = case.pull(case.y_bar)
    w, b = case.variables["w"], case.variables["b"]
    units = [clipped_unit(g["w"][i], w[i], 0.01, 5.0) for i in range(3)]
    return case.y, inputs_bar, {"w": np.stack(units), "b": clipped_unit(g["b"], b, 0.01, 5.0)}


@twin(rules.Centralize())
def centralize(case):
    inputs_bar, g = case.pull(case.y_bar)
    w = np.stack([column - np.sum(column) / 3 for column in g["w"].T], 1)
    return case.y, inputs_bar, {"w": w, "b": g["b"]}


@twin(rules.Centralize(unit_axis=0))
def centralize_rows(case):
    inputs_bar, g = case.pull(case.y_bar)
    return case.y, inputs_bar, {"w": np.stack([row - np.sum(row) / 2 for row in g["w"]]), "b": g["b"]}
