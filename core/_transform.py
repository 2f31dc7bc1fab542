"""The mechanism behind `custom_vjp` and `Rule`: one `jax.custom_vjp` around an open boundary, with nothing closed over.

Variables, context, inputs and a rule's own arrays are its arguments, all flat. A rule replaces the
pullback of the output with respect to the variables and the inputs. What it does not speak of
keeps the module's own derivative: variables outside `grad_vars`, and the values that the call
writes into the framework's state. That derivative is computed in the backward pass, from the call's
own arguments, and only if something there is differentiated.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero

from ._arrays import Layout, is_inexact
from ._errors import ArgumentError
from ._inputs import Handle, Inputs
from ._own_derivative import Bars, own_pullback, place
from ._session import Outcome, Session, zero_of


class Behaviour(Protocol):
    """What differs between the ways to write a rule."""

    arrays: Sequence[Any]
    """The rule's own arrays; arguments of the transform like all others."""

    asks_updates: bool
    """Whether `backward` takes care of the cotangents of the updates itself."""

    author: str
    """What errors call the rule."""

    def forward(
        self,
        session: Session,
        own: Sequence[Any],
        variables: Sequence[Any],
        context: Sequence[Any],
        arrays: Sequence[Any],
    ) -> tuple[Outcome, Any]:
        """Runs the forward pass; returns its outcome and the residuals, a pytree of arrays."""
        ...

    def backward(self, session: Session, residuals: Any, y_bar: Any, updates_bar: Any) -> tuple[Any, ...]:
        """Runs the rule; returns flat cotangents of inputs, keyword inputs and variables, `None` for zero."""
        ...


