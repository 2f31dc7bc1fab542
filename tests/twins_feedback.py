"""Feedback alignment, by the formulas of its papers."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from twins import twin

import crossvjp as cv
from crossvjp.rules import DirectFeedbackAlignment, FeedbackAlignment, SignSymmetry

rng = np.random.default_rng(11)
B = rng.normal(size=(3, 2)).astype(np.float32)  # as precise as the rule's


@twin(FeedbackAlignment(jnp.asarray(B)))
def feedback_alignment(case):
    return case.y, (case.y_bar @ B.T,), case.pull(case.y_bar)[1]


@twin(SignSymmetry(0.5))
def sign_symmetry(case):
    return case.y, (case.y_bar @ (0.5 * np.sign(case.variables["w"])).T,), case.pull(case.y_bar)[1]


DIRECT = rng.normal(size=(2, 4)), rng.normal(size=(2, 5))
NETWORK = {"a": rng.normal(size=(3, 4)), "b": rng.normal(size=(4, 5)), "c": rng.normal(size=(5, 2))}


@cv.rule
def its_own(call, y_bar):
    return call.pullback(y_bar)


def hidden(w, x, road):
    return jnp.tanh(x @ w), road


def with_direct_feedback(p, x):
    road = cv.Highway(x[:, :2])  # shaped like the output
    for name, B in zip("ab", DIRECT, strict=True):
        x, road = DirectFeedbackAlignment(jnp.asarray(B, x.dtype)).lift(hidden)(p[name], x, road)
    return road.depart(x @ p["c"])


@twin(its_own, of=DirectFeedbackAlignment, fn=with_direct_feedback, variables=NETWORK, stops=("inputs/0",))
def direct_feedback_alignment(case):
    (x,), p, error = case.inputs, case.variables, case.y_bar
    h = np.tanh(x @ p["a"])
    k = np.tanh(h @ p["b"])
    bars = {
        "a": x.T @ (error @ DIRECT[0] * (1 - h**2)),
        "b": h.T @ (error @ DIRECT[1] * (1 - k**2)),
        "c": k.T @ error,
    }
    return k @ p["c"], (None,), bars
