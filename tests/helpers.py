"""JAX's two implementations of `custom_vjp`, today's and the coming one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax

from crossvjp.testing import one_by_one

# Older versions of JAX have no coming one.
IMPLEMENTATIONS = ("today", "coming") if "jax_custom_vjp3" in jax.config.values else ("today",)


@contextlib.contextmanager
def custom_vjp_of(mode: str) -> Iterator[None]:
    """Runs with today's `jax.custom_vjp`, or with the coming one that `JAX_CUSTOM_VJP3=1` chooses."""
    if (mode,) == IMPLEMENTATIONS:
        yield
        return
    before = is_coming()
    jax.config.update("jax_custom_vjp3", {"today": False, "coming": True}[mode])
    try:
        yield
    finally:
        jax.config.update("jax_custom_vjp3", before)


def is_coming() -> bool:
    """Says whether the coming implementation is the chosen one."""
    return jax.config.values.get("jax_custom_vjp3", False)


def as_called(function: Any) -> Any:
    """Leaves a function as it is, or runs it one by one where JAX compiles what an eager custom_vjp calls."""
    return one_by_one(function) if is_coming() else function
