"""Which layout a layer has. No framework is imported to find out."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from .._errors import ArgumentError
from .._paths import show
from ._layer import Layer, Layout, Move, StateMove

# A layer of a framework can't exist before the framework is imported, so the tables of the others need not be loaded.
_BUILT_IN = {
    "flax.linen": "crossvjp.adapters.layers.linen",
    "flax.nnx": "crossvjp.adapters.layers.nnx",
    "haiku": "crossvjp.adapters.layers.haiku",
    "equinox": "crossvjp.adapters.layers.equinox",
}


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Why layers of two kinds, or some layers of one kind, don't convert into each other.

    Attributes:
        kinds: the two kinds, in either order.
        reason: a clause that goes on from "..., because".
        when: `(source, target) -> bool`, for which layers; all if left out.
    """

    kinds: tuple[str, str]
    reason: str
    when: Callable[[Layer, Layer], bool] | None = None


_registered: list[Layout] = []
_refused: list[Refusal] = []


def register_layer(
    cls: type,
    kind: str,
    moves: Mapping[Any, str] | Callable[[Layer], Sequence[Move]],
    *,
    state: StateMove | None = None,
    absent: Mapping[str, float | str] = MappingProxyType({}),
    settings: Mapping[str, str] | Callable[[Any], Mapping[str, Any]] = MappingProxyType({}),
    when: Callable[[Any], bool] | None = None,
) -> Layout:
    """Says how a class of layers keeps its arrays, so that `migrate` converts it.

    Subclasses have the layout too, unless they have their own. What is registered later is asked first, all before
    ours.

    Args:
        cls: class of the layers.
        kind: a name that the class shares with those of the other frameworks that compute the same function.
        moves: the kind's name for each parameter, by the parameter's name or path below the layer, where the arrays
            are the same; or a function of the `Layer` that lists the `Move`s by which they become the same.
        state: how the layer's state converts, if it has any.
        absent: names of the kind that these layers may lack, with the number that each then stands for, or the name of
            the array that it is added to.
        settings: names that frameworks share ("epsilon"), with the attributes that hold them; or a function of the
            module that gives a dict of them.
        when: for which modules of the class this holds; all if left out.

    Returns:
        The layout.

    Example:
        >>> class Scale:
        ...     epsilon = 1e-6
        >>> register_layer(Scale, "scale", {"gain": "scale"}, settings={"epsilon": "epsilon"}).kind
        'scale'
    """
    registered = layout(cls, kind, moves, state=state, absent=absent, settings=settings, when=when)
    _registered.insert(0, registered)
    return registered


def layout(
    cls: type,
    kind: str,
    moves: Mapping[Any, str] | Callable[[Layer], Sequence[Move]],
    *,
    state: StateMove | None = None,
    absent: Mapping[str, float | str] = MappingProxyType({}),
    settings: Mapping[str, str] | Callable[[Any], Mapping[str, Any]] = MappingProxyType({}),
    when: Callable[[Any], bool] | None = None,
) -> Layout:
    """Makes a layout from the arguments of `register_layer`, without registering it."""
    return Layout(kind, cls, _as_moves(moves), state, absent, _as_settings(settings), when)


def refuse(kind: str, other: str, reason: str, when: Callable[[Layer, Layer], bool] | None = None) -> Refusal:
    """Says that layers don't convert into each other, and why; the error of `migrate` then gives the reason.

    Args:
        kind: the one kind.
        other: the other kind, or the same, for some layers of one kind.
        reason: a clause that goes on from "..., because".
        when: `(source, target) -> bool`, for which layers; all if left out.

    Returns:
        The refusal.
    """
    refusal = Refusal((kind, other), reason, when)
    _refused.insert(0, refusal)
    return refusal


def layout_of(module: Any) -> Layout | None:
    """Gives the layout of a module: that of its class or, in method resolution order, of a base class."""
    layouts = [*_registered, *(ours for table in _built_in() for ours in table.LAYOUTS)]
    for cls in type(module).__mro__:
        for candidate in layouts:
            if candidate.cls is cls and (candidate.when is None or candidate.when(module)):
                return candidate
    return None


def refusal_of(source: Layer, source_layout: Layout, target: Layer, target_layout: Layout) -> str | None:
    """Gives the reason why one layer does not convert into the other, or `None` if it does."""
    kinds = {(source_layout.kind, target_layout.kind), (target_layout.kind, source_layout.kind)}
    for refusal in [*_refused, *(refusal for table in _built_in() for refusal in table.REFUSALS)]:
        if refusal.kinds in kinds and (refusal.when is None or refusal.when(source, target)):
            return refusal.reason
    if source_layout.kind != target_layout.kind:
        return f"the one is of kind {source_layout.kind!r} and the other of kind {target_layout.kind!r}"
    return None


def check_convertible(source: Layer, source_layout: Layout, target: Layer, target_layout: Layout) -> None:
    """Refuses a pair of layers with the reason.

    Raises:
        ArgumentError: the layers are of different kinds, or a refusal is registered for them.
    """
    reason = refusal_of(source, source_layout, target, target_layout)
    if reason is not None:
        raise ArgumentError(f"{titled(source)} can't be converted into {titled(target)}, because {reason}.")


def titled(layer: Layer) -> str:
    """Names a layer in an error: its framework, class and path."""
    return f"{layer.framework} {type(layer.module).__name__} at {show(layer.path)}"


def _built_in() -> list[Any]:
    return [importlib.import_module(table) for framework, table in _BUILT_IN.items() if framework in sys.modules]


def _as_moves(moves: Any) -> Callable[[Layer], Sequence[Move]]:
    if not isinstance(moves, Mapping):
        return moves
    renamed = [Move([(own,) if isinstance(own, str) else tuple(own)], [name]) for own, name in moves.items()]
    return lambda layer: held(layer, renamed)


def held(layer: Layer, moves: Sequence[Move]) -> list[Move]:
    """Leaves out the moves of arrays that the layer does not have, such as the bias of one without."""
    return [move for move in moves if all(path in layer.params for path in move.own)]


def _as_settings(settings: Any) -> Callable[[Any], Mapping[str, Any]]:
    if not isinstance(settings, Mapping):
        return settings
    return lambda module: {name: getattr(module, attribute) for name, attribute in settings.items()}
