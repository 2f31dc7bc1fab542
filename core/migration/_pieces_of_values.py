"""Pieces of conversions that change entries: by constants and signs."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from ._pieces import Identity, Piece, numpy_of, replace_at


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
        return replace_at(arrays, self.at, numpy_of(array).where(constants == 0, array, added))

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
        return replace_at(arrays, self.at, numpy_of(array).where(negated, -array, array))

    def inverse(self):
        return self

    def absolute(self):
        return Identity()

    def names(self, axis_names):
        return axis_names


def _by_blocks(array: Any, axis: int, values: tuple[Any, ...]) -> Any:
    """Spreads one value a block over the axis, in a shape that broadcasts against the array."""
    spread = np.repeat(np.asarray(values), array.shape[axis] // len(values) if array.ndim else 1)
    return spread.reshape([-1 if place == axis % array.ndim else 1 for place in range(array.ndim)])
