"""The wrapped function as a rule may run it again: pure, at other variables and inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from ._cotangents import Cotangents
from ._errors import ArgumentError
from ._inputs import Inputs
from ._pullback import Pullback
from ._session import Outcome, Session
from ._traces import trace_state


class Site:
    """One call that a rule is put on.

    Args:
        session: the call.
        context: gives the arrays of its context.
    """

    def __init__(self, session: Session, context: Callable[[], Sequence[Any]]):
        self._session = session
        self._context = context
        self._trace = trace_state()
        self.seen: Outcome | None = None
        """The last run's outcome; its arrays may belong to the trace of a loop's body."""
        self.seen_here: Outcome | None = None
        """The last run's outcome outside of loops and other transforms."""

    def run(self, variables: Any, inputs: Sequence[Any], keywords: Mapping[str, Any]) -> Any:
        """Runs the function; returns its output."""
        session, leaves = self._at(variables, inputs, keywords)
        outcome = session.run(session.fn, leaves, self._context(), session.inputs.arrays)
        self._see(outcome)
        return outcome.layout.fill(outcome.arrays)

    def linearize(
        self, variables: Any, inputs: Sequence[Any], keywords: Mapping[str, Any]
    ) -> tuple[Any, Pullback, Outcome]:
        """Runs the function; returns its output and its pullback."""
        session, leaves = self._at(variables, inputs, keywords)
        outcome, pullback = session.linearize(leaves, self._context(), session.inputs.arrays, "inputs_first")
        self._see(outcome)
        return outcome.layout.fill(outcome.arrays), pullback, outcome

    def conform_at(
        self, variables: Any, inputs: Sequence[Any], keywords: Mapping[str, Any]
    ) -> Callable[[Any, str], Cotangents]:
        """Gives the check of a rule's answer at other variables and inputs."""
        return self._at(variables, inputs, keywords)[0].as_cotangents

    def _see(self, outcome: Outcome) -> None:
        self.seen = outcome
        if trace_state() == self._trace:
            self.seen_here = outcome

    def _at(self, variables: Any, inputs: Sequence[Any], keywords: Mapping[str, Any]) -> tuple[Session, list[Any]]:
        session = self._session
        leaves, treedef = jax.tree.flatten(variables)
        if treedef != session.variables_def:
            raise ArgumentError(
                "The module must be run on variables with the structure of `call.variables`, "
                f"{session.variables_def}, but got {treedef}."
            )
        given = Inputs(session.fn, tuple(inputs), dict(keywords), (), ())
        return session.at(given, leaves), leaves