def transformed_call(
    fn: Callable[..., Any],
    behaviour: Behaviour,
    grad_vars: Any,
    nondiff_argnums: Sequence[int] | int,
    mdl: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Calls `fn(mdl, *args, **kwargs)` so that its backward pass is the given behaviour."""
    handle = Handle(mdl, args, kwargs)
    if handle.adapter.initializing(handle.opened):
        return fn(mdl, *args, **kwargs)
    inputs = Inputs(fn, args, kwargs, nondiff_argnums, handle.held)

    def body(boundary: Any) -> tuple[Any, Any]:
        session = Session(boundary, handle, inputs, fn)
        call = _OneCall(session, behaviour)
        out, updates = call(list(behaviour.arrays), session.variables, session.context, inputs.arrays)
        session.release()
        return call.layout.fill(out), call.updates_layout.fill(updates)

    out = handle.adapter.lift(handle.opened, grad_vars, body)
    inputs.arrays = []
    handle.release()
    return out


@dataclasses.dataclass(frozen=True)
class _Facts:
    """What the backward pass must know about its forward pass, static."""

    layout: Layout
    perturbed_context: tuple[bool, ...]
    perturbed_arrays: tuple[bool, ...]


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass
class _Kept:
    """The residuals of one forward pass. `primals` are references to the call's arguments, or empty."""

    residuals: Any
    primals: Any
    facts: _Facts

    def tree_flatten(self) -> tuple[Any, Any]:
        return (self.residuals, self.primals), self.facts

    @classmethod
    def tree_unflatten(cls, facts: _Facts, children: Any) -> _Kept:
        residuals, primals = children
        return cls(residuals, primals, facts)


class _OneCall:
    """One `jax.custom_vjp`, and the static half of what its runs return."""

    layout: Layout
    updates_layout: Layout

    def __init__(self, session: Session, behaviour: Behaviour):
        self._session = session
        self._behaviour = behaviour
        self._seen: Outcome | None = None

    def __call__(self, *groups: list[Any]) -> tuple[list[Any], list[Any]]:
        call = jax.custom_vjp(self._primal)
        # Symbolic zeros say what is differentiated at all, which decides what has to be kept. The
        # coming implementation of custom_vjp does not have them yet; then all counts as differentiated.
        call.defvjp(self._forward, self._backward, symbolic_zeros=not getattr(jax.config, "jax_custom_vjp3", False))
        self._ends = list(itertools.accumulate(map(len, groups)))
        # One argument an array: under remat, the coming implementation takes no trees.
        return call(*itertools.chain(*groups))

    def _grouped(self, flat: Sequence[Any]) -> list[list[Any]]:
        """Cuts the flat arguments into the rule's own arrays, variables, context and inputs."""
        return [list(flat[start:end]) for start, end in itertools.pairwise([0, *self._ends])]

    def _primal(self, *flat: Any) -> tuple[list[Any], list[Any]]:
        _, variables, context, arrays = self._grouped(flat)
        return self._record(self._session.run(self._session.fn, variables, context, arrays))

    def _record(self, outcome: Outcome) -> tuple[list[Any], list[Any]]:
        """Keeps the static half of a run's results, and checks that all runs agree."""
        if self._seen is not None:
            _check_same(self._seen, outcome)
        self.layout, self.updates_layout = outcome.layout, outcome.updates_layout
        self._seen = outcome.without_arrays()
        return outcome.arrays, outcome.updates

    def _forward(self, *flat: Any) -> tuple[tuple[list[Any], list[Any]], _Kept]:
        groups = self._grouped(flat)
        own, variables, context, arrays = map(_values, groups)
        outcome, residuals = self._behaviour.forward(self._session, own, variables, context, arrays)
        results = self._record(outcome)
        perturbed_context, perturbed_arrays = (tuple(map(_perturbed, group)) for group in groups[2:])
        keywords = [index for part in self._session.inputs.keywords.values() for index in part.indices]
        unspoken = any(perturbed_context) or any(perturbed_arrays[index] for index in keywords)
        needed = unspoken or any(map(is_inexact, outcome.updates))
        facts = _Facts(outcome.layout, perturbed_context, perturbed_arrays)
        return results, _Kept(residuals, (variables, context, arrays) if needed else (), facts)

    def _backward(self, kept: _Kept, results_bar: tuple[list[Any], list[Any]]) -> tuple[Any, ...]:
        y_bars, updates_bars = results_bar
        bars = Bars.zero(*(end - start for start, end in itertools.pairwise(self._ends)))
        spoken = self._add_rule(bars, kept, y_bars, updates_bars)
        self._add_rest(bars, kept, y_bars, updates_bars, spoken)
        return (*[None] * self._ends[0], *bars.variables, *bars.context, *bars.arrays)

    def _add_rule(self, bars: Bars, kept: _Kept, y_bars: list[Any], updates_bars: list[Any]) -> set[int]:
        """Runs the rule; returns the positions of the inputs that it answers for."""
        inputs, asked = self._session.inputs, self._behaviour.asks_updates
        spoken = {index for part in (*inputs.differentiable, *inputs.without_gradient) for index in part.indices}
        if all(map(_is_zero, y_bars)) and not (asked and not all(map(_is_zero, updates_bars))):
            return spoken  # the pullback of zero is zero, and a rule that normalises would make NaN of it
        y_bar = kept.facts.layout.fill_arrays_only(map(_materialized, y_bars))
        updates_bar = self.updates_layout.fill_arrays_only(map(_materialized, updates_bars)) if asked else None
        with self._session.boundary.closed():
            answer = self._behaviour.backward(self._session, kept.residuals, y_bar, updates_bar)
        by_position, by_keyword, bars.variables = answer
        for part, flat in zip(inputs.differentiable, by_position, strict=True):
            place(bars.arrays, part.indices, flat)
        for name, flat in by_keyword.items():
            place(bars.arrays, inputs.keywords[name].indices, flat)
            spoken |= set(inputs.keywords[name].indices)
        return spoken

    def _add_rest(self, bars: Bars, kept: _Kept, y_bars: list[Any], updates_bars: list[Any], spoken: set[int]) -> None:
        """Adds the module's own derivative of all that the rule does not speak of."""
        inputs, facts = self._session.inputs, kept.facts
        unspoken = [index for index, able in enumerate(facts.perturbed_arrays) if able and index not in spoken]
        updates_flow = not all(map(_is_zero, updates_bars))
        updates_unspoken = updates_flow and not self._behaviour.asks_updates
        if not (unspoken or updates_unspoken or any(facts.perturbed_context)):
            return
        pullback = own_pullback(self._session, kept.primals, facts.perturbed_context)
        sources = []
        if unspoken or any(facts.perturbed_context):
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


def _check_same(before: Outcome, outcome: Outcome) -> None:
    if before.layout != outcome.layout or before.output_types != outcome.output_types:
        first, second = (seen.layout.fill(map(str, seen.output_types)) for seen in (before, outcome))
        raise ArgumentError(
            "`forward_fn` must return a pair whose first element is the output of `fn`. "
            f"`fn` returned {first}, but the forward pass {second}."
        )
    if before.updates_layout != outcome.updates_layout:
        raise ArgumentError(
            "`forward_fn` must write the same state as `fn`. "
            f"`fn` wrote {before.updates_layout.treedef}, but the forward pass {outcome.updates_layout.treedef}."
        )


def _values(group: Any) -> list[Any]:
    return [leaf.value if isinstance(leaf, CustomVJPPrimal) else leaf for leaf in group]


def _perturbed(leaf: Any) -> bool:
    if isinstance(leaf, CustomVJPPrimal):
        return leaf.perturbed and is_inexact(leaf.value)
    return is_inexact(leaf)


def _is_zero(bar: Any) -> bool:
    return isinstance(bar, SymbolicZero) or bar.dtype == jax.dtypes.float0


def _materialized(bar: Any) -> Any:
    return zero_of(bar) if isinstance(bar, SymbolicZero) else bar
