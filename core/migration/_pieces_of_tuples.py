"""Pieces of conversions that make several arrays of one, and one of several."""

from __future__ import annotations

import dataclasses
import itertools

from ._names import agreed_names
from ._pieces import Piece, inverse_order, numpy_of


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
        return (*axis_names[: self.at], agreed_names(axis_names[self.at : end]), *axis_names[end:])


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
        return Rearrange(inverse_order(self.order))

    def names(self, axis_names):
        return tuple(axis_names[place] for place in self.order)
