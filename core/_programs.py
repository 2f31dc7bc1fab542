"""Traced programs: how they are made on types alone, and whether two of them are the same."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.api_util
import numpy as np
from jax.interpreters import partial_eval

from ._arrays import ArrayType


def program_of(function: Callable[[list[Any]], list[Any]], types: Sequence[ArrayType]) -> Any:
    """Traces a function of a flat list of arrays, which returns another, on types alone."""
    avals = [type_.aval for type_ in types]
    # What `jax.make_jaxpr` ends in, without the `jax.jit` that it makes: half of the time that a small layer takes.
    if (trace := getattr(partial_eval, "trace_to_jaxpr_dynamic", None)) is None:
        return jax.make_jaxpr(function)(avals).jaxpr
    return trace(_wrapped()(lambda *leaves: function([*leaves]), debug_info=_described(len(avals))), avals)[0]


@functools.cache
def _wrapped() -> Callable[..., Any]:
    from jax.extend import linear_util  # here, since it imports Pallas

    return linear_util.wrap_init


@functools.cache
def _described(count: int) -> Any:
    """Says for JAX's errors what is traced; each caller has its own words for what is wrong."""

    def formal(*leaves: Any) -> None: ...

    return jax.api_util.debug_info("crossvjp", formal, (0,) * count, {})


def is_closed(program: Any) -> bool:
    """Says whether a program depends on its arguments alone, and does nothing but return its results."""
    return not program.constvars and not program.effects


def same_program(one: Any, other: Any) -> bool:
    """Compares two closed programs operation by operation.

    What can't be compared, such as the functions that a custom derivative holds, counts as different.
    """
    if one is other:
        return True
    if len(one.eqns) != len(other.eqns) or not (is_closed(one) and is_closed(other)):
        return False
    places: dict[int, int] = {}
    return (
        _bind(places, one.invars, other.invars)
        and all(_same_operation(places, *pair) for pair in zip(one.eqns, other.eqns, strict=True))
        and _same_operands(places, one.outvars, other.outvars)
    )


def _same_operation(places: dict[int, int], left: Any, right: Any) -> bool:
    return (
        left.primitive is right.primitive
        and _same_operands(places, left.invars, right.invars)
        and _same_params(left.params, right.params)
        and _bind(places, left.outvars, right.outvars)
    )


def _bind(places: dict[int, int], left: Sequence[Any], right: Sequence[Any]) -> bool:
    """Notes which variables stand for each other."""
    if len(left) != len(right):
        return False
    for one, other in zip(left, right, strict=True):
        if one.aval != other.aval:
            return False
        places[id(one)] = id(other)
    return True


def _same_operands(places: Mapping[int, int], left: Sequence[Any], right: Sequence[Any]) -> bool:
    return len(left) == len(right) and all(map(lambda *pair: _same_operand(places, *pair), left, right))


def _same_operand(places: Mapping[int, int], one: Any, other: Any) -> bool:
    if not hasattr(one, "val"):  # a variable
        return places.get(id(one)) == id(other)
    if not hasattr(other, "val") or one.aval != other.aval:
        return False
    # By their bits: 0.0 equals -0.0, and NaN does not equal itself.
    return one.val is other.val or np.asarray(one.val).tobytes() == np.asarray(other.val).tobytes()


def _same_params(left: Mapping[str, Any], right: Mapping[str, Any]) -> bool:
    return left.keys() == right.keys() and all(_same_param(left[name], right[name]) for name in left)


def _same_param(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(_same_param, one, other))
    if hasattr(one, "eqns"):  # a program inside; a closed one has its constants beside it
        return not (getattr(one, "consts", ()) or getattr(other, "consts", ())) and same_program(
            getattr(one, "jaxpr", one), getattr(other, "jaxpr", other)
        )
    try:
        return bool(one == other)
    except Exception:  # any class may define `==` as it likes
        return False
