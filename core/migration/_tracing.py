"""The layers of a model in the order of their calls, found by running it on types."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from .._ambient import Ambient, entered
from .._arrays import is_array
from .._attachment import Attachment
from .._paths import Path
from .._running import Running, Visit
from .._sites import types_of
from ._layer import Arrays, Layer, Layout
from ._opened import Call, Opened

OWN_PARAMETER = "own parameter"
OWN_STATE = "own state"


@dataclasses.dataclass(frozen=True)
class Place:
    """A layer of a model, or an array that belongs to no known layer.

    Attributes:
        layer: the layer, with the types that its module sees.
        layout: what is registered for its class; `None` for an array that stands alone.
        stacked: sizes of the axes along which layers of a loop are stacked, in front of all its arrays.
        is_called: whether the sample reaches it.
    """

    layer: Layer
    layout: Layout | None = None
    stacked: tuple[int, ...] = ()
    is_called: bool = True

    @property
    def path(self) -> Path:
        """Where it stands in its model."""
        return self.layer.path

    @property
    def kind(self) -> str:
        """What it has in common with a layer that it can be converted into."""
        if self.layout is not None:
            return self.layout.kind
        return OWN_PARAMETER if self.layer.params else OWN_STATE

    @property
    def class_name(self) -> str:
        """The name of its class."""
        return self.kind if self.layout is None else type(self.layer.module).__name__

    def of(self, arrays: Arrays) -> Arrays:
        """Takes the layer's own out of a model's arrays."""
        return below(self.path, arrays)


@dataclasses.dataclass
class _Seen:
    """A layer that was called."""

    visit: Visit
    inside: tuple[Arrays, Arrays] | None
    inputs: Any
    output: Any


class _Observation:
    """Notes the calls of layers, and does not look inside them."""

    def __init__(self, opened: Opened, layout_of: Callable[[Any], Layout | None]):
        self.seen: dict[Path, _Seen] = {}
        self.order: dict[Path, None] = {}
        self._opened = opened
        self._layout_of = layout_of
        self._is_inside = False

    def __call__(self, visit: Visit, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._is_inside or not hasattr(type(visit.module), visit.method):
            return visit.plain(*args, **kwargs)  # what a lifted transform makes of a module is no method of its own
        if self._layout_of(visit.module) is None:
            self.order[visit.path] = None
            return visit.plain(*args, **kwargs)
        self._is_inside = True
        inputs = _typed((args, kwargs))  # before the call, which may spend an Equinox state
        try:
            out = visit.plain(*args, **kwargs)
        finally:
            self._is_inside = False
        known = self.seen.get(visit.path)
        if known is None or (known.visit.method != "__call__" and visit.method == "__call__"):
            # A method such as an initial carry's may come long before the call that gives a layer its place.
            self.seen.pop(visit.path, None)
            inside = self._opened.inside(visit.module)
            inside = None if inside is None else (_typed(inside[0]), _typed(inside[1]))
            self.seen[visit.path] = _Seen(visit, inside, inputs, _typed(out))
        return out


def places_of(
    opened: Opened, call: Call | None, sample: Sequence[Any], layout_of: Callable[[Any], Layout | None]
) -> list[Place]:
    """Lists the layers of a model in the order of their first calls, then the arrays that belong to none.

    Args:
        opened: the model.
        call: how it is called.
        sample: what it is called with.
        layout_of: gives what is registered for a module's class, or `None`.
    """
    running = Running(Attachment())
    observation = _Observation(opened, layout_of)
    running.observe = observation
    watched = opened.observed(running)
    params, state = opened.params, opened.state
    with entered(Ambient((running,))):
        types_of(
            lambda params, state, *sample: watched.run(call, params, state, sample)[0], (params, state, *sample), {}
        )
    params, state = _typed(params), _typed(state)
    places = []
    for path, seen in observation.seen.items():
        where = _where(path, {**params, **state})
        own = below(where, params), below(where, state)
        shown, stacked = _unstacked(own, seen.inside)
        module = seen.visit.module
        layer = Layer(where, opened.framework.lower(), module, *shown, seen.inputs, seen.output)
        places.append(Place(layer, layout_of(module), stacked))
    claimed = [place.path for place in places]
    called = [*claimed, *(path for path in observation.order)]
    for arrays, make in ((params, lambda array: ({(): array}, {})), (state, lambda array: ({}, {(): array}))):
        for path, array in arrays.items():
            if not any(path[: len(one)] == one for one in claimed):
                layer = Layer(path, opened.framework.lower(), None, *make(array))
                places.append(Place(layer, is_called=path[:-1] in called))
    return places


def below(path: Path, arrays: Arrays) -> Arrays:
    """Takes the arrays below a path, by their paths below it."""
    return {at[len(path) :]: array for at, array in arrays.items() if at[: len(path)] == path}


def _where(path: Path, arrays: Arrays) -> Path:
    """Finds a layer's arrays; a loop's body may be a model of its own, that knows its paths from there on only."""
    if not path or below(path, arrays):
        return path
    ends = {at[: end + len(path)] for at in arrays for end in range(len(at)) if at[end : end + len(path)] == path}
    return ends.pop() if len(ends) == 1 else path


def _unstacked(
    own: tuple[Arrays, Arrays], inside: tuple[Arrays, Arrays] | None
) -> tuple[tuple[Arrays, Arrays], tuple[int, ...]]:
    """Gives the types that a layer sees, and the axes in front of them that it does not."""
    if inside is None:
        return own, ()
    pairs = [(mine[path], sees[path]) for mine, sees in zip(own, inside, strict=True) for path in mine if path in sees]
    axes = {mine.shape[: len(mine.shape) - len(sees.shape)] for mine, sees in pairs}
    if len(axes) != 1 or any(mine.shape != (*next(iter(axes)), *sees.shape) for mine, sees in pairs):
        return own, ()
    stacked = axes.pop()
    return (_cut(own[0], len(stacked)), _cut(own[1], len(stacked))), stacked


def _cut(arrays: Arrays, axes: int) -> Arrays:
    return {path: jax.ShapeDtypeStruct(array.shape[axes:], array.dtype) for path, array in arrays.items()}


def _typed(tree: Any) -> Any:
    """Puts types in the place of arrays, and leaves no tracer behind."""

    def typed(leaf: Any) -> Any:
        if isinstance(leaf, jax.ShapeDtypeStruct) or not (is_array(leaf) or hasattr(leaf, "aval")):
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)

    return jax.tree.map(typed, tree)
