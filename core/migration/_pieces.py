"""Conversions in small invertible pieces: each takes a tuple of arrays and gives another, losing nothing.

Every piece is affine. What it does to a cotangent is its linear part, and to a second moment the absolute value of
that; all pieces here only move entries, turn their sign or add constants, so the parts are pieces as well.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import itertools
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._names import Names, renamed_axes


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
        return replace_at(arrays, self.at, arrays[self.at].transpose(self.axes))

    def inverse(self):
        return Transpose(inverse_order(self.axes), self.at)

    def names(self, axis_names):
        own = axis_names[self.at]
        return axis_names if own is None else replace_at(axis_names, self.at, tuple(own[axis] for axis in self.axes))


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
        return replace_at(arrays, self.at, arrays[self.at].reshape(self.after))

    def inverse(self):
        return Reshape(self.after, self.before, self.at)

    def names(self, axis_names):
        own = axis_names[self.at]
        return (
            axis_names if own is None else replace_at(axis_names, self.at, renamed_axes(own, self.before, self.after))
        )


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
        return replace_at(arrays, self.at, numpy_of(arrays[self.at]).flip(arrays[self.at], self.axes))

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
        return replace_at(arrays, self.at, xp.concatenate([blocks[block] for block in self.order], self.axis))

    def inverse(self):
        sizes = None if self.sizes is None else tuple(self.sizes[block] for block in self.order)
        return ReorderBlocks(self.axis, inverse_order(self.order), sizes, self.at)

    def names(self, axis_names):
        return axis_names


def replace_at(values: tuple[Any, ...], at: int, value: Any) -> tuple[Any, ...]:
    """Puts another value in one place of a tuple."""
    return (*values[:at], value, *values[at + 1 :])


def inverse_order(order: tuple[int, ...]) -> tuple[int, ...]:
    """Inverts a permutation."""
    return tuple(sorted(range(len(order)), key=order.__getitem__))


def numpy_of(*arrays: Any) -> ModuleType:
    """Gives the module that handles these arrays: NumPy, or JAX's where one of them is JAX's."""
    return jnp if any(isinstance(array, jax.Array) for array in arrays) else np
