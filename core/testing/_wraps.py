"""Functions of a handle, and the ways to put the module's own gradient on them as a rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .._custom_vjp import custom_vjp
from .._function_rule import rule
from .._vjp import vjp
from ._subject import Subject
from ._transforms import Loss, inexact_and_others


def call(mdl: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls the module."""
    return mdl(*args, **kwargs)


@rule
def identity(call: Any, y_bar: Any) -> Any:
    """Leaves the module's own gradient as it is."""
    return call.pullback(y_bar)


def by_rule(fn: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Puts the identity on a function of a handle, as a rule."""
    return identity.lift(fn, **options)


def by_custom_vjp(fn: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Puts the identity on a function of a handle, as three functions."""
    chosen = {name: option for name, option in options.items() if name == "grad_vars"}
    forward = lambda mdl, *args, **kwargs: vjp(fn, mdl, *args, **chosen, **kwargs)
    return custom_vjp(fn, forward, lambda pullback, y_bar: pullback(y_bar), **options)


WRAPS = {"rule": by_rule, "custom_vjp": by_custom_vjp}


def loss_of(subject: Subject, use: Callable[..., Any]) -> Loss:
    """Makes a scalar of all that a use returns, with everything else as auxiliary output."""

    def loss(variables: Any, inputs: Any, rest: Any) -> Any:
        out, after = subject.run(variables, rest, use, *inputs)
        leaves, _ = inexact_and_others(out)
        return sum((_weighed(leaf) for leaf in leaves), jnp.zeros(())), (out, after)

    return loss


def _weighed(leaf: Any) -> Any:
    weights = 1 + jnp.arange(leaf.size).reshape(leaf.shape).astype(jnp.float32)
    return jnp.sum(jnp.real(jnp.sin(leaf)).astype(jnp.float32) * weights)


def arguments(subject: Subject) -> tuple[Any, Any, Any]:
    """Gives the arguments of a subject's loss."""
    return subject.variables, subject.inputs, subject.rest


def gradient(subject: Subject, use: Callable[..., Any]) -> tuple[Any, list[Any], list[Any]]:
    """Gives what a use returns and leaves behind, and the flat cotangents of the variables and the inputs."""
    chosen, fill = inexact_and_others((subject.variables, subject.inputs))
    loss = loss_of(subject, use)
    (_, seen), bars = jax.value_and_grad(lambda chosen: loss(*fill(chosen), subject.rest), has_aux=True)(chosen)
    count = len(inexact_and_others(subject.variables)[0])
    return seen, bars[:count], bars[count:]
