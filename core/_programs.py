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

_ORDERS = 2  # who differentiates a gradient through a rule needs two


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


def same_program(one: Any, other: Any, orders: int = _ORDERS) -> bool:
    """Compares two closed programs operation by operation.

    What can't be compared, such as the functions that a `jax.custom_vjp` holds, counts as different.

    Args:
        one: a program.
        other: another one.
        orders: to which order derivatives are compared that functions in them have of their own.
    """
    if one is other:
        return True
    if len(one.eqns) != len(other.eqns) or not (is_closed(one) and is_closed(other)):
        return False
    places: dict[int, int] = {}
    return (
        _bind(places, one.invars, other.invars)
        and all(_same_operation(places, *pair, orders) for pair in zip(one.eqns, other.eqns, strict=True))
        and _same_operands(places, one.outvars, other.outvars)
    )


def _same_operation(places: dict[int, int], left: Any, right: Any, orders: int) -> bool:
    same = _same_jvp if left.primitive.name == "custom_jvp_call" else _same_params
    return (
        left.primitive is right.primitive
        and _same_operands(places, left.invars, right.invars)
        and same(left.params, right.params, orders)
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


def _same_params(left: Mapping[str, Any], right: Mapping[str, Any], orders: int) -> bool:
    return left.keys() == right.keys() and all(_same_param(left[name], right[name], orders) for name in left)


def _same_jvp(left: Mapping[str, Any], right: Mapping[str, Any], orders: int) -> bool:
    """Compares functions that have a derivative of their own, as `jax.nn.relu`, whose derivative calls it again."""
    one, other = ({**params, "jvp_jaxpr_fun": None} for params in (left, right))
    if left["symbolic_zeros"] or not _same_params(one, other, orders):
        return False  # with these a derivative may depend on what is differentiated
    if orders == 0:
        return True
    try:
        count = len(left["call_jaxpr"].in_avals) - left["num_consts"]
        (first, *rest), (second, *others) = (
            params["jvp_jaxpr_fun"].call_wrapped(*[False] * count) for params in (left, right)
        )
        return rest == others and same_program(first, second, orders - 1)
    except Exception:  # another JAX may hold the derivative in another way
        return False


def _same_param(one: Any, other: Any, orders: int) -> bool:
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(_same_param(*pair, orders) for pair in zip(one, other, strict=True))
    if hasattr(one, "eqns"):  # a program inside; a closed one has its constants beside it
        return not (getattr(one, "consts", ()) or getattr(other, "consts", ())) and same_program(
            getattr(one, "jaxpr", one), getattr(other, "jaxpr", other), orders
        )
    try:
        return bool(one == other)
    except Exception:  # any class may define `==` as it likes
        return False
