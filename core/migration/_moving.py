"""Conversion of a whole model, layer by layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from .._arrays import ArrayType, is_inexact
from .._errors import ArgumentError, MigrationError
from .._paths import Path
from ._convert import Converted, convert, convert_cotangents, convert_names, convert_second_moments
from ._layer import Arrays
from ._names import Names
from ._opened import Opened
from ._pairing import Pair

Remainders = Mapping[Path, Sequence[Any]]
"""What each layer's conversion had no place for, by the layer's path; one for each of the layers that are stacked."""


@dataclasses.dataclass(frozen=True)
class Moving:
    """The way from one model to another.

    Attributes:
        source: the model that has values.
        target: the one that gets them.
        pairs: their layers.
    """

    source: Opened
    target: Opened
    pairs: Sequence[Pair]

    def values(self, params: Arrays, state: Arrays, remainders: Remainders) -> tuple[Arrays, Arrays, Remainders]:
        """Converts parameters and state.

        Args:
            params: the source's, by their paths in the model.
            state: the source's.
            remainders: of the conversions that the source came from.

        Returns:
            Those of the target, and what it has no place for.

        Raises:
            MigrationError: a layer does not convert, or its values don't fit the target's types.
        """
        new_params: Arrays = {}
        new_state: Arrays = {}
        left: dict[Path, Sequence[Any]] = {}
        for pair in self.pairs:
            mine, theirs = (one.place for one in pair)
            known = iter(remainders.get(mine.path, ()))
            made = _each(
                mine.stacked,
                lambda params, state, pair=pair, known=known: _converted(pair, params, state, next(known, None)),
                mine.of(params),
                mine.of(state),
            )
            left[theirs.path] = [one.remainder for one in made]
            new_params |= _placed(theirs.path, _joined([one.params for one in made], mine.stacked))
            new_state |= _placed(theirs.path, _joined([one.state for one in made], mine.stacked))
        own_params, own_state = self.target.params, self.target.state
        return _fitted(new_params, own_params, "params"), _fitted(new_state, own_state, "state"), left

    def cotangents(self, params: Arrays) -> Arrays:
        """Converts gradients, and other things that are linear in the parameters."""
        return self._parts(params, convert_cotangents)

    def second_moments(self, params: Arrays) -> Arrays:
        """Converts what has no sign, as squares of gradients have none."""
        return self._parts(params, convert_second_moments)

    def axis_names(self, names: Mapping[Path, Names]) -> dict[Path, Names]:
        """Converts what the axes of the source's parameters are called or sharded over."""
        found: dict[Path, Names] = {}
        for pair in self.pairs:
            mine, theirs = (one.place for one in pair)
            own, loops = mine.of(dict(names)), len(mine.stacked)
            if mine.layout is None or theirs.layout is None:
                made = own
            else:
                cut = {path: given and given[loops:] for path, given in own.items()}
                made = convert_names(mine.layer, mine.layout, cut, theirs.layer, theirs.layout)
                fronts = {given[:loops] for given in own.values() if given}  # of the axes that a loop has stacked
                front = fronts.pop() if len(fronts) == 1 else (None,) * loops
                made = {path: given and (*front, *given) for path, given in made.items()}
            found |= _placed(theirs.path, made)
        return {path: given for path, given in found.items() if given}

    def _parts(self, params: Arrays, convert_part: Callable[..., Arrays]) -> Arrays:
        found: Arrays = {}
        for pair in self.pairs:
            mine, theirs = (one.place for one in pair)
            if not mine.layer.params:
                continue
            layouts = mine.layout, theirs.layout

            def part(arrays: Arrays, _: Arrays, mine: Any = mine, theirs: Any = theirs, layouts: Any = layouts) -> Any:
                if None in layouts:
                    return arrays
                return convert_part(mine.layer, layouts[0], arrays, theirs.layer, layouts[1])

            made = _each(mine.stacked, part, mine.of(params), {})
            found |= _placed(theirs.path, _joined(made, mine.stacked))
        return found


def _converted(pair: Pair, params: Arrays, state: Arrays, remainder: Any) -> Converted:
    mine, theirs = (one.place for one in pair)
    if mine.layout is None or theirs.layout is None:
        return Converted(params, state, None)  # pyright: ignore[reportArgumentType]  nothing is left of copies
    if theirs.layer.state and not mine.layer.state:
        raise MigrationError(
            f"The target's {pair[1].described()} at {pair[1].name!r} has state "
            f"({', '.join(sorted({path[-1] for path in theirs.layer.state}))}), and the source's {mine.class_name} at "
            f"{pair[0].name!r} has none. Give the source with all of its collections, such as `batch_stats`."
        )
    try:
        return convert(mine.layer, mine.layout, params, state, theirs.layer, theirs.layout, remainder)
    except ArgumentError as error:
        raise MigrationError(str(error)) from error


def _each(stacked: tuple[int, ...], function: Callable[..., Any], *arrays: Arrays) -> list[Any]:
    """Calls a function for each of the layers that are stacked."""
    return [
        function(*({path: array[index] for path, array in one.items()} for one in arrays))
        for index in np.ndindex(stacked)
    ]


def _joined(made: Sequence[Arrays], stacked: tuple[int, ...]) -> Arrays:
    if not stacked:
        return dict(made[0])
    return {path: jnp.stack([one[path] for one in made]).reshape(*stacked, *made[0][path].shape) for path in made[0]}


def _placed(path: Path, arrays: Arrays) -> Arrays:
    return {(*path, *below): array for below, array in arrays.items()}


def _fitted(arrays: Arrays, types: Arrays, what: str) -> Arrays:
    """Gives the arrays the target's dtypes, where nothing is lost by it; fresh ones, that nobody else holds."""
    missing = [path for path in types if path not in arrays]
    if missing:
        raise MigrationError(
            f"The target's {what} {'/'.join(missing[0])!r} ({ArrayType.of(types[missing[0]])}) gets nothing from the "
            f"source{'' if len(missing) == 1 else f', nor do {len(missing) - 1} more'}. The source was given without "
            "the collection that it belongs to, or its layer has no such array."
        )
    found: Arrays = {}
    for path, wanted in types.items():
        array = arrays[path]
        if tuple(array.shape) != tuple(wanted.shape):
            raise MigrationError(
                f"The target's {what} {'/'.join(path)!r} is {list(wanted.shape)}, but what comes from the source is "
                f"{list(array.shape)}."
            )
        # Running statistics have the dtype that their framework has for them, float32 in Flax.
        is_statistic = what == "state" and is_inexact(array) and jnp.issubdtype(wanted.dtype, jnp.inexact)
        if not (array.dtype == wanted.dtype or is_statistic or np.can_cast(array.dtype, wanted.dtype, "safe")):
            raise MigrationError(
                f"The target's {what} {'/'.join(path)!r} is {jnp.dtype(wanted.dtype).name}, which does not hold the "
                f"source's {jnp.dtype(array.dtype).name}. Make the target with that dtype, or cast the source first."
            )
        found[path] = jnp.array(array, dtype=wanted.dtype, copy=True)
    return found
