"""Converts one layer's parameters and state into another's, and keeps what would be lost on the way.

Some conversions lose: 1 added to a small number and taken off again leaves another number, and Haiku's running
statistics have counters that Linen has no place for. A conversion therefore also gives a *remainder*: the values before
the loss, beside the converted values that they belong to. A later conversion that starts from these converted values
goes on from the values before the loss; one that starts from others, because the model was trained on, ignores them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from .._paths import Path
from ._canonical import canonical_of, check_absent, constants_of, filled_of, moves_of, names_of, no_place, own_of
from ._layer import Arrays, Canonical, Layer, Layout
from ._pieces import Names, inverse_of, names_by, numpy_of
from ._registry import check_convertible


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["before", "constant", "after", "added"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Exact:
    """An array of which bits were lost by adding a constant.

    Attributes:
        before: the array as it was in its first layout, entries in the canonical order.
        constant: what that layout adds to it to make it canonical.
        after: the array in the layout that it was converted into last, entries in the canonical order.
        added: what that layout adds to it.
    """

    before: Any
    constant: Any
    after: Any
    added: Any


@functools.partial(jax.tree_util.register_dataclass, data_fields=["params", "state", "converted_state"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Remainder:
    """What the target of a conversion has no place for. A pytree.

    Attributes:
        params: arrays that lost bits, by their canonical names.
        state: the whole canonical state.
        converted_state: the state that it was converted into, by the target's own paths.
    """

    params: dict[str, Exact]
    state: Canonical
    converted_state: Arrays


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
    linear, constants = canonical_of(moves, params, "linear"), constants_of(moves, params)
    if not (absent := linear.keys() - names_of(back)) <= target_layout.absent.keys():
        raise no_place(source, target, sorted(absent - target_layout.absent.keys()))
    for name in sorted(absent):
        check_absent(source, target, name, linear.pop(name), target_layout.absent[name])
    for name, fill in filled_of(source, source_layout, target, back, linear).items():
        linear[name] = fill
    wanted, exact = constants_of(back, target.params), {}
    for name, before in linear.items():
        constant, added = constants.get(name, 0.0), wanted.get(name, 0.0)
        earlier = known.params.get(name)
        if earlier is not None and _same_type(earlier.after, before):
            # Entry by entry, so that training some of them keeps the others exact.
            same = (before == earlier.after) & (constant == earlier.added)
            before, constant = _where(same, earlier.before, before), _where(same, earlier.constant, constant)
        linear[name] = _shifted(before, constant, added)
        if earlier is not None or name in constants or name in wanted:
            exact[name] = Exact(*map(_copied, (before, constant, linear[name], added)))
    own_state, kept_state = _convert_state(source, source_layout, state, target, target_layout, known)
    converted_state = _copies(own_state)
    left = Remainder(exact, kept_state, converted_state)
    return Converted(own_of(target, back, linear, "linear"), own_state, left)


def convert_cotangents(
    source: Layer, source_layout: Layout, arrays: Arrays, target: Layer, target_layout: Layout
) -> Arrays:
    """Converts what changes with the parameters, their gradients and first moments: by the linear part alone.

    Arrays that the target lacks are left out; those that the source lacks are 0.
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
    filled = filled_of(source, source_layout, target, back, canonical)
    zeros = {name: np.zeros_like(fill) for name, fill in filled.items()}
    return own_of(target, back, canonical | zeros, part)


def _shifted(array: Any, constant: Any, added: Any) -> Any:
    """Adds the difference of two constants where there is one; elsewhere -0.0 must not become 0.0."""
    difference = constant - added
    if isinstance(difference, float) and difference == 0:
        return array
    return _where(difference == 0, array, array + numpy_of(difference).asarray(difference).astype(array.dtype))


def _where(condition: Any, yes: Any, no: Any) -> Any:
    return numpy_of(condition, yes, no).where(condition, yes, no)


def _convert_state(
    source: Layer, source_layout: Layout, state: Arrays, target: Layer, target_layout: Layout, known: Remainder
) -> tuple[Arrays, Canonical]:
    if source_layout.state is None or target_layout.state is None:
        return {}, {}
    fresh = known.state and _same_bits(state, known.converted_state)
    canonical = known.state if fresh else source_layout.state.to_canonical(source, state)
    own = target_layout.state.from_canonical(target, _copies(canonical))
    return own, _copies(canonical)


def _copies(arrays: dict[Any, Any]) -> dict[Any, Any]:
    return {name: _copied(array) for name, array in arrays.items()}


def _copied(array: Any) -> Any:
    """Copies an array: a training step may donate the buffer of the original."""
    return numpy_of(array).array(array, copy=True)


def _same_type(array: Any, other: Any) -> bool:
    return np.shape(array) == np.shape(other) and array.dtype == other.dtype


def _same_bits(arrays: Arrays, others: Arrays) -> bool:
    """Says whether arrays are equal bit for bit; traced ones are not known to be."""
    if arrays.keys() != others.keys():
        return False
    pairs = [(arrays[path], others[path]) for path in arrays]
    if any(isinstance(array, jax.core.Tracer) for pair in pairs for array in pair):
        return False
    return all(_bits(array) == _bits(other) for array, other in pairs)


def _bits(array: Any) -> tuple[Any, ...]:
    as_numpy = np.asarray(array)
    return as_numpy.dtype, as_numpy.shape, as_numpy.tobytes()
