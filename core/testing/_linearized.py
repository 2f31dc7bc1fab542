"""One differentiated call of a subject, and the words in which checks of rules compare."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from ._compare import assert_close
from ._report import NotApplicableError
from ._subject import Subject
from ._transforms import inexact_and_others

Use: TypeAlias = Callable[..., Any]


class Linearized:
    """One call of a subject, with its pullback: from cotangents of `(out, after)` to those of all arrays.

    Args:
        subject: the module.
        use: what is called with the live module.
        inputs: what to call it with, if not with the subject's own.
        around: transforms the call before it is differentiated.
    """

    def __init__(self, subject: Subject, use: Use, inputs: Any = None, around: Callable[[Any], Any] = lambda run: run):
        arrays = subject.variables, subject.rest, subject.inputs if inputs is None else inputs
        primals, fill = inexact_and_others(arrays)

        def run(primals: list[Any]) -> tuple[tuple[list[Any], list[Any]], Any]:
            variables, rest, inputs = fill(primals)
            out, after = subject.run(variables, rest, use, *inputs)
            return (inexact_and_others(out)[0], inexact_and_others(after)[0]), (out, after)

        (self.out, self.after), self._pull, self.seen = jax.vjp(around(run), primals, has_aux=True)
        self.count = len(inexact_and_others(subject.variables)[0])

    def y_bar(self, seed: int) -> list[Any]:
        """Draws a cotangent of the output."""
        keys = jax.random.split(jax.random.key(seed), max(1, len(self.out)))
        return [jax.random.normal(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, self.out, strict=False)]

    def __call__(self, y_bar: list[Any], after_bar: list[Any] | None = None) -> list[Any]:
        """Gives the cotangents of the variables, the rest and the inputs."""
        zeros = [jnp.zeros_like(leaf) for leaf in self.after]
        return self._pull((y_bar, zeros if after_bar is None else after_bar))[0]


def require(condition: bool, reason: str) -> None:
    """Ends a check as not applicable, unless the condition holds."""
    if not condition:
        raise NotApplicableError(reason)


def close(one: Any, other: Any, message: str, rtol: float = 1e-5) -> None:
    """Compares two trees as `assert_close` does, with a message of its own."""
    try:
        assert_close(one, other, rtol)
    except AssertionError as error:
        raise AssertionError(f"{message} ({error})") from None
