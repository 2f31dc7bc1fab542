"""Converts one layer's parameters and state, what changes with them, and the names of their axes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from .._paths import Path
from ._canonical import canonical_of, constants_of, filled_of, moves_of, own_of, settle_absent
from ._layer import Arrays, Canonical, Layer, Layout
from ._names import Names
from ._pieces import inverse_of, names_by, numpy_of
from ._registry import check_convertible
from ._remainder import Exact, Remainder, copied, recall_params, recall_state, where


@dataclasses.dataclass(frozen=True)
class Converted:
    """A layer's arrays in their new layout.

    Attributes:
        params: by the target's own paths.
        state: by the target's own paths; empty where the layer's state is not converted.
        remainder: give it to the next conversion of the result to come back bit for bit.
    """

    params: Arrays
    state: Arrays
    remainder: Remainder


def convert(
    source: Layer,
    source_layout: Layout,
    params: Arrays,
    state: Arrays,
    target: Layer,
    target_layout: Layout,
    remainder: Remainder | None = None,
) -> Converted:
    """Converts a layer's parameters and state; dtypes stay those of the source.

    Args:
        source: the layer that the arrays belong to.
        source_layout: its layout.
        params: its parameters, by their paths below it.
        state: its state, by the paths below it.
        target: the layer that they become.
        target_layout: its layout.
        remainder: what an earlier conversion gave beside these arrays.

    Raises:
        ArgumentError: the layers don't convert into each other, or not with these values or shapes.
    """
    check_convertible(source, source_layout, target, target_layout)
    known = Remainder({}, {}, {}) if remainder is None else remainder
    moves, back = moves_of(source, source_layout), moves_of(target, target_layout)
    arrays, constants = canonical_of(moves, params, "linear"), constants_of(moves, params)
    recall_params(known.params, arrays, constants)
    before, wanted = dict(arrays), constants_of(back, target.params)
    merged = settle_absent(source, target, target_layout, back, arrays)
    arrays |= filled_of(source, source_layout, target, back, arrays)
    for name in arrays:
        arrays[name] = _shifted(arrays[name], constants.get(name, 0.0), wanted.get(name, 0.0))
    summed = known.params.keys() | constants.keys() | wanted.keys() | merged.keys()
    exact = {
        name: Exact(before[name], constants.get(name, 0.0), merged.get(name, {}), arrays[name], wanted.get(name, 0.0))
        for name in summed & before.keys() & arrays.keys()
    }
    own_state, kept_state = _convert_state(source, source_layout, state, target, target_layout, known)
    left = Remainder(copied(exact), copied(kept_state), copied(own_state))
    return Converted(own_of(target, back, arrays, "linear"), own_state, left)


def convert_cotangents(
    source: Layer, source_layout: Layout, arrays: Arrays, target: Layer, target_layout: Layout
) -> Arrays:
    """Converts what changes with the parameters, their gradients and first moments: by the linear part alone.

    Arrays that the target lacks are left out; those that the source lacks are 0, or those of what they are part of.
    """
    return _convert_part(source, source_layout, arrays, target, target_layout, "linear")


def convert_second_moments(
    source: Layer, source_layout: Layout, arrays: Arrays, target: Layer, target_layout: Layout
) -> Arrays:
    """Converts squares of gradients, which have no sign: by the absolute value of the linear part."""
    return _convert_part(source, source_layout, arrays, target, target_layout, "absolute")


def convert_names(
    source: Layer, source_layout: Layout, names: Mapping[Path, Names], target: Layer, target_layout: Layout
) -> dict[Path, Names]:
    """Converts what the axes of the parameters are called or sharded over, one entry an axis, along with the axes.

    Args:
        source: the layer that the names belong to.
        source_layout: its layout.
        names: a tuple for each parameter, by its path; those that are left out or `None` have no names.
        target: the layer that gets them.
        target_layout: its layout.

    Returns:
        A tuple or `None` for each of the target's parameters.
    """
    check_convertible(source, source_layout, target, target_layout)
    canonical: dict[str, Names] = {}
    for move in moves_of(source, source_layout):
        named = names_by(move.pieces, tuple(names.get(path) for path in move.own))
        canonical |= zip(move.canonical, named, strict=True)
    own: dict[Path, Names] = {}
    for move in moves_of(target, target_layout):
        named = names_by(inverse_of(move.pieces), tuple(canonical.get(name) for name in move.canonical))
        own |= zip(move.own, named, strict=True)
    return own


def _convert_part(
    source: Layer, source_layout: Layout, arrays: Arrays, target: Layer, target_layout: Layout, part: str
) -> Arrays:
    check_convertible(source, source_layout, target, target_layout)
    back = moves_of(target, target_layout)
    canonical = canonical_of(moves_of(source, source_layout), arrays, part)
    for name, filled in filled_of(source, source_layout, target, back, canonical).items():
        merged_into = source_layout.absent[name]
        # What is added to another array has that array's gradient; what is a number has none.
        canonical[name] = canonical[merged_into] if isinstance(merged_into, str) else np.zeros_like(filled)
    return own_of(target, back, canonical, part)


def _shifted(array: Any, constant: Any, added: Any) -> Any:
    """Adds the difference of two constants where there is one; elsewhere -0.0 must not become 0.0."""
    difference = constant - added
    if isinstance(difference, float) and difference == 0:
        return array
    return where(difference == 0, array, array + numpy_of(difference).asarray(difference).astype(array.dtype))


def _convert_state(
    source: Layer, source_layout: Layout, state: Arrays, target: Layer, target_layout: Layout, known: Remainder
) -> tuple[Arrays, Canonical]:
    if source_layout.state is None or target_layout.state is None:
        return {}, {}
    recalled = recall_state(known, state)
    canonical = source_layout.state.to_canonical(source, state) if recalled is None else recalled
    return target_layout.state.from_canonical(target, copied(canonical)), canonical
