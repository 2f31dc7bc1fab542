"""Optimiser states: what in them is shaped like the parameters is converted as what it is, and the rest is kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp

from .._arrays import is_array
from .._errors import MigrationError
from .._paths import show
from ._layer import Arrays
from ._moving import Moving

Moment: TypeAlias = Literal["first", "second", "parameters"]

# What optax's states hold, by class and field. First moments are linear in the gradient, second ones have no sign.
MOMENTS: Mapping[str, Mapping[str, Moment]] = {
    "TraceState": {"trace": "first"},
    "EmaState": {"ema": "first"},
    "ScaleByAdamState": {"mu": "first", "nu": "second"},
    "ScaleByAmsgradState": {"mu": "first", "nu": "second", "nu_max": "second"},
    "ScaleByBeliefState": {"mu": "first", "nu": "second"},
    "ScaleByLionState": {"mu": "first"},
    "ScaleByRmsState": {"nu": "second"},
    "ScaleByRStdDevState": {"mu": "first", "nu": "second"},
    "ScaleByRssState": {"sum_of_squares": "second"},
    "ScaleByAdaDeltaState": {"e_g": "second", "e_x": "second"},
    "ScaleByAdanState": {"m": "first", "v": "first", "n": "second", "g": "first"},
    "ApplyEvery": {"grad_acc": "first"},
    "MultiStepsState": {"acc_grads": "first"},
    "ScheduleFreeState": {"z": "parameters"},
    "LookaheadState": {},
}


def converted_optimizer_state(moving: Moving, state: Any, moments: Mapping[str, Mapping[str, Moment]]) -> Any:
    """Converts an optax state from the source's parameters to the target's.

    Args:
        moving: the way.
        state: the state.
        moments: what the states of other transformations hold, `{class: {field: moment}}`.

    Raises:
        MigrationError: the state holds something shaped like the parameters, or like one of them, that is not known.
    """
    known = {**MOMENTS, **moments}
    source = moving.source
    names = source.params.keys()

    def visit(node: Any, where: tuple[str, ...], moment: Moment | None) -> Any:
        flat = source.flat(node)
        if flat is not None and flat.keys() == names:
            if moment is None:
                raise _unknown(where, "something that is shaped like the parameters")
            return moving.target.tree(_with_masks(moving, _by(moving, moment), flat, where))
        if isinstance(node, tuple) and hasattr(node, "_fields"):
            fields = known.get(type(node).__name__, {})
            made = {
                name: visit(value, (*where, f"{type(node).__name__}.{name}"), fields.get(name))
                for name, value in zip(node._fields, node, strict=True)  # pyright: ignore[reportAttributeAccessIssue]  a named tuple
            }
            return type(node)(**made)
        if isinstance(node, tuple | list):
            return type(node)(visit(part, (*where, str(index)), moment) for index, part in enumerate(node))
        if type(node) is dict:
            return {name: visit(part, (*where, str(name)), moment) for name, part in node.items()}
        if is_array(node) and node.ndim > 0:
            raise _unknown(where, f"an array of shape {list(node.shape)}")
        if not is_array(node) and any(is_array(leaf) and leaf.ndim for leaf in jax.tree.leaves(node)):
            raise _unknown(where, f"a {type(node).__name__} with arrays")
        leaves = jax.tree.leaves(node)
        return leaves[0] if len(leaves) == 1 else node  # a scalar without the box of its framework

    return visit(state, (), None)


def _by(moving: Moving, moment: Moment) -> Callable[[Arrays], Arrays]:
    if moment == "first":
        return moving.cotangents
    if moment == "second":
        return moving.second_moments
    return lambda params: moving.values(params, moving.source.state, {})[0]


def _with_masks(moving: Moving, by: Callable[[Arrays], Arrays], flat: Arrays, where: tuple[str, ...]) -> Arrays:
    """Converts a tree in which marks may stand for parameters that another optimiser has, as optax masks them."""
    masks = [leaf for leaf in flat.values() if not is_array(leaf)]
    if not masks:
        return by(flat)
    types = moving.source.params
    zeros = {path: jnp.zeros(kind.shape, kind.dtype) for path, kind in types.items()}
    made = by({path: leaf if is_array(leaf) else zeros[path] for path, leaf in flat.items()})
    held = moving.second_moments({path: zeros[path] + is_array(leaf) for path, leaf in flat.items()})
    for path, part in held.items():
        if not bool((part == 1).all()) and bool((part != 0).any()):
            raise MigrationError(
                f"The optimiser's state at {show(where)} has only some of the parameters that become "
                f"{'/'.join(path)!r} in the target. Give them one optimiser, or initialise it anew."
            )
    return {path: array if bool((held[path] == 1).all()) else masks[0] for path, array in made.items()}


def _unknown(where: tuple[str, ...], what: str) -> MigrationError:
    return MigrationError(
        f"The optimiser's state has {what} at {show(where)}, and nothing says how that follows the parameters. Say it, "
        "`optimizer_state(state, moments={'TheStatesClass': {'field': 'first'}})`: 'first' for what is linear in the "
        "gradient, 'second' for squares, 'parameters' for parameters; or initialise the optimiser anew."
    )
