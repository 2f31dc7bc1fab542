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

from ._arrays import ArrayType, Layout, is_inexact
from ._errors import ArgumentError
from ._inputs import Handle, Inputs
from ._session import Outcome, Session, merge, pick, zero_of


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
    updates_types: tuple[ArrayType, ...]
    perturbed_context: tuple[bool, ...]
    perturbed_arrays: tuple[bool, ...]

    def __hash__(self) -> int:
        return hash((self.perturbed_context, self.perturbed_arrays, self.updates_types))


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

    def __init__(self, session: Session, behaviour: Behaviour):
        self._session = session
        self._behaviour = behaviour
        self.layout: Layout
        self.updates_layout: Layout

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
        if self._outcome_layouts is not None:
            _check_same(self._outcome_layouts, outcome)
        self.layout, self.updates_layout = outcome.layout, outcome.updates_layout
        self._outcome_layouts = (outcome.layout, outcome.output_types, outcome.updates_layout)
        return outcome.arrays, outcome.updates

    _outcome_layouts: tuple[Layout, tuple[ArrayType, ...], Layout] | None = None

    def _forward(self, *flat: Any) -> tuple[tuple[list[Any], list[Any]], _Kept]:
        groups = self._grouped(flat)
        own, variables, context, arrays = map(_values, groups)
        outcome, residuals = self._behaviour.forward(self._session, own, variables, context, arrays)
        results = self._record(outcome)
        facts = _Facts(
            outcome.layout,
            tuple(map(ArrayType.of, outcome.updates)),
            tuple(_perturbed(leaf) for leaf in groups[2]),
            tuple(_perturbed(leaf) for leaf in groups[3]),
        )
        keywords = [index for part in self._session.inputs.keywords.values() for index in part.indices]
        unspoken = any(facts.perturbed_context) or any(facts.perturbed_arrays[index] for index in keywords)
        needed = unspoken or any(map(is_inexact, outcome.updates))
        return results, _Kept(residuals, (variables, context, arrays) if needed else (), facts)

    def _backward(self, kept: _Kept, bars: tuple[list[Any], list[Any]]) -> tuple[Any, ...]:
        session, facts = self._session, kept.facts
        y_bars, updates_bars = bars
        count = len(facts.perturbed_arrays)
        arrays_bar: list[Any] = [None] * count
        variables_bar: list[Any] = [None] * len(session.variables_types)
        spoken: set[int] = {index for part in session.inputs.without_gradient for index in part.indices}
        updates_asked = self._behaviour.asks_updates
        if not all(_is_zero(bar) for bar in y_bars) or (updates_asked and not all(map(_is_zero, updates_bars))):
            y_bar = facts.layout.fill_arrays_only([_materialized(bar) for bar in y_bars])
            updates_bar = self.updates_layout.fill_arrays_only([_materialized(bar) for bar in updates_bars])
            with session.boundary.closed():
                result = self._behaviour.backward(session, kept.residuals, y_bar, updates_bar)
            by_position, by_keyword, variables_bar = result
            for part, flat in zip(session.inputs.differentiable, by_position, strict=True):
                _place(arrays_bar, part.indices, flat)
            for name, flat in by_keyword.items():
                _place(arrays_bar, session.inputs.keywords[name].indices, flat)
                spoken |= set(session.inputs.keywords[name].indices)
        spoken |= {index for part in session.inputs.differentiable for index in part.indices}
        context_bar: list[Any] = [None] * len(facts.perturbed_context)
        rest = _Rest(session, kept, spoken)
        if rest.has_unspoken or (not updates_asked and not all(map(_is_zero, updates_bars))):
            seeds = [zero_of(bar) for bar in updates_bars] if updates_asked else [*map(_materialized, updates_bars)]
            rest.add([*map(_materialized, y_bars)], seeds, variables_bar, context_bar, arrays_bar)
        return (*[None] * len(self._behaviour.arrays), *variables_bar, *context_bar, *arrays_bar)


class _Rest:
    """The module's own derivative of everything that the rule does not speak of."""

    def __init__(self, session: Session, kept: _Kept, spoken: set[int]):
        self._session = session
        self._kept = kept
        facts = kept.facts
        self._arrays = [able and index not in spoken for index, able in enumerate(facts.perturbed_arrays)]
        self.has_unspoken = any(facts.perturbed_context) or any(self._arrays)

    def add(
        self,
        y_bars: list[Any],
        updates_bars: list[Any],
        variables_bar: list[Any],
        context_bar: list[Any],
        arrays_bar: list[Any],
    ) -> None:
        """Adds the own cotangents: of the unspoken for output and updates, of all else for the updates alone."""
        session, facts = self._session, self._kept.facts
        variables, context, arrays = self._kept.primals
        inexact = [is_inexact(array) for array in arrays]
        context_mask = facts.perturbed_context
        kinds: list[list[bool]] = []

        def primal(variables: Any, chosen_context: Any, chosen: Any) -> tuple[list[Any], list[Any]]:
            outcome = session.run(
                session.fn, variables, merge(context_mask, chosen_context, context), merge(inexact, chosen, arrays)
            )
            kinds[:] = [[is_inexact(array) for array in group] for group in (outcome.arrays, outcome.updates)]
            return pick(kinds[0], outcome.arrays), pick(kinds[1], outcome.updates)

        _, pull = jax.vjp(primal, variables, pick(context_mask, context), pick(inexact, arrays))
        y_seed, updates_seed = pick(kinds[0], y_bars), pick(kinds[1], updates_bars)
        own_variables, own_context, own_arrays = pull(([jax.numpy.zeros_like(bar) for bar in y_seed], updates_seed))
        for index, bar in enumerate(own_variables):
            variables_bar[index] = _sum(variables_bar[index], bar)
        where = [index for index, able in enumerate(inexact) if able]
        for index, bar in zip(where, own_arrays, strict=True):
            if not self._without_gradient(index):
                arrays_bar[index] = _sum(arrays_bar[index], bar)
        if self.has_unspoken:
            _, y_context, y_arrays = pull((y_seed, [jax.numpy.zeros_like(bar) for bar in updates_seed]))
            own_context = [a + b for a, b in zip(own_context, y_context, strict=True)]
            for index, bar in zip(where, y_arrays, strict=True):
                if self._arrays[index]:
                    arrays_bar[index] = _sum(arrays_bar[index], bar)
        _place(context_bar, [index for index, able in enumerate(context_mask) if able], own_context)

    def _without_gradient(self, index: int) -> bool:
        return any(index in part.indices for part in self._session.inputs.without_gradient)


def _check_same(before: tuple[Layout, tuple[ArrayType, ...], Layout], outcome: Outcome) -> None:
    layout, types, updates_layout = before
    if layout != outcome.layout or types != outcome.output_types:
        first, second = (
            layout_.fill([str(type_) for type_ in types_])
            for layout_, types_ in ((layout, types), (outcome.layout, outcome.output_types))
        )
        raise ArgumentError(
            "`forward_fn` must return a pair whose first element is the output of `fn`. "
            f"`fn` returned {first}, but the forward pass {second}."
        )
    if updates_layout != outcome.updates_layout:
        raise ArgumentError(
            "`forward_fn` must write the same state as `fn`. "
            f"`fn` wrote {updates_layout.treedef}, but the forward pass {outcome.updates_layout.treedef}."
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


def _place(target: list[Any], indices: Any, values: Sequence[Any]) -> None:
    for index, value in zip(indices, values, strict=True):
        target[index] = value


def _sum(bar: Any, own: Any) -> Any:
    return own if bar is None else bar + own
