"""Top-k with error feedback, entry by entry."""

from __future__ import annotations

import numpy as np
from twins import in_jax, twin

import crossvjp as cv
from crossvjp.rules import TopKErrorFeedback

ERROR = np.random.default_rng(9).normal(size=8).astype(np.float32)  # channels are made in float32


@twin(TopKErrorFeedback(cv.Overwrite(ERROR), k=3))
def top_k_error_feedback(case):
    inputs_bar, g = case.pull(case.y_bar)
    rest = np.concatenate([g["b"], g["w"].ravel()]) + np.asarray(case.rule.error.value)
    sent = np.zeros_like(rest)
    for _ in range(3):
        largest = np.argmax(np.abs(rest))
        sent[largest], rest[largest] = rest[largest], 0
    return (
        case.y,
        inputs_bar,
        {"b": sent[:2], "w": sent[2:].reshape(3, 2)},
        {"error": in_jax(case.rule.error).emit(rest)},
    )
