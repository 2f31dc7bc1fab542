"""The mechanism behind `custom_vjp` and `Rule`: one `jax.custom_vjp` around an open boundary, with nothing closed over.

Variables, context, inputs, a rule's own arrays and traced values that the functions close over are its
arguments, all flat. A rule replaces the
pullback of the output with respect to the variables and the inputs. What it does not speak of
keeps the module's own derivative: variables outside `grad_vars`, and the values that the call
writes into the framework's state. That derivative is computed in the backward pass, from the call's
own arguments, and only if something there is differentiated.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero

from ._arrays import Layout, as_array, is_inexact, is_ref
from ._behaviour import Behaviour, Perturbed, Primals, is_coming
from ._closures import Closures, name_of
from ._errors import ArgumentError
from ._own_derivative import Bars, own_pullback, place
from ._packing import Packing
from ._pullback import zero_of
from ._session import Outcome, Session, without_refs


class Functions:
    """The user's functions in a call: the one called, those of its handle, and those of its rule."""

    def __init__(self, session: Session, behaviour: Behaviour, handle_functions: Sequence[Any]):
        values = (session.fn, *handle_functions, *behaviour.forward_functions)
        self.closures = Closures(values, behaviour.backward_functions, session.opened)
        self._end_of_handle = 1 + len(handle_functions)

    def around(self, session: Session, closed: Sequence[Any]) -> Session:
        """Gives the session with functions that close over the given values of one run."""
        fn, *others = self.closures.fill(closed)
        end = self._end_of_handle - 1
        return session.with_functions(fn, others[:end], others[end:])


@dataclasses.dataclass(frozen=True)
class _Facts:
    """What the backward pass must know about its forward pass, static."""

    layout: Layout
    perturbed: Perturbed


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass
class _Kept:
    """The residuals of one forward pass. `primals` are references to the call's arguments, or empty."""

    residuals: Any
    closed: list[Any]
    primals: Any
    facts: _Facts

    def tree_flatten(self) -> tuple[Any, Any]:
        return (self.residuals, self.closed, self.primals), self.facts

    @classmethod
    def tree_unflatten(cls, facts: _Facts, children: Any) -> _Kept:
        residuals, closed, primals = children
        return cls(residuals, closed, primals, facts)


