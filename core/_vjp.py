"""`vjp` and `variables`: the module's own pullback, and a snapshot of its variables, in any framework."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax

from ._cotangents import Order, check_order
from ._inputs import Handle, Inputs
from ._pullback import Pullback
from ._session import Session

if TYPE_CHECKING:
    from jaxtyping import PyTree


def vjp(
    fn: Callable[..., Any],
    mdl: Any,
    *args: Any,
    grad_vars: Any = "params",
    order: Order = "inputs_first",
    **kwargs: Any,
) -> tuple[Any, Pullback]:
    """Runs `fn(mdl, *args, **kwargs)` and gives its pullback, as `jax.vjp` does for plain functions.

    Args:
        fn: a function of a module handle and any inputs.
        mdl: the module handle.
        *args: the inputs. Arrays among their leaves are differentiated; Python scalars pass as they are.
        grad_vars: the variables that the pullback gives a cotangent for; as in `custom_vjp`.
        order: the order in which the pullback's `Cotangents` unpack.
        **kwargs: inputs by keyword.

    Returns:
        The output, and the pullback: a function from the output's cotangent to `Cotangents`, which
        is a pytree and may be a residual. Values that the call writes into the framework's state
        are published; the pullback does not differentiate them.

    Raises:
        HandleError: `mdl` can't be opened.
        ArgumentError: `grad_vars` selects nothing.

    Example:
        >>> import jax.numpy as jnp
        >>> y, pullback = vjp(lambda w, x: w["a"] * x, {"a": jnp.array(2.0)}, jnp.array(3.0))
        >>> x_bar, w_bar = pullback(jnp.array(1.0))
        >>> float(y), float(x_bar), float(w_bar["a"])
        (6.0, 2.0, 3.0)
    """
    check_order(order)
    handle = Handle(mdl, args, kwargs)
    inputs = Inputs(fn, args, kwargs, (), handle.held)

    def body(boundary: Any) -> tuple[Any, PyTree]:
        session = Session(boundary, handle, inputs, fn)
        outcome, pullback = session.linearize(session.variables, session.context, inputs.arrays, order)
        return (outcome.layout.fill(outcome.arrays), pullback), outcome.updates_layout.fill(outcome.updates)

    return handle.adapter.lift(handle.opened, grad_vars, body)


def variables(mdl: Any, grad_vars: Any = "params") -> PyTree:
    """Takes a snapshot of a module's variables, in the framework's own containers.

    Args:
        mdl: the module handle; in `forward_fn`, the one that it got.
        grad_vars: which variables; as in `custom_vjp`.

    Returns:
        A pytree of arrays, shaped as a pullback's `.variables`. It may be a residual.

    Raises:
        HandleError: `mdl` can't be opened.
    """
    handle = Handle(mdl, (), {})

    def body(boundary: Any) -> tuple[None, PyTree]:
        return jax.tree.map(lambda leaf: leaf, boundary.variables), None

    return handle.adapter.lift(handle.opened, grad_vars, body)
