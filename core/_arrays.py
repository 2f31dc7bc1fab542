"""Which leaves are arrays, which of them are differentiable, and trees that mix both with other things."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

# Types of arrays, and those that are no mutable ones: of tracers, the types of what they stand for. JAX's own classes
# take long to say so, and are asked of every leaf again and again. Users' types are not kept: they may hold anything.
_are_arrays: set[type] = set()
_are_no_refs: set[type] = set()


def is_array(leaf: Any) -> bool:
    """Says whether a leaf is traced by JAX. Python scalars are not: they pass through as they are."""
    kind = type(leaf)
    if kind in _are_arrays:
        return True
    if isinstance(leaf, np.ndarray | np.generic):
        return leaf.dtype.kind not in "OUSMm"  # objects, texts and times are nothing that JAX computes with
    found = isinstance(leaf, jax.Array) or is_ref(leaf)
    if found:
        _are_arrays.add(kind)
    return found


def as_array(leaf: Any) -> Any:
    """Makes an array of what JAX hands over for one.

    A Python number that is differentiated, `jax.grad(f)(1.0)`, arrives as one, though its tracer was an array, and a
    NumPy array as a wrapper in older versions of JAX. `None` stands for a mutable array that was not kept.
    """
    return leaf if leaf is None or is_array(leaf) else jnp.asarray(leaf)


def is_ref(leaf: Any) -> bool:
    """Says whether a leaf is a mutable array, `jax.Ref`: an input like others, without a gradient."""
    kind = type(leaf.aval) if isinstance(leaf, Tracer) else type(leaf)
    if kind in _are_no_refs:
        return False
    found = isinstance(leaf, jax.Ref)
    if not found and isinstance(leaf, jax.Array):
        _are_no_refs.add(kind)
    return found


def is_inexact(leaf: Any) -> bool:
    """Says whether a leaf has a gradient: a floating or complex array, NumPy's bfloat16 among them."""
    return is_array(leaf) and not is_ref(leaf) and has_gradient(leaf.dtype)


@functools.cache
def has_gradient(dtype: Any) -> bool:
    """Says whether arrays of a dtype have a gradient: those of floating and complex numbers.

    Kept by dtype, since JAX takes long to say so, and every leaf of every call asks.
    """
    return bool(jnp.issubdtype(dtype, jnp.inexact))


@dataclasses.dataclass(frozen=True)
class ArrayType:
    """Shape and dtype of an array, in the words that errors use."""

    shape: tuple[int, ...]
    dtype: Any
    is_ref: bool = False
    aval: Any = dataclasses.field(default=None, compare=False, repr=False)
    """JAX's type, which has the sharding and the varying axes of `shard_map` too."""

    @staticmethod
    def of(leaf: Any) -> ArrayType:
        """Reads the type off an array or a tracer; a type stays as it is."""
        if isinstance(leaf, ArrayType):
            return leaf
        if leaf.dtype == jax.dtypes.float0:
            return ArrayType(tuple(leaf.shape), leaf.dtype)
        aval = jax.typeof(leaf)  # its dtype is what JAX makes of NumPy's float64
        return ArrayType(aval.shape, aval.dtype, is_ref(leaf), aval)

    def __str__(self) -> str:
        array = f"{np.dtype(self.dtype).name if not self._is_extended else self.dtype}{list(self.shape)}"
        return f"Ref{{{array}}}" if self.is_ref else array

    @property
    def _is_extended(self) -> bool:
        return jnp.issubdtype(self.dtype, jax.dtypes.extended)

    @property
    def is_inexact(self) -> bool:
        """Says whether an array of this type has a gradient."""
        return not self.is_ref and has_gradient(self.dtype)


class Printed:
    """Prints as a type's words in the place of an array."""

    def __init__(self, type_: ArrayType):
        self._words = str(type_)

    def __repr__(self) -> str:
        return self._words


class Static:
    """A leaf that is no array, comparable so that it can stand in a treedef.

    Equality falls back on identity where `==` does not give a plain truth value.
    """

    __slots__ = ("value",)

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Static):
            return NotImplemented
        if self.value is other.value:
            return True
        try:
            return type(self.value) is type(other.value) and bool(self.value == other.value)
        except Exception:  # any class may define `==` as it likes; identity is what is left
            return False

    def __hash__(self) -> int:
        return hash(type(self.value))

    def __repr__(self) -> str:
        return f"Static({self.value!r})"


@dataclasses.dataclass(frozen=True)
class Layout:
    """The static half of a tree: its treedef, what its other leaves are, and where its arrays go."""

    treedef: Any
    statics: tuple[Static | None, ...]  # `None` where an array stands

    def __hash__(self) -> int:
        return hash(self.treedef)  # not each of the statics: that takes long, and layouts mostly differ by their trees

    def fill(self, arrays: Any) -> Any:
        """Rebuilds the tree around `arrays`, given in the order of flattening."""
        rest = iter(arrays)
        leaves = [next(rest) if static is None else static.value for static in self.statics]
        return jax.tree.unflatten(self.treedef, leaves)

    def fill_arrays_only(self, arrays: Any) -> Any:
        """Rebuilds the tree with `None` for every leaf that is no array, as cotangents have it."""
        rest = iter(arrays)
        leaves = [next(rest) if static is None else None for static in self.statics]
        return jax.tree.unflatten(self.treedef, leaves)


def take_apart(tree: Any) -> tuple[list[Any], Layout]:
    """Splits a tree into its arrays and everything else; `Layout.fill` is the inverse."""
    leaves, treedef = jax.tree.flatten(tree)
    arrays = [leaf for leaf in leaves if is_array(leaf)]
    return arrays, Layout(treedef, tuple(None if is_array(leaf) else Static(leaf) for leaf in leaves))
