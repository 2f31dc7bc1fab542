"""A layer's own arrays and the canonical ones of its kind, there and back."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from .._errors import ArgumentError
from .._paths import show
from ._layer import Arrays, Canonical, Layer, Layout, Move
from ._pieces import Piece, convert_by, inverse_of
from ._registry import titled


def moves_of(layer: Layer, layout: Layout) -> list[Move]:
    """Lists a layer's moves.

    Raises:
        ArgumentError: they leave out a parameter of the layer, or name one that it does not have.
    """
    moves = list(layout.moves(layer))
    moved = [tuple(path) for move in moves for path in move.own]
    if odd := set(moved) ^ set(layer.params):
        path = min(odd)
        fault = "leaves out its parameter" if path in layer.params else "names a parameter that it does not have,"
        raise ArgumentError(
            f"The layout of kind {layout.kind!r} that is registered for {titled(layer)} {fault} {show(path)}; it has "
            f"{', '.join(show(own) for own in sorted(layer.params)) or 'none'}. Register one with `register_layer`."
        )
    return moves


def canonical_of(moves: list[Move], params: Arrays, part: str) -> Canonical:
    """Sends own arrays through the linear or the absolute part of the moves."""
    canonical: Canonical = {}
    for move in moves:
        pieces = [getattr(piece, part)() for piece in move.pieces]
        canonical |= zip(move.canonical, convert_by(pieces, tuple(params[path] for path in move.own)), strict=True)
    return canonical


def own_of(layer: Layer, moves: list[Move], canonical: Canonical, part: str) -> Arrays:
    """Sends canonical arrays back through the linear or the absolute part of the moves."""
    own: Arrays = {}
    for move in moves:
        expected = types_of(layer, move)
        arrays = tuple(canonical[name] for name in move.canonical)
        for name, array in zip(move.canonical, arrays, strict=True):
            if np.shape(array) != expected[name].shape:
                raise ArgumentError(
                    f"The {name!r} of {titled(layer)} must have shape {expected[name].shape}, but has shape "
                    f"{np.shape(array)} in the layer that is converted; its arrays are "
                    f"{', '.join(f'{show(path)} {layer.params[path].shape}' for path in move.own)}. Give the two "
                    "layers the same sizes."
                )
        pieces = [getattr(piece, part)() for piece in move.pieces]
        own |= zip(move.own, convert_by(inverse_of(pieces), arrays), strict=True)
    return own


def types_of(layer: Layer, move: Move) -> dict[str, Any]:
    """Gives the types of the canonical arrays that a layer's own arrays become."""
    own = tuple((tuple(layer.params[path].shape), np.dtype(layer.params[path].dtype)) for path in move.own)
    return dict(zip(move.canonical, _types_after(tuple(move.pieces), own), strict=True))


@functools.lru_cache(maxsize=4096)
def _types_after(pieces: tuple[Piece, ...], own: tuple[tuple[tuple[int, ...], Any], ...]) -> tuple[Any, ...]:
    arrays = tuple(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in own)
    return jax.eval_shape(lambda arrays: convert_by(pieces, arrays), arrays) if pieces else arrays


def constants_of(moves: list[Move], params: Arrays) -> Canonical:
    """Gives what the moves add to each array, where they add anything."""
    constants: Canonical = {}
    for move in moves:
        if any(piece.linear() != piece for piece in move.pieces):
            zeros = tuple(np.zeros(np.shape(params[path])) for path in move.own)
            added = zip(move.canonical, convert_by(move.pieces, zeros), strict=True)
            constants |= {name: constant for name, constant in added if constant.any()}
    return constants


def settle_absent(
    source: Layer, target: Layer, layout: Layout, back: list[Move], canonical: Canonical
) -> dict[str, Canonical]:
    """Takes out the arrays that the target lacks, adding them to those that they are merged into.

    Returns:
        What was added, by the name of what it was added to.
    """
    lacking = sorted(canonical.keys() - {name for move in back for name in move.canonical})
    if unknown := [name for name in lacking if name not in layout.absent]:
        raise _no_place(source, target, unknown)
    merged: dict[str, Canonical] = {}
    for name in lacking:
        stands_for, array = layout.absent[name], canonical.pop(name)
        if isinstance(stands_for, str):
            canonical[stands_for] = canonical[stands_for] + array
            merged.setdefault(stands_for, {})[name] = array
        else:
            _check_absent(source, target, name, array, stands_for)
    return merged


def filled_of(source: Layer, layout: Layout, target: Layer, back: list[Move], canonical: Canonical) -> Canonical:
    """Makes the arrays that only the target has, where the source computes as if it had them."""
    missing = sorted({name for move in back for name in move.canonical} - canonical.keys())
    if lacking := [name for name in missing if name not in layout.absent]:
        raise _no_place(target, source, lacking)
    types = {name: kind for move in back for name, kind in types_of(target, move).items()}
    dtypes = [array.dtype for array in canonical.values()]  # as all that is converted, of the source's
    numbers = {name: 0.0 if isinstance(layout.absent[name], str) else layout.absent[name] for name in missing}
    return {
        name: np.full(types[name].shape, number, [*dtypes, types[name].dtype][0]) for name, number in numbers.items()
    }


def _no_place(having: Layer, lacking: Layer, names: list[str]) -> ArgumentError:
    return ArgumentError(
        f"{titled(having)} has {' and '.join(repr(name) for name in names)}, for which {titled(lacking)} has no "
        "array. Make both with it or both without, such as by `use_bias`."
    )


def _check_absent(source: Layer, target: Layer, name: str, array: Any, number: float) -> None:
    """Refuses to drop an array that is not what its absence stands for."""
    if isinstance(array, Tracer):
        raise ArgumentError(
            f"Whether {titled(target)} can do without the {name!r} of {titled(source)} depends on its values, "
            "which are traced here. Convert outside of `jax.jit`."
        )
    if not np.all(np.asarray(array) == number):
        raise ArgumentError(
            f"{titled(source)} can't be converted into {titled(target)}, because that has no {name!r}, which is as "
            f"if it was {number:g}, and the source's {name!r} is not {number:g} throughout."
        )