class OneCall:
    """One `jax.custom_vjp`, and the static half of what its runs return."""

    layout: Layout
    updates_layout: Layout

    def __init__(self, session: Session, behaviour: Behaviour, functions: Functions, optimize_remat: bool):
        self._session = session
        self._behaviour = behaviour
        self._functions = functions
        self._optimize_remat = optimize_remat
        self._seen: Outcome | None = None
        self._packing = Packing()

    def __call__(self, *groups: list[Any]) -> tuple[list[Any], list[Any]]:
        call = jax.custom_vjp(self._primal)
        # Symbolic zeros say what is differentiated at all, which decides what has to be kept. In the
        # coming implementation of custom_vjp they fail under remat, and with `optimize_remat` JAX has
        # none; and with them a mutable array that the rule writes is no residual inside of a loop, since JAX
        # does not see that it is an argument. Then all counts as differentiated.
        self._lacking = self._optimize_remat or is_coming() or any(map(is_ref, groups[0]))
        symbolic = not self._lacking
        call.defvjp(self._forward, self._backward, symbolic_zeros=symbolic, optimize_remat=self._optimize_remat)
        self._ends = list(itertools.accumulate(map(len, groups)))
        # One argument an array: under remat, the coming implementation takes no trees.
        return call(*itertools.chain(*groups))

    def _grouped(self, flat: Sequence[Any]) -> list[list[Any]]:
        """Cuts the flat arguments into the rule's own arrays, closed-over ones, variables, context and inputs."""
        return [list(flat[start:end]) for start, end in itertools.pairwise([0, *self._ends])]

    def _primal(self, *flat: Any) -> tuple[list[Any], list[Any]]:
        own, closed, *others = map(_values, self._grouped(flat))
        session = self._functions.around(self._session, closed)
        return self._record(self._behaviour.run(session, Primals(own, *others)))

    def _record(self, outcome: Outcome) -> tuple[list[Any], list[Any]]:
        """Keeps the static half of a run's results, and checks that all runs agree."""
        if self._seen is not None:
            forward = [name_of(function) for function in self._behaviour.forward_functions]
            named = forward[0] if len(forward) == 1 else "the rule"  # which may hold any number of functions
            _check_same(self._seen, outcome, name_of(self._session.fn), named)
        self.layout, self.updates_layout = outcome.layout, outcome.updates_layout
        self._seen = outcome.without_arrays()
        return outcome.arrays, outcome.updates

    def _forward(self, *flat: Any) -> tuple[tuple[list[Any], list[Any]], Any]:
        is_late = self._seen is not None  # part of a program, which may run again with other arguments differentiated
        groups = self._grouped(flat)
        own, closed, variables, context, arrays = map(_values, groups)
        perturbed = Perturbed(*(tuple(map(_perturbed, group)) for group in (groups[0], *groups[2:])))
        session = self._functions.around(self._session, closed)
        primals = Primals(own, variables, context, arrays)
        outcome, residuals = self._behaviour.forward(session, primals, perturbed)
        results = self._record(outcome)
        keywords = [index for part in session.inputs.keywords.values() for index in part.indices]
        unspoken = any(perturbed.context) or any(perturbed.arrays[index] for index in keywords)
        needed = unspoken or any(map(is_inexact, outcome.updates))
        facts = _Facts(outcome.layout, perturbed)
        kept = tuple(map(without_refs, (own, variables, context, arrays))) if needed else ()
        all_kept = _Kept(residuals, self._functions.closures.kept_for_backward(closed), kept, facts)
        if self._lacking:  # All uses keep the same, so that nothing is added to what the user's `forward` keeps.
            return results, all_kept
        spare = getattr(residuals, "spare", 0) + (0 if needed else len(flat) - len(closed))
        return results, self._packing.pack(all_kept, spare if is_late else None)

    def _backward(self, packed: Any, results_bar: tuple[list[Any], list[Any]]) -> tuple[Any, ...]:
        kept: _Kept = packed if self._lacking else self._packing.unpack(packed)
        y_bars, updates_bars = results_bar
        own, closed, *others = (end - start for start, end in itertools.pairwise([0, *self._ends]))
        bars = Bars.zero(own, *others)
        session = self._functions.around(self._session, kept.closed)
        spoken = self._add_rule(session, bars, kept, y_bars, updates_bars)
        self._add_rest(session, bars, kept, y_bars, updates_bars, spoken)
        return (*bars.own, *[None] * closed, *bars.variables, *bars.context, *bars.arrays)

    def _add_rule(
        self, session: Session, bars: Bars, kept: _Kept, y_bars: list[Any], updates_bars: list[Any]
    ) -> set[int]:
        """Runs the rule; returns the positions of the inputs that it answers for."""
        inputs, asked = session.inputs, self._behaviour.asks_updates
        spoken = {index for part in (*inputs.differentiable, *inputs.without_gradient) for index in part.indices}
        if all(map(is_zero, y_bars)) and not (asked and not all(map(is_zero, updates_bars))):
            return spoken  # the pullback of zero is zero, and a rule that normalises would make NaN of it
        symbolic = self._behaviour.symbolic_zeros
        y_bar = kept.facts.layout.fill_arrays_only(y_bars if symbolic else map(_materialized, y_bars))
        updates_bar = self.updates_layout.fill_arrays_only(map(_materialized, updates_bars)) if asked else None
        with session.boundary.closed():
            answer = self._behaviour.backward(session, kept.residuals, y_bar, updates_bar)
        bars.variables = answer.variables
        bars.own = bars.own if answer.own is None else answer.own
        for part, flat in zip(inputs.differentiable, answer.inputs, strict=True):
            place(bars.arrays, part.indices, flat)
        for name, flat in answer.keywords.items():
            place(bars.arrays, inputs.keywords[name].indices, flat)
            spoken |= set(inputs.keywords[name].indices)
        return spoken

    def _add_rest(
        self,
        session: Session,
        bars: Bars,
        kept: _Kept,
        y_bars: list[Any],
        updates_bars: list[Any],
        spoken: set[int],
    ) -> None:
        """Adds the module's own derivative of all that the rule does not speak of."""
        inputs, perturbed = session.inputs, kept.facts.perturbed
        unspoken = [index for index, able in enumerate(perturbed.arrays) if able and index not in spoken]
        updates_flow = not all(map(is_zero, updates_bars))
        updates_unspoken = updates_flow and not self._behaviour.asks_updates
        if not (unspoken or updates_unspoken or any(perturbed.context)):
            return
        primals = Primals(*map(_values, kept.primals))
        run = functools.partial(self._behaviour.run, session)
        pullback = own_pullback(run, primals, perturbed.context, session.ref_type)
        sources = []
        if unspoken or any(perturbed.context):
            sources.append(pullback([*map(_materialized, y_bars)], None))
        if updates_flow:
            sources.append(pullback(None, [*map(_materialized, updates_bars)]))
        for own in sources:
            place(bars.context, range(len(own.context)), own.context)
            place(bars.arrays, unspoken, [own.arrays[index] for index in unspoken])
        if updates_unspoken:
            through_updates = sources[-1]
            place(bars.variables, range(len(bars.variables)), through_updates.variables)
            answered = [index for part in inputs.differentiable for index in part.indices]
            answered += [index for part in inputs.keywords.values() for index in part.indices if index in spoken]
            place(bars.arrays, answered, [through_updates.arrays[index] for index in answered])


def _check_same(before: Outcome, outcome: Outcome, fn: str, forward: str) -> None:
    if before.layout != outcome.layout or before.output_types != outcome.output_types:
        first, second = (seen.layout.fill(map(str, seen.output_types)) for seen in (before, outcome))
        raise ArgumentError(
            f"The forward function {forward} must return a pair whose first element is the output of {fn}. "
            f"{fn} returned {first}, but {forward} {second}."
        )
    if before.updates_layout != outcome.updates_layout:
        raise ArgumentError(
            f"The forward function {forward} must write the same state as {fn}. "
            f"{fn} wrote {_shown(before.updates_layout)}, but {forward} {_shown(outcome.updates_layout)}."
        )


def _shown(layout: Layout) -> Any:
    """Fills a layout with words: a difference may be in what is no array."""
    return layout.fill(["an array"] * layout.statics.count(None))


def _values(group: Any) -> list[Any]:
    return [as_array(leaf.value if isinstance(leaf, CustomVJPPrimal) else leaf) for leaf in group]


def _perturbed(leaf: Any) -> bool:
    if isinstance(leaf, CustomVJPPrimal):
        return leaf.perturbed and is_inexact(as_array(leaf.value))
    return is_inexact(as_array(leaf))


def is_zero(bar: Any) -> bool:
    """Says whether an output has no cotangent: nothing depends on it, or it can have none, as whole numbers."""
    return isinstance(bar, SymbolicZero) or bar.dtype == jax.dtypes.float0


def _materialized(bar: Any) -> Any:
    return zero_of(bar) if isinstance(bar, SymbolicZero) else bar
