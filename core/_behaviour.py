"""What differs between the ways to write a backward rule, as the mechanism sees it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import jax

from ._session import Outcome, Session


@dataclasses.dataclass(frozen=True)
class Primals:
    """The flat arguments of one call: the rule's own arrays, the variables, the context and the inputs."""

    own: Sequence[Any]
    variables: Sequence[Any]
    context: Sequence[Any]
    arrays: Sequence[Any]


class Perturbed(NamedTuple):
    """Which arguments of a call are differentiated; where JAX can't say, every floating array counts."""

    own: tuple[bool, ...]
    variables: tuple[bool, ...]
    context: tuple[bool, ...]
    arrays: tuple[bool, ...]


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a rule gave: flat cotangents, `None` for zero."""

    inputs: list[list[Any]]
    keywords: dict[str, list[Any]]
    variables: list[Any]
    own: list[Any] | None = None


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

    key: Any
    """All about the rule but its arrays, hashable: calls under rules with equal ones may share what JAX makes of them.

    `None` where they may not.
    """

    reads_names: bool
    """Whether it may tell modules apart by names alone."""

    can_be_compared: bool
    """Whether `formal_backward` may give something."""

    @property
    def author(self) -> str:
        """What errors call the rule."""
        ...

    def check(self, session: Session) -> None:
        """Refuses a call that the rule can't be put on."""
        ...

    def formal_backward(self, session: Session, primals: Primals, outcome: Outcome) -> list[Any] | None:
        """Runs the backward pass on any cotangents; `None` if it may do other things than the trace shows."""
        ...

    def release(self) -> None:
        """Lets go of the arrays: late runs get theirs as arguments."""
        ...

    def run(self, session: Session, primals: Primals) -> Outcome:
        """Runs what is computed where no gradient is asked for."""
        ...

    def forward(self, session: Session, primals: Primals, perturbed: Perturbed) -> tuple[Outcome, Any]:
        """Runs the forward pass; returns its outcome and the residuals, a pytree of arrays.

        `session.functions` are the forward and the backward functions to run.
        """
        ...

    def backward(self, session: Session, residuals: Any, y_bar: Any, updates_bar: Any) -> Answer:
        """Runs the rule."""
        ...


def run_alone(session: Session, primals: Primals) -> Outcome:
    """Runs `fn` itself."""
    return session.run(session.fn, primals.variables, primals.context, primals.arrays)


def is_coming() -> bool:
    """Says whether JAX's coming custom_vjp is on, which does not tell what is differentiated."""
    return bool(getattr(jax.config, "jax_custom_vjp3", False))
