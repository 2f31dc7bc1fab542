"""One wrapped call while it is open: flat arrays in, flat arrays out, the same each time it runs."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters.ad import zeros_like_aval

from ._arrays import ArrayType, Layout, is_inexact, is_ref, take_apart
from ._boundary import Adapter, Boundary
from ._conform import Expected, Signature
from ._cotangents import Cotangents, Order
from ._errors import ArgumentError
from ._inputs import Input, Inputs
from ._paths import leaves_with_paths, show


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
        self._handle_functions: Sequence[Any] = ()
        self.variables, self.variables_def = jax.tree.flatten(boundary.variables)
        self.context, self._context_layout = take_apart(boundary.context)
        self.variables_types = tuple(map(ArrayType.of, self.variables))
        refs = filter(is_ref, (*self.context, *inputs.arrays))
        self.ref_type = next((ArrayType.of(ref) for ref in refs), None)
        self.signature = Spec(
            self.variables_def, self.variables_types, tuple(inputs.differentiable), inputs.keywords, with_variables
        )

    def with_functions(self, fn: Callable[..., Any], handle: Sequence[Any], rule: Sequence[Any]) -> Session:
        """Gives this session with other functions, of the same code, in the places of the user's."""
        session = copy.copy(self)
        session.fn, session._handle_functions, session.functions = fn, handle, rule
        return session

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
            return unpack(result) if unpack else (*take_apart(result), None)

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


def _refuse_refs(author: str, arrays: Sequence[Any], layout: Layout) -> None:
    if not any(map(is_ref, arrays)):
        return
    places = leaves_with_paths(layout.fill_arrays_only(arrays))
    path, ref = next((path, leaf) for path, leaf in places if is_ref(leaf))
    raise ArgumentError(
        f"{author} returns a {ArrayType.of(ref)} at {show(path)}, but a mutable array can only be an input of a "
        "function under a rule. Return its value, ref[...]."
    )


@dataclasses.dataclass(frozen=True)
class Spec:
    """The static shape of a call's cotangents; hashable, so it can stand in the treedef of a pullback."""

    variables_def: Any
    variables_types: tuple[ArrayType, ...]
    inputs: tuple[Input, ...]
    keywords: Any  # a dict of `Input`; frozen dataclasses compare by value
    with_variables: bool = True  # no cotangent of theirs is expected where there is no module

    def __hash__(self) -> int:
        return hash((self.variables_def, self.variables_types, len(self.inputs), tuple(sorted(self.keywords))))

    def build(self, variables: Sequence[Any], arrays: Sequence[Any], order: Order) -> Cotangents:
        """Puts flat cotangents into the trees of the variables and the inputs."""
        return Cotangents(
            tuple(part.cotangent(arrays) for part in self.inputs),
            jax.tree.unflatten(self.variables_def, variables),
            keywords={name: part.cotangent(arrays) for name, part in self.keywords.items()},
            order=order,
        )

    def expected(self) -> Signature:
        """The same, in the form that checks what a rule returned."""
        layout = Layout(self.variables_def, (None,) * len(self.variables_types))
        return Signature(
            [part.expected() for part in self.inputs],
            {name: part.expected() for name, part in self.keywords.items()},
            Expected("`variables`", layout, self.variables_types) if self.with_variables else None,
        )


@jax.tree_util.register_pytree_node_class
class Pullback:
    """The linear map from the cotangent of a module call's output to those of its inputs and variables.

    It is a pytree of the arrays that the forward pass kept, so it may be a residual, and it may be
    called any number of times.
    """

    def __init__(
        self,
        pull: Any,
        spec: Spec,
        inexact: tuple[bool, ...],
        layout: Layout,
        types: tuple[ArrayType, ...],
        order: Order,
    ):
        self._pull = pull
        self._static = (spec, inexact, layout, types, order)

    def __call__(self, y_bar: Any) -> Cotangents:
        """Pulls `y_bar` back.

        Args:
            y_bar: shaped like the call's output; `None`, whole or in part, stands for zero.

        Returns:
            The cotangents of the inputs, in the order of the call, and of the variables. Inputs
            and leaves without a gradient (integers, keys, objects) get `None`.

        Raises:
            CotangentError: `y_bar` does not have the structure or shapes of the output.
        """
        spec, inexact, layout, types, order = self._static
        flat = Expected("the output", layout, types).conform(y_bar, "The argument of this pullback")
        seeds = [
            zero_of(type_) if bar is None else bar for bar, type_ in zip(flat, types, strict=True) if type_.is_inexact
        ]
        variables, chosen = self._pull(seeds)
        rest = iter(chosen)
        return spec.build(variables, [next(rest) if able else None for able in inexact], order)

    def tree_flatten(self) -> tuple[tuple[Any], Any]:
        """Gives the residuals as the child, all else as static data."""
        return (self._pull,), self._static

    @classmethod
    def tree_unflatten(cls, static: Any, children: tuple[Any]) -> Pullback:
        """Rebuilds the pullback around other residuals."""
        return cls(children[0], *static)


def pick(mask: Sequence[bool], values: Sequence[Any]) -> list[Any]:
    """Lists the values whose mask is set."""
    return [value for chosen, value in zip(mask, values, strict=True) if chosen]


def merge(mask: Sequence[bool], chosen: Sequence[Any], others: Sequence[Any], *, compact: bool = False) -> list[Any]:
    """Puts `chosen` where the mask is set, and `others` elsewhere.

    `others` is as long as the mask, or, if `compact`, has just the entries that are used.
    """
    first = iter(chosen)
    second = iter(others if compact else pick([not able for able in mask], others))
    return [next(first) if able else next(second) for able in mask]


def without_refs(arrays: Sequence[Any]) -> list[Any]:
    """Puts `None` for mutable arrays: JAX lets none out of a forward pass."""
    return [None if is_ref(array) else array for array in arrays]


def zero_of(like: Any) -> Any:
    """Makes the zero cotangent of an array, its `ArrayType` or a symbolic zero, sharded and varying as that is."""
    if like.dtype == jax.dtypes.float0 or not jnp.issubdtype(like.dtype, jnp.inexact):
        return np.zeros(like.shape, jax.dtypes.float0)
    aval = like.aval if hasattr(like, "aval") else jax.typeof(like)
    return zeros_like_aval(aval.strip_weak_type())
