"""Finds what a rule's `backward` needs, by tracing it once on types alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.core import Tracer

from ._arrays import ArrayType, is_inexact
from ._behaviour import Answer, Perturbed
from ._conform import noting
from ._cotangents import Cotangents
from ._kept import Kept
from ._pullback import zero_of
from ._session import Session
from ._used import used_arguments

Run: TypeAlias = Callable[[Kept, Callable[[Any], Cotangents], Any, Any], Answer]
"""Runs `backward` on what was kept, a pullback, `y_bar` and `updates_bar`."""


def needed(
    session: Session,
    everything: Kept,
    run: Run,
    *,
    asks_updates: bool,
    absent: Callable[[ArrayType], Any],
    zeros: Sequence[bool],
) -> tuple[dict[str, list[bool]], list[bool]] | None:
    """Says which of the arrays that could be kept are needed.

    Args:
        session: the call.
        everything: all of them.
        run: the rule.
        asks_updates: whether the rule gets `updates_bar`.
        absent: what `y_bar` has for an output without a cotangent.
        zeros: for each output, whether it has none.

    Returns:
        By group, which arrays are needed; and which results of the pullback. `None` if the rule can't be
        traced on types, because it branches on values or because it is wrong; then everything is needed.
    """
    trace = _Trace(session, everything, run, absent, zeros, list(everything.facts.updates) if asks_updates else None)
    try:
        with noting():
            used = used_arguments(trace, trace.types)
    except Exception:  # what is wrong with the rule shows in the backward pass itself
        return None
    eager = not any(isinstance(array, Tracer) for group in everything.groups.values() for array in group)
    return trace.by_group(used, eager=eager), trace.results(used, eager=eager)


def formally(
    session: Session, everything: Kept, run: Run, *, absent: Callable[[ArrayType], Any]
) -> tuple[list[Any], set[str]]:
    """Runs `backward` within a trace on any cotangents, so that the trace shows what it does with them.

    Args:
        session: the call.
        everything: all arrays that could be kept.
        run: the rule.
        absent: what `y_bar` has for an output that can't have a cotangent.

    Returns:
        Its results, and the groups of arrays that it looked at.
    """
    zeros = [False] * len(everything.facts.outputs)
    trace = _Trace(session, everything, run, absent, zeros, None, keys=True)
    return trace(trace.formal()), trace.touched


class _Trace:
    """`backward` as a function of a flat list of arrays, to the list of the cotangents that are asked for."""

    def __init__(
        self,
        session: Session,
        everything: Kept,
        run: Run,
        absent: Callable[[ArrayType], Any],
        zeros: Sequence[bool],
        updates: list[ArrayType] | None,
        *,
        keys: bool = False,
    ):
        self._session, self._everything, self._run, self._absent = session, everything, run, absent
        self.touched: set[str] = set()
        facts = everything.facts
        self._places = [
            (name, index)
            for name, types in facts.types.items()
            for index, type_ in enumerate(types)
            if _has_zeros(type_) or (keys and type_ is not None)
        ]
        self._able = [type_.is_inexact and not zero for type_, zero in zip(facts.outputs, zeros, strict=True)]
        self._pulled = [*session.variables_types, *facts.types["arrays"]]
        self._updates = updates
        known: list[Any] = [facts.types[name][index] for name, index in self._places]
        bars = [type_ for type_, able in zip(facts.outputs, self._able, strict=True) if able]
        pulled = [type_ for type_ in self._pulled if type_ and type_.is_inexact]
        updates_able = [type_ for type_ in updates or () if type_.is_inexact]
        self._start = len(known) + len(bars)
        self._count = len(pulled)
        self.types: list[ArrayType] = [*known, *bars, *pulled, *updates_able]

    def __call__(self, leaves: list[Any]) -> list[Any]:
        facts = self._everything.facts
        rest = iter(leaves)
        groups = {name: list(group) for name, group in self._everything.groups.items()}
        for name, index in self._places:
            groups[name][index] = next(rest)
        bars = zip(facts.outputs, self._able, strict=True)
        y_bar = facts.output.fill_arrays_only([next(rest) if able else self._absent(type_) for type_, able in bars])
        pulled = [next(rest) if type_ and type_.is_inexact else None for type_ in self._pulled]
        updates_bar = None
        if self._updates is not None:
            flat = [next(rest) if type_.is_inexact else zero_of(type_) for type_ in self._updates]
            updates_bar = facts.updates_layout.fill_arrays_only(flat)
        kept = Kept(groups, [], facts, self.touched)
        pullback = _KnownPullback(self._session, pulled, self.touched)
        return _asked_for(self._session, self._run(kept, pullback, y_bar, updates_bar), facts.perturbed)

    def formal(self) -> list[Any]:
        """Lists arguments for a call: what is known, and operations of the right types for what is not."""
        groups = self._everything.groups
        unknown = [array for array in groups["output"] if is_inexact(array)]
        unknown += [array for array in (*groups["variables"], *groups["arrays"]) if is_inexact(array)]
        return [groups[name][index] for name, index in self._places] + list(jax.lax.optimization_barrier(unknown))

    def by_group(self, used: Sequence[bool], *, eager: bool) -> dict[str, list[bool]]:
        """Says which arrays are used, group by group."""
        found = {name: [array is not None for array in group] for name, group in self._everything.groups.items()}
        for (name, index), chosen in zip(self._places, used, strict=False):
            # Outside of a trace somebody may print what the rule looks at, so all of that is kept.
            found[name][index] = chosen or (eager and name in self.touched)
        return found

    def results(self, used: Sequence[bool], *, eager: bool) -> list[bool]:
        """Says which results of the pullback are used."""
        rest = iter(used[self._start : self._start + self._count])
        looked_at = eager and "pullback" in self.touched
        return [bool(type_ and type_.is_inexact) and (next(rest) or looked_at) for type_ in self._pulled]


class _KnownPullback:
    """A pullback with given results, for finding out which of them are needed."""

    def __init__(self, session: Session, pulled: Sequence[Any], touched: set[str]):
        self._session = session
        self._pulled = pulled
        self._touched = touched

    def __call__(self, y_bar: Any) -> Cotangents:
        self._touched.add("pullback")
        bars = [bar for bar in jax.tree.leaves(y_bar) if is_inexact(bar)]
        # One operation whose result depends on all operands; the values do not matter here.
        pulled = [None if bar is None else jax.lax.optimization_barrier((bar, bars))[0] for bar in self._pulled]
        count = len(self._session.variables_types)
        return self._session.signature.build(pulled[:count], pulled[count:], "inputs_first")


def _asked_for(session: Session, answer: Answer, perturbed: Perturbed) -> list[Any]:
    """Lists the cotangents of what is differentiated."""
    inputs = session.inputs
    found = list(zip(answer.variables, perturbed.variables, strict=True))
    found += zip(answer.own or (), perturbed.own, strict=True)
    parts = list(zip(inputs.differentiable, answer.inputs, strict=True))
    parts += [(inputs.keywords[name], flat) for name, flat in answer.keywords.items()]
    for part, flat in parts:
        found += [(bar, perturbed.arrays[index]) for bar, index in zip(flat, part.indices, strict=True)]
    return [bar for bar, able in found if able and bar is not None]


def _has_zeros(type_: ArrayType | None) -> bool:
    """Says whether an array can be left out: not a mutable one, nor a key, of which there are no zeros."""
    return type_ is not None and not type_.is_ref and not jnp.issubdtype(type_.dtype, jax.dtypes.extended)


def dead_pullback(session: Session) -> Callable[[Any], Cotangents]:
    """Makes what stands for a pullback on whose results nothing depends."""

    def pull(y_bar: Any) -> Cotangents:
        parts = [*session.signature.inputs, *session.signature.keywords.values()]
        arrays = {index: type_ for part in parts for index, type_ in zip(part.indices, part.types, strict=True)}
        zeros = {index: zero_of(type_) if type_.is_inexact else None for index, type_ in arrays.items()}
        return session.signature.build(
            list(map(zero_of, session.variables_types)), [zeros[index] for index in range(len(zeros))], "inputs_first"
        )

    return pull
