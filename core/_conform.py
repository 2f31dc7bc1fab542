"""Cotangents as users write them, checked against their arrays: forgiving in form, strict in meaning."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import numbers
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from ._arrays import ArrayType, Layout, is_array
from ._cotangents import Cotangents, Order
from ._errors import CotangentError
from ._paths import Path, leaves_with_paths, show


@dataclasses.dataclass(frozen=True)
class Note:
    """What a rule returned that was forgiven, for whoever checks rules: a missing cotangent, or another dtype."""

    argument: str
    path: Path
    expected: ArrayType
    came: ArrayType | None

    def __str__(self) -> str:
        came = "None" if self.came is None else str(self.came)
        return f"{came} for {self.argument}, which is {self.expected} at {show(self.path)}"


_notes: contextvars.ContextVar[list[Note] | None] = contextvars.ContextVar("crossvjp_notes", default=None)


@contextlib.contextmanager
def noting() -> Iterator[list[Note]]:
    """Collects the notes of all rules that run inside."""
    notes: list[Note] = []
    token = _notes.set(notes)
    try:
        yield notes
    finally:
        _notes.reset(token)


class Expected:
    """One argument of a call as its cotangent must look: the same tree, with a type for each array.

    Args:
        name: what errors call it, such as "`variables`" or "input 0".
        layout: where the arrays stand in the tree.
        types: their types, in the order of flattening.
    """

    def __init__(self, name: str, layout: Layout, types: Sequence[ArrayType]):
        self.name = name
        self.types = list(types)
        self.tree = layout.fill_arrays_only(self.types)

    def conform(self, given: Any, author: str) -> list[Any]:
        """Lists the cotangent of each array, `None` for zero, each in its primal's dtype.

        Raises:
            CotangentError: a leaf is missing, too many, of another shape, or of a dtype that can't be cast.
        """
        expected = leaves_with_paths(self.tree)
        if given is None:
            return [self._leaf(path, type_, None, author) for path, type_ in expected if type_ is not None]
        leaves, treedef = jax.tree.flatten(given, is_leaf=_is_none)
        if treedef != jax.tree.structure(self.tree, is_leaf=_is_none):
            leaves = self._by_path(expected, given, author)
        return [
            self._leaf(path, type_, leaf, author)
            for (path, type_), leaf in zip(expected, leaves, strict=True)
            if type_ is not None
        ]

    def _by_path(self, expected: list[tuple[Path, Any]], given: Any, author: str) -> list[Any]:
        """Finds the leaves by their paths, so that a dict does for a FrozenDict and a State for a Module."""
        at = {_unboxed(path): index for index, (path, _) in enumerate(expected)}
        found: dict[int, Any] = {}
        for path, leaf in leaves_with_paths(_with_dicts(given)):
            if leaf is None:  # for a leaf, boxed or not, or for all below a node, whatever the names there
                found |= {
                    index: None
                    for index, (other, _) in enumerate(expected)
                    if other[: len(path)] == path or _unboxed(other) == _unboxed(path)
                }
            elif _unboxed(path) in at:
                found[at[_unboxed(path)]] = leaf
            else:
                raise CotangentError(
                    f"{author}'s cotangent of {self.name} has a leaf at {show(path)} where {self.name} has none. "
                    f"Its leaves are at {_listed(expected)}."
                )
        missing = [path for index, (path, type_) in enumerate(expected) if type_ is not None and index not in found]
        if missing:
            raise CotangentError(
                f"{author}'s cotangent of {self.name} has no leaf at {show(missing[0])}. "
                f"Expected leaves at {_listed(expected)}; None stands for a zero cotangent."
            )
        return [found.get(index) for index in range(len(expected))]

    def _leaf(self, path: Path, type_: ArrayType, leaf: Any, author: str) -> Any:
        if not type_.is_inexact:
            return None
        zero: Any = leaf if isinstance(leaf, SymbolicZero) else None
        if zero is not None and tuple(zero.shape) != type_.shape:
            raise CotangentError(
                f"{author}'s cotangent of {self.name} must be {type_} at {show(path)}, but is a SymbolicZero of "
                f"{ArrayType(tuple(zero.shape), zero.dtype)}. None stands for zero too."
            )
        if leaf is None or zero is not None:
            self._note(path, type_, None)
            return None
        if isinstance(leaf, numbers.Number):
            leaf = jnp.asarray(leaf)
        if not is_array(leaf):
            raise CotangentError(
                f"{author}'s cotangent of {self.name} must be {type_} at {show(path)}, "
                f"but is of type {type(leaf).__name__}."
            )
        came = ArrayType.of(leaf)
        if came.dtype == jax.dtypes.float0:
            self._note(path, type_, came)
            return None
        castable = jnp.issubdtype(came.dtype, jnp.number) or came.dtype == jnp.bool_
        loses = jnp.issubdtype(came.dtype, jnp.complexfloating) and not jnp.issubdtype(type_.dtype, jnp.complexfloating)
        if came.shape != type_.shape or loses or came.is_ref or not castable:
            hint = "; take its real part" if loses and came.shape == type_.shape else ""
            raise CotangentError(
                f"{author}'s cotangent of {self.name} must be {type_} at {show(path)}, but is {came}{hint}."
            )
        if came.dtype == type_.dtype:
            return leaf
        self._note(path, type_, came)
        return jnp.asarray(leaf).astype(type_.dtype)

    def _note(self, path: Path, type_: ArrayType, came: ArrayType | None) -> None:
        notes = _notes.get()
        if notes is not None:
            notes.append(Note(self.name, path, type_, came))


class Signature:
    """All cotangents of one call: those of its inputs, of its keyword inputs, and of the variables, if it has any."""

    def __init__(self, inputs: Sequence[Expected], keywords: dict[str, Expected], variables: Expected | None):
        self.inputs = list(inputs)
        self.keywords = keywords
        self.variables = variables

    def conform(
        self, result: Any, order: Order, author: str
    ) -> tuple[list[list[Any]], dict[str, list[Any]], list[Any]]:
        """Reads what a backward rule returned; gives flat cotangents of inputs, keywords and variables.

        Raises:
            CotangentError: not one cotangent for each input and one for the variables, in this order.
        """
        named = isinstance(result, Cotangents)
        if named:
            inputs, variables, keywords = result.inputs, result.variables, result.keywords
        else:
            inputs, variables = self._split(result, order, author)
            keywords = {}
        self._check_count(len(inputs), author)
        try:
            return self._conform(inputs, keywords, variables, author)
        except CotangentError as error:
            if not named and self._fits_reversed(result, order, author):
                raise self._wrong_order(order, author) from error
            raise

    def _conform(
        self, inputs: Sequence[Any], keywords: Any, variables: Any, author: str
    ) -> tuple[list[list[Any]], dict[str, list[Any]], list[Any]]:
        unknown = sorted(set(keywords) - set(self.keywords))
        if unknown:
            raise CotangentError(
                f"{author} returned a cotangent for the keyword input {unknown[0]!r}, but the call's keyword inputs "
                f"are {sorted(self.keywords)}."
            )
        flat = [expected.conform(bar, author) for expected, bar in zip(self.inputs, inputs, strict=True)]
        by_keyword = {name: self.keywords[name].conform(bar, author) for name, bar in keywords.items()}
        return flat, by_keyword, self.variables.conform(variables, author) if self.variables else []

    def _split(self, result: Any, order: Order, author: str) -> tuple[Sequence[Any], Any]:
        if not isinstance(result, tuple | list):
            named = "" if self.variables is None else "a Cotangents or "
            raise CotangentError(
                f"{author} must return {named}the tuple {self._documented(order)}, "
                f"but returned {type(result).__name__}."
            )
        if self.variables is None:
            return result, None
        self._check_count(len(result) - 1, author)
        return (result[:-1], result[-1]) if order == "inputs_first" else (result[1:], result[0])

    def _check_count(self, inputs: int, author: str) -> None:
        if inputs == len(self.inputs):
            return
        if self.variables is None:
            raise CotangentError(
                f"{author} must return one cotangent for each of the {len(self.inputs)} differentiable arguments, "
                f"{self._documented('inputs_first')}, but returned {inputs}."
            )
        raise CotangentError(
            f"{author} must return one cotangent for each of the {len(self.inputs)} differentiable inputs and one "
            f"for the variables, {self._documented('inputs_first')}, but returned {inputs} and one."
        )

    def _fits_reversed(self, result: Any, order: Order, author: str) -> bool:
        if self.variables is None or not jax.tree.leaves(result):  # nothing but None fits any order
            return False
        inputs, variables = (result[1:], result[0]) if order == "inputs_first" else (result[:-1], result[-1])
        try:
            self._conform(inputs, {}, variables, author)
        except CotangentError:
            return False
        return True

    def _wrong_order(self, order: Order, author: str) -> CotangentError:
        other: Order = "variables_first" if order == "inputs_first" else "inputs_first"
        return CotangentError(
            f"{author} returned its cotangents in the order {self._documented(other)}; expected "
            f"{self._documented(order)}. Turn them round, return a Cotangents, or pass order={other!r}"
            + (", the order of today's flax.linen.custom_vjp." if other == "variables_first" else ".")
        )

    def _documented(self, order: Order) -> str:
        bars = [f"{expected.name.replace(' ', '')}_bar" for expected in self.inputs]
        if self.variables is None:
            ordered = bars
        else:
            ordered = [*bars, "variables_bar"] if order == "inputs_first" else ["variables_bar", *bars]
        return f"({', '.join(ordered)}{',' if len(ordered) == 1 else ''})"


def _is_none(leaf: Any) -> bool:
    return leaf is None


def _with_dicts(tree: Any) -> Any:
    """Reads mappings of other kinds as dicts: JAX knows the keys of some, of others only positions."""

    def converted(node: Any) -> Any:
        return {str(key): _with_dicts(value) for key, value in node.items()} if isinstance(node, Mapping) else node

    return jax.tree.map(converted, tree, is_leaf=lambda node: isinstance(node, Mapping) or node is None)


def _unboxed(path: Path) -> Path:
    """Drops the key of a box around an array, such as an NNX Variable's or a Linen Partitioned's `value`."""
    return path[:-1] if path and path[-1] == "value" else path


def _listed(expected: list[tuple[Path, Any]]) -> str:
    paths = [show(path) for path, type_ in expected if type_ is not None]
    return ", ".join(paths[:8]) + (", ..." if len(paths) > 8 else "") or "none at all"
