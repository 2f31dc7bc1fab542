"""Calls that repeat within one trace: the second becomes a program, which those after it share.

A model calls the same kind of layer again and again. What JAX makes of a call under a rule (the derivative of the
module, its transpose, what is kept between the passes) is the same for all calls that compute the same, so it is
made once, and `jax.jit` keeps it with the program. Only what the module computes is traced each time, and compared:
so whatever a module reads of its surroundings is seen, and its names, counters and state are its own. The rule is
not run again if it stands on a module that is configured like the one before, since rules are pure as all functions
are that JAX transforms; where no more is known of the module, as in Haiku of one whose rule may look at names, or the
function is another one, what the rule computes is traced and compared, too.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax

from ._arrays import ArrayType
from ._behaviour import Behaviour, Primals, is_coming, run_alone
from ._closures import name_of
from ._programs import is_closed, program_of, same_program
from ._session import Outcome, Session
from ._traces import trace_state

Run = Callable[..., tuple[list[Any], list[Any]]]

_TRACES = 8  # how many are remembered: functions under `jax.jit` call one another, and come back
_SPARE_MISSES = 2  # how many calls more may be compared in vain than with success


def shared(session: Session, behaviour: Behaviour, groups: Sequence[Sequence[Any]], call: Run) -> Outcome | None:
    """Makes a call by the program of equal ones that came before it in this trace.

    Args:
        session: the call, which becomes part of a program itself.
        behaviour: its rule.
        groups: its arguments as `call` takes them: the rule's own arrays, values of closures (there are none),
            variables, context and inputs.
        call: gives the arrays of the output and of the updates.

    Returns:
        The outcome; `None` if the call has to be made by itself.
    """
    arrays = [array for group in groups for array in group]
    types = list(map(ArrayType.of, arrays))
    if is_coming() or any(type_.is_ref for type_ in types):
        return None
    kind = _kind(session, behaviour, types)
    if kind is None or kind.misses > kind.hits + _SPARE_MISSES:
        return None
    traced = _Traced.of(session, behaviour, groups, types, kind)
    found = None if traced is None else next((known for known in kind.known if traced.is_like(known)), None)
    if traced is None or (found is None and kind.known):
        kind.misses += 1
        kind.known += [] if traced is None else [traced]
        return None
    if found is None:  # where calls are of one kind, they mostly are the same
        found = traced
        kind.known.append(found)
    kind.hits += 1
    if found.run is None:
        found.run = _as_program(call, list(map(len, groups)), name_of(session.fn))
    out, updates = found.run(*arrays)
    return dataclasses.replace(traced.outcome, arrays=out, updates=updates)


@dataclasses.dataclass
class _Kind:
    """Calls of one kind in one trace: of the same rule and types."""

    compares_backward: bool
    names: bool  # whether the module's name counts
    known: list[_Traced] = dataclasses.field(default_factory=list)
    hits: int = 0
    misses: int = 0


@dataclasses.dataclass
class _Traced:
    """What one call computes: the module, and the rule too where it is compared."""

    outcome: Outcome
    updates_key: Any
    program: Any
    run: Run | None = None

    @staticmethod
    def of(
        session: Session,
        behaviour: Behaviour,
        groups: Sequence[Sequence[Any]],
        types: Sequence[ArrayType],
        kind: _Kind,
    ) -> _Traced | None:
        """Traces it; `None` where that does not work, or a program does more than return its results."""
        own, _, *others = groups
        cell: list[Outcome] = []

        def run(leaves: list[Any]) -> list[Any]:
            rest = iter(leaves)
            primals = Primals(*([next(rest) for _ in group] for group in (own, *others)))
            outcome = run_alone(session, primals)
            results = behaviour.formal_backward(session, primals, outcome) if kind.compares_backward else []
            if results is not None:
                cell.append(outcome.with_types())
            return [*outcome.arrays, *outcome.updates, *(results or ())]

        try:
            program = program_of(run, types)
        except Exception:  # the call itself shows what is wrong
            return None
        if not cell or not is_closed(program):
            return None
        return _Traced(cell[0], session.updates_key(cell[0].updates_layout, names=kind.names), program)

    def is_like(self, other: _Traced) -> bool:
        """Says whether another call computes the same."""
        return (
            self.outcome.layout == other.outcome.layout
            and self.updates_key == other.updates_key
            and same_program(self.program, other.program)
        )


class _Thread(threading.local):
    def __init__(self) -> None:
        self.kinds: list[tuple[Any, dict[Hashable, _Kind]]] = []


_thread = _Thread()


def _kinds() -> dict[Hashable, _Kind]:
    """Gives those of the current trace."""
    state = trace_state()
    for known, kinds in reversed(_thread.kinds):
        if known == state:
            return kinds
    _thread.kinds = [*_thread.kinds[1 - _TRACES :], (state, {})]
    return _thread.kinds[-1][1]


def _kind(session: Session, behaviour: Behaviour, types: Sequence[ArrayType]) -> _Kind | None:
    """Finds a call's kind; `None` for a first call, since many calls have no second."""
    if behaviour.key is None:
        return None
    avals = tuple(type_.aval for type_ in types)
    module = session.module_key(names=behaviour.reads_names)
    configured = None if module is None else (behaviour.key, avals, session.key, module)
    computing = (behaviour.key, avals, session.inputs.key) if behaviour.can_be_compared else None
    kinds = _kinds()
    for key, compares_backward in ((configured, False), (computing, True)):
        if key is None:
            continue
        try:
            known = kinds.get(key)
        except TypeError:  # something in it has no hash
            continue
        if known is not None:
            return known
        kinds[key] = _Kind(compares_backward, compares_backward or behaviour.reads_names)
    return None


def _as_program(call: Run, lengths: Sequence[int], name: str) -> Run:
    def flat(*arrays: Any) -> tuple[list[Any], list[Any]]:
        rest = iter(arrays)
        return call(*([next(rest) for _ in range(length)] for length in lengths))

    flat.__name__ = name
    return jax.jit(flat)
