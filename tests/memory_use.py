"""What a differentiated function keeps for its backward pass, and what its compiled program takes, in bytes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax


def kept_bytes(fn: Callable[..., Any], *args: Any) -> int:
    """Counts what `jax.vjp(fn, *args)` keeps beside its arguments; an array that stands there twice counts once.

    XLA can still remove things when it compiles both passes together; eagerly, this is what is held.
    """
    jaxpr = jax.make_jaxpr(lambda *args: jax.tree.leaves(jax.vjp(fn, *args)[1]))(*args).jaxpr
    given = set(map(id, jaxpr.invars))
    kept = {id(var): var.aval for var in jaxpr.outvars if id(var) not in given}
    return sum(math.prod(aval.shape) * aval.dtype.itemsize for aval in kept.values() if hasattr(aval, "shape"))


def temporary_bytes(fn: Callable[..., Any], *args: Any, **options: Any) -> int:
    """Compiles a function, with options of `jax.jit`, and gives the bytes of its temporaries."""
    analysis = jax.jit(fn, **options).lower(*args).compile().memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes
