"""A rule means the same in every framework."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ._linearized import Linearized, close, require
from ._report import Check
from ._subject import Subject
from ._transforms import inexact_and_others


def _same_everywhere(subjects: Sequence[Subject], use: Callable[..., Any]) -> None:
    """Compares what the subjects of one model give, and their gradients, in the names and layouts that they share."""
    by_model: dict[str, list[Subject]] = {}
    for subject in subjects:
        by_model.setdefault(subject.model, []).append(subject)
    groups = [group for group in by_model.values() if len(group) > 1]
    require(bool(groups), "fewer than two subjects are comparable")
    for first, *others in groups:
        expected = _common(first, use)
        for other in others:
            for what, one, its in zip(("output", "gradient"), _common(other, use), expected, strict=True):
                close(one, its, f"{other.name} has another {what} than {first.name}")


def _common(subject: Subject, use: Callable[..., Any]) -> Any:
    """Gives the output, and the cotangents of the variables, in the common layout, and of the inputs.

    Under grad(jit), where everything runs after the framework's own frame is gone.
    """
    linearized = Linearized(subject, use, around=jax.jit)
    bars = linearized([jnp.cos(jnp.arange(leaf.size, dtype=leaf.dtype)).reshape(leaf.shape) for leaf in linearized.out])
    _, fill = inexact_and_others(subject.variables)
    assert subject.common is not None  # only such subjects are compared
    variables_bar = subject.common(fill(bars[: linearized.count]))
    inputs = len(inexact_and_others(subject.inputs)[0])
    return linearized.out, (variables_bar, bars[len(bars) - inputs :])


SAME_EVERYWHERE = Check("the same in every framework", _same_everywhere)
