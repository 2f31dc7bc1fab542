"""`Highway`: a value carried backwards through a chain of calls, as the cotangent of an input that passes by."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from ._arrays import ArrayType, is_inexact
from ._channels import alike
from ._errors import ArgumentError
from ._paths import leaves_with_paths, show

if TYPE_CHECKING:
    from jaxtyping import PyTree


class Highway:
    """Carries a value from the end of a chain of calls to the backward pass of each, last to first.

    It goes through every function under a rule as an input and comes out as it went in, beside the
    output. In the backward pass its cotangent is there to be read and to be carried on:

        def block(params, x, road): return layer(params, x), road

        def backward(self, call, y_bar):
            y_bar, road_bar = y_bar
            value = road_bar.read()
            ...
            return Cotangents((x_bar, road_bar.carry(value)), params_bar)

    At the end of the chain `road.depart(y)` sends the cotangent of `y`, or `y` itself. A rule that
    reads a highway says `symbolic_zeros = False`.

    A highway is one lane: where two calls get the same one, their values would add up, and what is
    read becomes NaN. Each call takes the highway that the last one returned.

    Args:
        like: a pytree of floating arrays, shaped like the value to carry.

    Raises:
        ArgumentError: `like` has no leaf, or one of another type.
    """

    def __init__(self, like: PyTree):
        for path, leaf in leaves_with_paths(like) or [((), None)]:
            if not is_inexact(leaf):
                came = "nothing" if leaf is None else repr(leaf)
                raise ArgumentError(f"A highway carries floating arrays, but `like` has {came} at {show(path)}.")
        # A choice between the two, and not plain zeros: batched where `like` is, so that lanes stay apart.
        self.value = jax.tree.map(lambda leaf: jnp.where(jnp.array(True), jnp.zeros_like(leaf), leaf), like)
        self.count = 0.0 * alike(like, jnp.zeros(()))[1]

    @classmethod
    def _of(cls, value: Any, count: Any) -> Highway:
        road = object.__new__(cls)
        road.value, road.count = value, count
        return road

    def read(self) -> PyTree:
        """Gives the value that a highway's cotangent carries; NaN if none was sent, or several were."""
        return jax.tree.map(lambda leaf: jnp.where(self.count == 1, leaf, jnp.nan).astype(leaf.dtype), self.value)

    def carry(self, value: PyTree) -> Highway:
        """Makes the cotangent of a highway that carries a value.

        Args:
            value: shaped like the highway's.

        Raises:
            ArgumentError: it has another structure or shape.
        """
        same = jax.tree.structure(value) == jax.tree.structure(self.value)
        if not same or [jnp.shape(leaf) for leaf in jax.tree.leaves(value)] != [
            jnp.shape(leaf) for leaf in jax.tree.leaves(self.value)
        ]:
            raise ArgumentError(f"This highway carries {_shown(self.value)}, but got {_shown(value)}.")
        cast = jax.tree.map(lambda leaf, old: jnp.asarray(leaf).astype(old.dtype), value, self.value)
        return self._of(*alike(cast, self.count))

    def depart(self, y: PyTree, *, primal: bool = False) -> PyTree:
        """Ends the chain: gives `y` as it is, and sends its cotangent down the highway.

        Args:
            y: shaped like the highway's value.
            primal: whether to send `y` itself.

        Returns:
            `y`, to be used in its place.

        Raises:
            ArgumentError: `y` has another structure or shape.
        """
        self.carry(y)
        return _departed(self, y, primal)

    def __repr__(self) -> str:
        return f"Highway({_shown(self.value)})"


def check_highways(inputs: Any, output: Any) -> None:
    """Refuses a function that calculated with a highway in place of passing it on.

    Raises:
        ArgumentError: a highway in the output is none of those among the inputs.
    """
    returned = [road for road in jax.tree.leaves(output, is_leaf=_is_highway) if _is_highway(road)]
    if not returned:
        return
    given = [road for road in jax.tree.leaves(inputs, is_leaf=_is_highway) if _is_highway(road)]
    known = {tuple(map(id, jax.tree.leaves(road))) for road in given}
    for road in returned:
        if tuple(map(id, jax.tree.leaves(road))) not in known:
            raise ArgumentError(
                f"A function under a rule must return a highway as it came, but {road!r} is none of its inputs. What a "
                "highway carries is its cotangent, which arithmetic on its value would change."
            )


def _departed(road: Highway, y: Any, primal: bool) -> Any:
    """Gives `y`, with a backward pass that sends something down the road as well."""
    lanes, lanes_def = jax.tree.flatten(road)
    leaves, treedef = jax.tree.flatten(y)

    def forward(*arrays: Any) -> tuple[list[Any], list[Any]]:
        y = list(arrays[len(lanes) :])
        return y, y if primal else []

    def backward(kept: list[Any], bars: list[Any]) -> tuple[Any, ...]:
        sent = road_of_types.carry(jax.tree.unflatten(treedef, kept if primal else bars))
        return (*jax.tree.leaves(sent), *bars)

    road_of_types = jax.tree.unflatten(lanes_def, [jax.ShapeDtypeStruct(lane.shape, lane.dtype) for lane in lanes])
    passed = jax.custom_vjp(lambda *arrays: list(arrays[len(lanes) :]))
    passed.defvjp(forward, backward)
    return jax.tree.unflatten(treedef, passed(*lanes, *leaves))  # flat: under remat, the coming one takes no trees


def _is_highway(node: Any) -> bool:
    return isinstance(node, Highway)


def _shown(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: str(ArrayType.of(jnp.asarray(leaf))), tree)


def _flatten_with_keys(road: Highway) -> tuple[tuple[tuple[Any, Any], ...], None]:
    key = jax.tree_util.GetAttrKey
    return ((key("value"), road.value), (key("count"), road.count)), None


jax.tree_util.register_pytree_with_keys(
    Highway,
    _flatten_with_keys,
    lambda _, parts: Highway._of(*parts),
    lambda road: ((road.value, road.count), None),
)
