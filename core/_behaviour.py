"""What differs between the ways to write a backward rule, as the mechanism sees it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

from ._session import Outcome, Session


@dataclasses.dataclass(frozen=True)
class Perturbed:
    """Which arrays of a call are differentiated; where JAX can't say, every floating array counts."""

    variables: tuple[bool, ...]
    context: tuple[bool, ...]
    arrays: tuple[bool, ...]


class Behaviour(Protocol):
    """One rule on one call."""

    arrays: Sequence[Any]
    """The rule's own arrays; arguments of the transform like all others."""

    forward_functions: Sequence[Any]
    """The user's functions that run in the forward pass in place of `fn`."""

    backward_functions: Sequence[Any]
    """The user's functions that run in the backward pass alone."""

    asks_updates: bool
    """Whether `backward` takes care of the cotangents of the updates itself."""

    symbolic_zeros: bool
    """Whether `backward` gets JAX's symbolic zeros in `y_bar`, in place of arrays of zeros."""

    author: str
    """What errors call the rule."""

    def forward(
        self,
        session: Session,
        own: Sequence[Any],
        variables: Sequence[Any],
        context: Sequence[Any],
        arrays: Sequence[Any],
        perturbed: Perturbed,
    ) -> tuple[Outcome, Any]:
        """Runs the forward pass; returns its outcome and the residuals, a pytree of arrays.

        `session.functions` are the forward and the backward functions to run.
        """
        ...

    def backward(self, session: Session, residuals: Any, y_bar: Any, updates_bar: Any) -> tuple[Any, ...]:
        """Runs the rule; returns flat cotangents of inputs, keyword inputs and variables, `None` for zero."""
        ...
