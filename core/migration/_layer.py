"""What migration knows about a layer: where it stands, what it holds, and what kind it is.

Layers of one kind, whatever their framework, compute the same function of the same canonical arrays. A framework's
own arrays become canonical ones by moves, which are affine and invertible; so any layer converts into any other of
its kind, and a cotangent by the linear part alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from .._paths import Path
from ._pieces import Piece

Arrays: TypeAlias = dict[Path, Any]
"""A layer's own arrays, by their paths below the layer: `("kernel",)`, `("query", "kernel")`."""

Canonical: TypeAlias = dict[str, Any]
"""The arrays of a kind, by the names that the kind gives them."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer of a traced model.

    Attributes:
        path: where it stands in the model.
        framework: "linen", "nnx", "haiku" or "equinox"; another for an adapter of somebody else.
        module: the module, for its attributes; its arrays may be traced, and are not looked at.
        params: its parameters' types by their paths below it (`jax.ShapeDtypeStruct`), in their framework's layout.
        state: the same of its state.
        inputs: types of the arguments of its first call.
        output: types of what that returned.
    """

    path: Path
    framework: str
    module: Any
    params: Arrays
    state: Arrays
    inputs: Any = ()
    output: Any = None


@dataclasses.dataclass(frozen=True)
class Move:
    """Some of a layer's own arrays, and the canonical arrays that they become.

    Attributes:
        own: paths below the layer.
        canonical: names of the kind.
        pieces: what happens on the way from the one to the other, in this order.
    """

    own: Sequence[Path]
    canonical: Sequence[str]
    pieces: Sequence[Piece] = ()


@dataclasses.dataclass(frozen=True)
class StateMove:
    """How a layer's state becomes canonical, and back; it need not be affine.

    Attributes:
        to_canonical: `(layer, own) -> canonical`.
        from_canonical: `(layer, canonical) -> own`. Canonical names that it has no place for it leaves.
    """

    to_canonical: Callable[[Layer, Arrays], Canonical]
    from_canonical: Callable[[Layer, Canonical], Arrays]


@dataclasses.dataclass(frozen=True)
class Layout:
    """What is registered for one class of layers.

    Attributes:
        kind: layers of one kind convert into each other.
        cls: the framework's class.
        moves: `(layer) -> moves`, of the parameters. Sizes come from the layer's types and attributes.
        state: of the state, if it has any.
        absent: canonical arrays that layers of the class may lack, and the number that each then stands for, or the
            name of the array that it is part of. RMSNorm without a bias computes what it would with a bias of 0.
        settings: `(module) -> {name: value}`, what the function depends on besides its arrays, by names that all
            frameworks share ("epsilon", "momentum", "padding"). Compared between the two sides. A value may be a
            function of the `Layer`, for what only its arrays' shapes tell.
        when: `(module) -> bool`, for which modules of the class this holds; all if left out.
    """

    kind: str
    cls: type
    moves: Callable[[Layer], Sequence[Move]]
    state: StateMove | None = None
    absent: Mapping[str, float | str] = dataclasses.field(default_factory=dict)
    settings: Callable[[Any], Mapping[str, Any]] = lambda module: {}
    when: Callable[[Any], bool] | None = None
