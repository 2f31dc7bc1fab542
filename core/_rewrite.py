"""Rules on functions by name: the program of a call is traced, and the chosen functions in it are exchanged.

A program holds its functions as equations, each with the function's own program as a parameter. An equation of a
chosen function gives way to one that calls it under the rule; programs inside of others (of loops, branches,
remat, jit) are treated in the same way. Functions with a derivative of their own stay closed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.extend.core as jex
from jax.core import Tracer

from ._errors import ArgumentError
from ._inputs import Handle, Inputs
from ._rule import Rule
from ._session import Outcome, Session

Choose = Callable[[str], tuple[Rule, Any] | None]

# They replace the derivative of what stands in their programs, so that no rule would be asked there.
_CLOSED = ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr", "custom_vjp3_call", "custom_lin")


def call_rewritten(
    choose: Choose, fn: Callable[..., Any], mdl: Any, args: tuple[Any, ...], kwargs: Any
) -> tuple[Any, bool]:
    """Calls `fn(mdl, *args, **kwargs)` with every function that `choose` has a rule for under that rule.

    Args:
        choose: gives the rule and the key of a function by its name, or `None`; it is asked for every function.
        fn: a function of a module handle and inputs.
        mdl: the handle; `None` where there is no module.
        args: the inputs.
        kwargs: the inputs by keyword.

    Returns:
        What the call returns; and whether `choose` was asked, for a module that makes its variables runs as it is.
    """
    handle = Handle(mdl, args, kwargs)
    if handle.adapter.initializing(handle.opened):
        return fn(mdl, *args, **kwargs), False
    inputs = Inputs(fn, args, kwargs, (), handle.held)

    def body(boundary: Any) -> tuple[Any, Any]:
        session = Session(boundary, handle, inputs, fn)
        cell: list[Outcome] = []

        def program(*arrays: Any) -> list[Any]:
            variables, context = len(session.variables), len(session.variables) + len(session.context)
            outcome = session.run(fn, arrays[:variables], arrays[variables:context], arrays[context:])
            cell.append(outcome)
            return [*outcome.arrays, *outcome.updates]

        arrays = [*session.variables, *session.context, *inputs.arrays]
        closed = jax.make_jaxpr(program)(*arrays)
        out = jex.jaxpr_as_fun(closed.replace(jaxpr=_rewritten(closed.jaxpr, choose)))(*arrays)
        outcome = cell.pop()
        count = len(outcome.arrays)
        session.release()
        return outcome.layout.fill(out[:count]), outcome.updates_layout.fill(out[count:])

    return handle.adapter.lift(handle.opened, "params", body), True


def names_in(closed: jex.ClosedJaxpr) -> Iterator[str]:
    """Lists the names of the functions in a program, in the order of their calls."""
    found: list[str] = []

    def note(name: str) -> None:
        found.append(name)

    _rewritten(closed.jaxpr, note)
    yield from found


def _rewritten(jaxpr: jex.Jaxpr, choose: Choose) -> jex.Jaxpr:
    """Gives the program with its chosen functions exchanged; the same object if there are none, for JAX's caches."""
    eqns = [_equation(jaxpr, eqn, choose) for eqn in jaxpr.eqns]
    return jaxpr if _same(eqns, jaxpr.eqns) else jaxpr.replace(eqns=eqns)


def _equation(jaxpr: jex.Jaxpr, eqn: jex.JaxprEqn, choose: Choose) -> jex.JaxprEqn:
    name = _name(eqn)
    found = None if name is None else choose(name)
    if found is not None and name is not None:
        return _under_rule(jaxpr, eqn, *found, name)
    if eqn.primitive.name in _CLOSED:
        return eqn
    params = {key: _parameter(value, choose) for key, value in eqn.params.items()}
    return eqn if _same(params.values(), eqn.params.values()) else eqn.replace(params=params)


def _parameter(value: Any, choose: Choose) -> Any:
    if isinstance(value, jex.ClosedJaxpr):
        jaxpr = _rewritten(value.jaxpr, choose)
        return value if jaxpr is value.jaxpr else value.replace(jaxpr=jaxpr)
    if isinstance(value, jex.Jaxpr):
        return _rewritten(value, choose)
    if isinstance(value, tuple) and any(isinstance(one, jex.ClosedJaxpr | jex.Jaxpr) for one in value):
        ones = tuple(_parameter(one, choose) for one in value)
        return value if _same(ones, value) else ones
    return value


def _type(aval: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=aval.weak_type)


def _same(new: Iterable[Any], old: Iterable[Any]) -> bool:
    return all(one is other for one, other in zip(new, old, strict=True))


def _name(eqn: jex.JaxprEqn) -> str | None:
    """Gives the name of the function that an equation calls."""
    name = eqn.params.get("name")
    if isinstance(name, str) and isinstance(eqn.params.get("jaxpr"), jex.ClosedJaxpr):
        return name
    program = eqn.params.get("call_jaxpr") if eqn.primitive.name in _CLOSED else None
    if isinstance(program, jex.ClosedJaxpr):
        return program.jaxpr.debug_info.func_src_info.split(" ")[0]
    traced = getattr(eqn.params.get("_prim"), "traced", None)  # what the coming custom_vjp calls
    return traced.fun_name if isinstance(traced, jax.stages.Traced) else None


def _under_rule(jaxpr: jex.Jaxpr, eqn: jex.JaxprEqn, rule: Rule, key: Any, name: str) -> jex.JaxprEqn:
    """Makes the equation that calls the same function under a rule."""
    operands = list(dict.fromkeys(one for one in eqn.invars if isinstance(one, jex.Var)))
    alone = jaxpr.replace(constvars=[], invars=operands, outvars=eqn.outvars, eqns=[eqn], effects=eqn.effects)
    call = jex.jaxpr_as_fun(jex.ClosedJaxpr(alone, []))
    places = [operands.index(one) if isinstance(one, jex.Var) else None for one in eqn.invars]

    def function(*inputs: Any) -> Any:
        given: dict[int, Any] = {at: value for at, value in zip(places, inputs, strict=True) if at is not None}
        out = call(*(given[index] for index in range(len(operands))))
        return out[0] if len(out) == 1 else tuple(out)

    function.__name__ = name
    under_rule = rule(function, key=key)

    def run(*inputs: Any) -> Any:
        return under_rule(*inputs)

    run.__name__ = name
    types = [_type(one.aval) for one in eqn.invars]
    traced = jax.make_jaxpr(jax.jit(run))(*types)
    (made,) = traced.jaxpr.eqns
    if any(isinstance(const, Tracer) for const in traced.consts):
        raise ArgumentError(
            f"{rule.described()} is chosen for the function {name!r}, but has traced fields or a traced key. A rule on "
            "functions by name has concrete ones, for the program is exchanged outside of the trace."
        )
    return made.replace(invars=eqn.invars, outvars=eqn.outvars)
