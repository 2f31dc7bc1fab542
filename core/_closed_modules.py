"""Modules that a function closes over: what it reads of them must not be differentiated."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.core import Tracer

from ._arrays import is_inexact
from ._closures import Closures, refuse_derivative
from ._session import Session

_probing: contextvars.ContextVar[bool] = contextvars.ContextVar("crossvjp_probing", default=False)


def guards_of_modules(
    session: Session,
    closures: Closures,
    around: Callable[[Session, Sequence[Any]], Session],
    closed: Sequence[Any],
) -> list[Any]:
    """Finds the traced values that `fn` reads of modules in its closure, by tracing it once on shapes.

    They stay where they are: such a module may be a parent of which only a setting is read. As
    arguments that nobody uses they make it an error, with the module's name, to differentiate them.
    Calls inside of the one that is traced wait for their own turn, or depth would cost powers of two.
    """
    finds = getattr(session.adapter, "finds_closures", False)
    if not closures.modules or finds or _probing.get():
        return []

    def run(closed: Any, variables: Any, context: Any, arrays: Any) -> Any:
        inside = around(session, closed)
        outcome = inside.run(inside.fn, variables, context, arrays)
        return outcome.arrays, outcome.updates

    token = _probing.set(True)
    try:
        traced = jax.make_jaxpr(run)(list(closed), session.variables, session.context, session.inputs.arrays)
    finally:
        _probing.reset(token)
    names = " or ".join(f"`{name}`" for name in dict.fromkeys(closures.modules))
    read = [const for const in traced.consts if isinstance(const, Tracer) and is_inexact(const)]
    return [refuse_derivative(value, f"A value of the module {names}") for value in read]
