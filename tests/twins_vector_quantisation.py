"""Slow twins of the rules that pass a lookup of the nearest code."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from twins import twin

from crossvjp.rules import RotationTrick, VQStraightThrough


def nearest(p, z):
    distances = jnp.sum((z[..., None, :] - p["codes"]) ** 2, -1)
    return p["codes"][jnp.argmin(distances, -1)]


def _nearest(codes, z):
    return np.stack([min(codes, key=lambda code: np.sum((code - each) ** 2)) for each in z])


CODES = {"codes": np.array([[1.0, 0.5, -0.2], [-0.4, 2.0, 0.3]])}
Z = np.array([[0.8, 0.1, -0.5], [-1.0, 1.5, 0.2], [0.3, 0.2, 0.9]])


@twin(VQStraightThrough(), nearest, CODES, (Z,), stops=("variables/*",))
def past_the_lookup(case):
    return _nearest(case.variables["codes"], case.inputs[0]), (case.y_bar,), None


@twin(RotationTrick(), nearest, CODES, (Z,), stops=("variables/*",))
def rotated_back(case):
    (z,) = case.inputs
    codes = _nearest(case.variables["codes"], z)
    x_bar = []
    for e, q, c in zip(z, codes, case.y_bar, strict=True):
        e_length, q_length = np.linalg.norm(e), np.linalg.norm(q)
        e_hat, q_hat = e / e_length, q / q_length
        r = (e_hat + q_hat) / np.linalg.norm(e_hat + q_hat)
        rotation = np.eye(e.size) - 2 * np.outer(r, r) + 2 * np.outer(q_hat, e_hat)
        x_bar.append(q_length / e_length * rotation.T @ c)
    return codes, (np.array(x_bar),), None
