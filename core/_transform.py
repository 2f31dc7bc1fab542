"""Makes a call under a rule: opens the module; the call runs as it is, by a shared program, or by one of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._arrays import is_ref
from ._behaviour import Behaviour, Primals, is_coming
from ._closed_modules import guards_of_modules
from ._closures import hint_at_what_is_not_found
from ._inputs import Handle, Inputs
from ._one_call import Functions, OneCall
from ._repeats import shared
from ._session import Outcome, Session
from ._traces import at_once, in_program, within_program


@dataclasses.dataclass(frozen=True)
class Options:
    """How a call is wrapped, whatever its rule.

    Args:
        grad_vars: which variables the rule answers for.
        nondiff_argnums: positions in `fn(mdl, *args)` that carry no gradient.
        optimize_remat: as in `jax.custom_vjp.defvjp`; then everything counts as differentiated.
    """

    grad_vars: Any = "params"
    nondiff_argnums: Sequence[int] | int = ()
    optimize_remat: bool = False


def transformed_call(
    fn: Callable[..., Any],
    behaviour: Behaviour,
    options: Options,
    mdl: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Calls `fn(mdl, *args, **kwargs)` so that its backward pass is the given behaviour."""
    handle = Handle(mdl, args, kwargs)
    if handle.adapter.initializing(handle.opened):
        return fn(mdl, *args, **kwargs)
    inputs = Inputs(fn, args, kwargs, options.nondiff_argnums, handle.held)

    def body(boundary: Any) -> tuple[Any, Any]:
        session = Session(boundary, handle, inputs, fn)
        if not is_coming() and at_once():
            return _run_as_it_is(session, behaviour, handle.functions)
        return call_inside(session, behaviour, handle.functions, options.optimize_remat)

    out = handle.adapter.lift(handle.opened, options.grad_vars, body)
    inputs.arrays = []
    handle.release()
    behaviour.release()
    return out


def call_inside(
    session: Session, behaviour: Behaviour, handle_functions: Sequence[Any], optimize_remat: bool
) -> tuple[Any, Any]:
    """Makes the call where the boundary is open; returns the output and the updates."""
    behaviour.check(session)
    functions = Functions(session, behaviour, handle_functions)
    call = OneCall(session, behaviour, functions, optimize_remat)
    closed = functions.closures.take()
    closed += guards_of_modules(session, functions.closures, functions.around, closed)
    groups = (list(behaviour.arrays), closed, session.variables, session.context, session.inputs.arrays)
    staged = in_program(itertools.chain(*groups))
    with hint_at_what_is_not_found(session.fn), within_program() if staged else contextlib.nullcontext():
        alone = closed or optimize_remat or not staged  # a call that is computed at once would be compiled
        outcome = None if alone else shared(functions.around(session, []), behaviour, groups, call)
        if outcome is None:
            out, updates = call(*groups)
            outcome = Outcome(out, call.layout, updates, call.updates_layout)
    session.release()
    return _filled(outcome)


def _run_as_it_is(session: Session, behaviour: Behaviour, handle_functions: Sequence[Any]) -> tuple[Any, Any]:
    """Makes a call that nothing differentiates, for it is part of no trace."""
    behaviour.check(session)
    rule = (*behaviour.forward_functions, *behaviour.backward_functions)
    session = session.with_functions(session.fn, handle_functions, rule)
    groups = (list(behaviour.arrays), session.variables, session.context, session.inputs.arrays)
    with hint_at_what_is_not_found(session.fn):
        outcome = behaviour.run(session, Primals(*groups))
    session.release()
    return _filled(outcome)


def _filled(outcome: Outcome) -> tuple[Any, Any]:
    return outcome.layout.fill(map(_as_jax, outcome.arrays)), outcome.updates_layout.fill(map(_as_jax, outcome.updates))


def _as_jax(leaf: Any) -> Any:
    # The coming implementation gives constants of an eager call back as Python's, or in a class of its own.
    return leaf if is_ref(leaf) or isinstance(leaf, jax.Array) or type(leaf) is np.ndarray else jnp.asarray(leaf)
