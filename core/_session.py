"""One wrapped call while it is open: flat arrays in, flat arrays out, the same each time it runs."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax

from ._ambient import ambient, entered
from ._arrays import ArrayType, Layout, is_inexact, is_ref, take_apart
from ._boundary import Adapter, Boundary
from ._cotangents import Cotangents, Order
from ._errors import ArgumentError
from ._highway import check_highways
from ._inputs import Inputs
from ._paths import leaves_with_paths, show
from ._pullback import Pullback, Spec, merge, pick, zero_of


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one run gave: the output's arrays and the updates' arrays, each with its static half."""

    arrays: list[Any]
    layout: Layout
    updates: list[Any]
    updates_layout: Layout
    extra: Any = None  # what the caller's `unpack` set aside; residuals, for a forward function

    @property
    def output_types(self) -> tuple[ArrayType, ...]:
        """The types of the output's arrays."""
        return tuple(map(ArrayType.of, self.arrays))

    def with_types(self) -> Outcome:
        """Gives the same with types in the places of arrays."""
        updates = list(map(ArrayType.of, self.updates))
        return Outcome(list(self.output_types), self.layout, updates, self.updates_layout)

    def without_arrays(self) -> Outcome:
        """Gives the static half: the types stand for the output's arrays."""
        return Outcome(list(self.output_types), self.layout, [], self.updates_layout)


class OpenedHandle(Protocol):
    """The user's module handle, as far as a session has to know it."""

    @property
    def adapter(self) -> Adapter | None:
        """The adapter that opened it, if it is a module."""
        ...

    @property
    def modules(self) -> Sequence[Any]:
        """The live modules that are opened for the call."""
        ...

    @property
    def key(self) -> Any:
        """How it is taken apart."""
        ...

    def split(self, inner: Any, functions: Sequence[Any]) -> tuple[Any, Sequence[Any]]:
        """Gives the handle that the user's function gets, and the modules that stand among the arguments."""
        ...


