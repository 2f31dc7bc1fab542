"""Conversions in small invertible pieces: each takes a tuple of arrays and gives another, losing nothing.

Every piece is affine. What it does to a cotangent is its linear part, and to a second moment the absolute value of
that; all pieces here only move entries, turn their sign or add constants, so the parts are pieces as well.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

Names: TypeAlias = tuple[Any, ...] | None
"""What the axes of one array are called or sharded over, one entry an axis; `None` where nothing is said."""


class Piece(abc.ABC):
    """An invertible affine map of a tuple of arrays; works on NumPy arrays, JAX arrays and tracers."""

    @abc.abstractmethod
    def __call__(self, arrays: tuple[Any, ...]) -> tuple[Any, ...]:
        """Converts the arrays."""

    @abc.abstractmethod
    def inverse(self) -> Piece:
        """Gives the piece that undoes this one."""

    @abc.abstractmethod
    def names(self, axis_names: tuple[Names, ...]) -> tuple[Names, ...]:
        """Carries the names of the axes to where their axes go."""

    def linear(self) -> Piece:
        """Gives the piece without its constants, which is what cotangents and first moments go through."""
        return self

    def absolute(self) -> Piece:
        """Gives the piece without constants and signs, which is what second moments go through."""
        return self.linear()


def convert_by(pieces: Iterable[Piece], arrays: tuple[Any, ...]) -> tuple[Any, ...]:
    """Sends arrays through one piece after the other."""
    return functools.reduce(lambda converted, piece: piece(converted), pieces, arrays)


def names_by(pieces: Iterable[Piece], axis_names: tuple[Names, ...]) -> tuple[Names, ...]:
    """Sends the names of axes through one piece after the other."""
    return functools.reduce(lambda names, piece: piece.names(names), pieces, axis_names)


def inverse_of(pieces: Sequence[Piece]) -> tuple[Piece, ...]:
    """Gives the pieces that undo all of these."""
    return tuple(piece.inverse() for piece in reversed(pieces))


@dataclasses.dataclass(frozen=True)
class Identity(Piece):
    """Leaves every array as it is."""

    def __call__(self, arrays):
        return arrays

    def inverse(self):
        return self

    def names(self, axis_names):
        return axis_names


@dataclasses.dataclass(frozen=True)
class Transpose(Piece):
    """Permutes the axes of one array.

    Args:
        axes: where each axis of the result comes from, as for `jnp.transpose`.
        at: which array of the tuple.
    """

    axes: tuple[int, ...]
    at: int = 0

    def __call__(self, arrays):
        return _replace(arrays, self.at, arrays[self.at].transpose(self.axes))

    def inverse(self):
        return Transpose(_inverse_order(self.axes), self.at)

    def names(self, axis_names):
        own = axis_names[self.at]
        return axis_names if own is None else _replace(axis_names, self.at, tuple(own[axis] for axis in self.axes))


@dataclasses.dataclass(frozen=True)
class Reshape(Piece):
    """Merges and splits axes of one array, in row-major order.

    A merged axis is named after its parts as a `PartitionSpec` names it: ("a", "b") where both have names, "a" where
    only the major one has; a name of a minor axis alone can't be said of the merged one, and is dropped.

    Args:
        before: shape that the array has.
        after: shape that it gets.
        at: which array of the tuple.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]
    at: int = 0

    def __call__(self, arrays):
        return _replace(arrays, self.at, arrays[self.at].reshape(self.after))

    def inverse(self):
        return Reshape(self.after, self.before, self.at)

    def names(self, axis_names):
        own = axis_names[self.at]
        return axis_names if own is None else _replace(axis_names, self.at, _renamed(own, self.before, self.after))


@dataclasses.dataclass(frozen=True)
class Flip(Piece):
    """Turns axes of one array round.

    Args:
        axes: the axes.
        at: which array of the tuple.
    """

    axes: tuple[int, ...]
    at: int = 0

    def __call__(self, arrays):
        return _replace(arrays, self.at, numpy_of(arrays[self.at]).flip(arrays[self.at], self.axes))

    def inverse(self):
        return self

    def names(self, axis_names):
        return axis_names


@dataclasses.dataclass(frozen=True)
class ReorderBlocks(Piece):
    """Permutes blocks along an axis of one array, such as the gates of an LSTM.

    Args:
        axis: the axis that the blocks lie along.
        order: which block of the array stands at each place of the result.
        sizes: sizes of the array's blocks, in its own order; if left out, they are equal.
        at: which array of the tuple.
    """

    axis: int
    order: tuple[int, ...]
    sizes: tuple[int, ...] | None = None
    at: int = 0

    def __call__(self, arrays):
        array = arrays[self.at]
        xp = numpy_of(array)
        ends: Any = len(self.order) if self.sizes is None else tuple(itertools.accumulate(self.sizes))[:-1]
        blocks = xp.split(array, ends, self.axis)
        return _replace(arrays, self.at, xp.concatenate([blocks[block] for block in self.order], self.axis))

    def inverse(self):
        sizes = None if self.sizes is None else tuple(self.sizes[block] for block in self.order)
        return ReorderBlocks(self.axis, _inverse_order(self.order), sizes, self.at)

    def names(self, axis_names):
        return axis_names


@dataclasses.dataclass(frozen=True)
class AddConstant(Piece):
    """Adds a constant to each of the equal blocks along an axis of one array.

    Args:
        axis: the axis that the blocks lie along.
        constants: one number a block.
        at: which array of the tuple.
    """

    axis: int
    constants: tuple[float, ...]
    at: int = 0

    def __call__(self, arrays):
        array = arrays[self.at]
        constants = _by_blocks(array, self.axis, self.constants)
        # A block whose constant is 0 stays as it is: -0.0 + 0.0 would be 0.0.
        added = array + constants.astype(array.dtype)
        return _replace(arrays, self.at, numpy_of(array).where(constants == 0, array, added))

    def inverse(self):
        return AddConstant(self.axis, tuple(-constant for constant in self.constants), self.at)

    def linear(self):
        return Identity()

    def names(self, axis_names):
        return axis_names


