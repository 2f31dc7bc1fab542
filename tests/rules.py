"""The rules that the tests put on blocks, each written once."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

import crossvjp as cv


@cv.rule
def identity(call, y_bar):
    """Leaves the module's own gradient as it is."""
    return call.pullback(y_bar)


@cv.rule
def sign_gradient(call, y_bar):
    """Signs the parameters' gradient."""
    bar = call.pullback(y_bar)
    return bar.replace(variables=jax.tree.map(jnp.sign, bar.variables))


def f(mdl, *args, **kwargs):
    """Calls the module."""
    return mdl(*args, **kwargs)


def fwd(mdl, *args, **kwargs):
    """Runs the module and keeps its pullback."""
    return cv.vjp(f, mdl, *args, **kwargs)


def unchanged(pullback, y_bar):
    """Gives the module's own cotangents."""
    return pullback(y_bar)


def by_custom_vjp(block: Any) -> Any:
    """Wraps a block by `custom_vjp` with its own gradient."""
    lifted = cv.custom_vjp(f, fwd, unchanged)
    return lambda *args, **kwargs: lifted(block, *args, **kwargs)


def plain(block: Any) -> Any:
    """Leaves the block unwrapped."""
    return block


WRAPS = {"rule": identity, "custom_vjp": by_custom_vjp}