class Session:
    """An open boundary together with the call's arguments, everything flattened once.

    `run` takes all arrays as arguments and closes over none, so JAX may call it when and as often
    as it likes.
    """

    functions: Sequence[Any] = ()
    """Those of the rule that run in its forward and its backward pass."""

    def __init__(
        self,
        boundary: Boundary,
        handle: OpenedHandle,
        inputs: Inputs,
        fn: Callable[..., Any],
        *,
        with_variables: bool = True,
    ):
        self.boundary = boundary
        self.fn = fn
        self.inputs = inputs
        self.adapter = handle.adapter
        self.opened = handle.modules
        self._handle = handle
        self._ambient = ambient()
        self._handle_functions: Sequence[Any] = ()
        self.variables, self.variables_def = jax.tree.flatten(boundary.variables)
        self.context, self._context_layout = take_apart(boundary.context)
        self.variables_types = tuple(map(ArrayType.of, self.variables))
        refs = filter(is_ref, (*self.context, *inputs.arrays))
        self.ref_type = next((ArrayType.of(ref) for ref in refs), None)
        self.signature = Spec(
            self.variables_def, self.variables_types, tuple(inputs.differentiable), inputs.keywords, with_variables
        )

    @property
    def key(self) -> Any:
        """What a run depends on beside the module and the arrays; hashable if the user's values are."""
        return self.fn, self._ambient, self.inputs.key, self._handle.key

    def module_key(self, *, names: bool) -> Any:
        """What it depends on of the module; `None` if that is not known.

        Args:
            names: whether names count too, where they are all that tells modules apart.
        """
        # Third parties' boundaries may not say what they are.
        static = getattr(self.boundary, "static", None)
        if static is not None:
            return self.variables_def, self._context_layout, static
        return None if names else getattr(self.boundary, "unnamed", None)

    def updates_key(self, layout: Layout, *, names: bool) -> Any:
        """Says how the tree of updates looks, with or without the module's name."""
        described = None if names else getattr(self.boundary, "unnamed_updates", None)
        return layout if described is None else described(layout.fill_arrays_only([None] * layout.statics.count(None)))

    def with_functions(self, fn: Callable[..., Any], handle: Sequence[Any], rule: Sequence[Any]) -> Session:
        """Gives this session with other functions, of the same code, in the places of the user's."""
        session = copy.copy(self)
        session.fn, session._handle_functions, session.functions = fn, handle, rule
        return session

    def at(self, inputs: Inputs, variables: Sequence[Any]) -> Session:
        """Gives this session with other inputs and variables."""
        session = copy.copy(self)
        session.inputs = inputs
        types = tuple(map(ArrayType.of, variables))
        session.signature = dataclasses.replace(
            self.signature, variables_types=types, inputs=tuple(inputs.differentiable), keywords=inputs.keywords
        )
        return session

    def as_cotangents(self, result: Any, author: str) -> Cotangents:
        """Checks what a rule returned, and gives it with zeros for `None`."""
        inputs, keywords, variables = self.signature.expected().conform(result, "inputs_first", author)
        arrays: dict[int, Any] = {index: None for part in self.inputs.keywords.values() for index in part.indices}
        answered = zip(self.inputs.differentiable, inputs, strict=True)
        for part, flat in [*answered, *((self.inputs.keywords[name], flat) for name, flat in keywords.items())]:
            arrays |= zip(part.indices, map(_or_zero, flat, part.types), strict=True)
        bars = list(map(_or_zero, variables, self.variables_types))
        bar = self.signature.build(bars, [arrays[index] for index in range(len(arrays))], "inputs_first")
        return bar.replace(fields=result.fields if isinstance(result, Cotangents) else {})

    def release(self) -> None:
        """Lets go of the call's arrays: late runs get theirs as arguments, and JAX keeps what they run on."""
        self.variables = self.context = []
        self.opened = ()
        self.boundary.variables = self.boundary.context = None

    def run(
        self,
        fn: Callable[..., Any],
        variables: Sequence[Any],
        context: Sequence[Any],
        arrays: Sequence[Any],
        unpack: Callable[[Any], tuple[list[Any], Layout, Any]] | None = None,
    ) -> Outcome:
        """Runs `fn` on the module; what it returns is taken apart while the module is still alive."""

        def inner(mdl: Any) -> tuple[list[Any], Layout, Any]:
            user_mdl, held = self._handle.split(mdl, self._handle_functions)
            args, kwargs = self.inputs.rebuild(arrays, held)
            result = fn(user_mdl, *args, **kwargs)
            check_highways((args, kwargs), result[0] if unpack and isinstance(result, tuple) and result else result)
            return unpack(result) if unpack else (*take_apart(result), None)

        with entered(self._ambient):
            (out, layout, extra), updates = self.boundary.call(
                inner, jax.tree.unflatten(self.variables_def, variables), self._context_layout.fill(context)
            )
        outcome = Outcome(out, layout, *take_apart(updates), extra)
        _refuse_refs("The function", outcome.arrays, layout)
        _refuse_refs("The module's state", outcome.updates, outcome.updates_layout)
        return outcome

    def linearize(
        self, variables: Sequence[Any], context: Sequence[Any], arrays: Sequence[Any], order: Order
    ) -> tuple[Outcome, Pullback]:
        """Runs `fn` once, giving its output as `jax.vjp` computes it, and the pullback.

        A second plain run could differ by rounding, since JAX linearises some functions by other operations.
        """
        inexact = [is_inexact(array) for array in arrays]
        cell: list[Outcome] = []

        def primal(variables: Sequence[Any], chosen: Sequence[Any]) -> tuple[list[Any], tuple[list[Any], list[Any]]]:
            outcome = self.run(self.fn, variables, context, merge(inexact, chosen, arrays))
            cell.append(outcome)
            differentiable = [array for array in outcome.arrays if is_inexact(array)]
            return differentiable, ([array for array in outcome.arrays if not is_inexact(array)], outcome.updates)

        out, pull, (others, updates) = jax.vjp(primal, list(variables), pick(inexact, arrays), has_aux=True)
        traced = cell[-1]
        types = traced.output_types
        arrays_out = merge([type_.is_inexact for type_ in types], out, others, compact=True)
        pullback = Pullback(pull, self.signature, tuple(inexact), traced.layout, types, order)
        return Outcome(arrays_out, traced.layout, updates, traced.updates_layout), pullback


def _or_zero(bar: Any, type_: ArrayType) -> Any:
    return zero_of(type_) if bar is None and type_.is_inexact else bar


def _refuse_refs(author: str, arrays: Sequence[Any], layout: Layout) -> None:
    if not any(map(is_ref, arrays)):
        return
    places = leaves_with_paths(layout.fill_arrays_only(arrays))
    path, ref = next((path, leaf) for path, leaf in places if is_ref(leaf))
    raise ArgumentError(
        f"{author} returns a {ArrayType.of(ref)} at {show(path)}, but a mutable array can only be an input of a "
        "function under a rule. Return its value, ref[...]."
    )


def without_refs(arrays: Sequence[Any]) -> list[Any]:
    """Puts `None` for mutable arrays: JAX lets none out of a forward pass."""
    return [None if is_ref(array) else array for array in arrays]