@dataclasses.dataclass(frozen=True)
class Negate(Piece):
    """Turns the sign of some of the equal blocks along an axis of one array.

    Args:
        axis: the axis that the blocks lie along.
        negated: for each block, whether it is negated.
        at: which array of the tuple.
    """

    axis: int
    negated: tuple[bool, ...]
    at: int = 0

    def __call__(self, arrays):
        array = arrays[self.at]
        negated = _by_blocks(array, self.axis, self.negated)
        return _replace(arrays, self.at, numpy_of(array).where(negated, -array, array))

    def inverse(self):
        return self

    def absolute(self):
        return Identity()

    def names(self, axis_names):
        return axis_names


@dataclasses.dataclass(frozen=True)
class Split(Piece):
    """Cuts one array into several along an axis; they stand in its place in the tuple.

    Args:
        axis: the axis.
        sizes: sizes of the parts.
        at: which array of the tuple.
    """

    axis: int
    sizes: tuple[int, ...]
    at: int = 0

    def __call__(self, arrays):
        ends = tuple(itertools.accumulate(self.sizes))[:-1]
        parts = numpy_of(arrays[self.at]).split(arrays[self.at], ends, self.axis)
        return (*arrays[: self.at], *parts, *arrays[self.at + 1 :])

    def inverse(self):
        return Concatenate(self.axis, self.sizes, self.at)

    def names(self, axis_names):
        parts = (axis_names[self.at],) * len(self.sizes)
        return (*axis_names[: self.at], *parts, *axis_names[self.at + 1 :])


@dataclasses.dataclass(frozen=True)
class Concatenate(Piece):
    """Joins several arrays along an axis. Names of axes that the arrays don't agree on are dropped.

    Args:
        axis: the axis.
        sizes: the arrays' sizes along it.
        at: where the first of them stands in the tuple; the others follow.
    """

    axis: int
    sizes: tuple[int, ...]
    at: int = 0

    def __call__(self, arrays):
        parts = arrays[self.at : self.at + len(self.sizes)]
        joined = numpy_of(*parts).concatenate(parts, self.axis)
        return (*arrays[: self.at], joined, *arrays[self.at + len(self.sizes) :])

    def inverse(self):
        return Split(self.axis, self.sizes, self.at)

    def names(self, axis_names):
        end = self.at + len(self.sizes)
        return (*axis_names[: self.at], _agreed(axis_names[self.at : end]), *axis_names[end:])


@dataclasses.dataclass(frozen=True)
class Rearrange(Piece):
    """Permutes the arrays of the tuple.

    Args:
        order: which array stands at each place of the result.
    """

    order: tuple[int, ...]

    def __call__(self, arrays):
        return tuple(arrays[place] for place in self.order)

    def inverse(self):
        return Rearrange(_inverse_order(self.order))

    def names(self, axis_names):
        return tuple(axis_names[place] for place in self.order)


def _replace(values: tuple[Any, ...], at: int, value: Any) -> tuple[Any, ...]:
    return (*values[:at], value, *values[at + 1 :])


def _inverse_order(order: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(range(len(order)), key=order.__getitem__))


def numpy_of(*arrays: Any) -> ModuleType:
    """Gives the module that handles these arrays: NumPy, or JAX's where one of them is JAX's."""
    return jnp if any(isinstance(array, jax.Array) for array in arrays) else np


def _by_blocks(array: Any, axis: int, values: tuple[Any, ...]) -> Any:
    """Spreads one value a block over the axis, in a shape that broadcasts against the array."""
    spread = np.repeat(np.asarray(values), array.shape[axis] // len(values) if array.ndim else 1)
    return spread.reshape([-1 if place == axis % array.ndim else 1 for place in range(array.ndim)])


def _agreed(parts: tuple[Names, ...]) -> Names:
    if any(part is None for part in parts):
        return None
    return tuple(axis[0] if all(name == axis[0] for name in axis) else None for axis in zip(*parts, strict=True))


def _renamed(names: tuple[Any, ...], before: tuple[int, ...], after: tuple[int, ...]) -> tuple[Any, ...]:
    """Names the axes after a reshape, group by group of axes that have one product on both sides."""
    renamed: list[Any] = [None] * len(after)
    if 0 in before:
        return tuple(renamed)
    old = [axis for axis, size in enumerate(before) if size != 1]
    new = [axis for axis, size in enumerate(after) if size != 1]
    while old and new:
        group_old, group_new = [old.pop(0)], [new.pop(0)]
        while (had := math.prod(before[a] for a in group_old)) != (got := math.prod(after[a] for a in group_new)):
            (group_old if had < got else group_new).append((old if had < got else new).pop(0))
        known = [part for axis in group_old for part in _parts(names[axis])]
        if len(group_old) == 1 and len(group_new) == 1:
            renamed[group_new[0]] = names[group_old[0]]
        elif known and names[group_old[0]] is not None:
            # One name an axis as far as they go; the last axis, or the only one, takes the rest.
            *firsts, last = group_new
            for axis, part in zip(firsts, known, strict=False):
                renamed[axis] = part
            rest = tuple(known[len(firsts) :])
            renamed[last] = rest[0] if len(rest) == 1 else rest or None
    return tuple(renamed)


def _parts(name: Any) -> tuple[Any, ...]:
    return () if name is None else name if isinstance(name, tuple) else (name,)
