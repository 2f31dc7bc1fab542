"""Which arguments of a traced function its results depend on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ._arrays import ArrayType
from ._programs import program_of


def used_arguments(function: Callable[[list[Any]], list[Any]], types: Sequence[ArrayType]) -> list[bool]:
    """Traces a function on types alone, and says which arguments reach its results or a side effect.

    Args:
        function: takes a list of arrays and returns another.
        types: those of the arguments.
    """
    jaxpr = program_of(function, types)
    return _live(jaxpr, [True] * len(jaxpr.outvars))


def _live(jaxpr: Any, wanted: Sequence[bool]) -> list[bool]:
    """Goes through a program backwards, as dead code elimination does."""
    # By identity: literals stand among the variables, and not all can be hashed.
    live = {id(var) for var, able in zip(jaxpr.outvars, wanted, strict=True) if able}
    for eqn in reversed(jaxpr.eqns):
        results = [id(var) in live for var in eqn.outvars]
        if not (any(results) or eqn.effects):
            continue
        inside = eqn.params["jaxpr"].jaxpr if eqn.primitive.name in ("jit", "pjit") else None
        arguments = [True] * len(eqn.invars) if inside is None or eqn.effects else _live(inside, results)
        live |= {id(var) for var, able in zip(eqn.invars, arguments, strict=True) if able}
    return [id(var) in live for var in jaxpr.invars]
