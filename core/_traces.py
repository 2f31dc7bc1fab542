"""Which trace of JAX runs now, and whether what is called in it becomes part of a program."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax.core import Tracer


def trace_state() -> Any:
    """Names the trace that runs now."""
    return _get_state()(convention="flax")


def in_program(arrays: Iterable[Any]) -> bool:
    """Says whether a call of these becomes part of a program, as under `jax.jit`, and is not computed at once."""
    return any(map(_is_staged, arrays))


def within_program() -> contextlib.AbstractContextManager[Any]:
    """A context in which functions under `jax.jit` are traced as where JAX runs a part of a program again.

    There the mesh is set, to an empty one if it was not set, and `jax.jit` takes that for another case: without this
    context, it would trace what a layer consists of once outside, and once more in the passes of a call.
    """
    return jax.sharding.use_abstract_mesh(jax.sharding.get_abstract_mesh())


def at_once() -> bool:
    """Says whether none does, so that operations are computed at once and nothing is differentiated."""
    return trace_state() == _outside()


@functools.cache
def _get_state() -> Callable[..., Any]:
    import jax.core
    import jax.extend.core  # here, since it imports Pallas: a fifth of the time that importing crossvjp takes

    # Older versions of JAX have it elsewhere.
    return getattr(jax.extend.core, "get_opaque_trace_state", None) or jax.core.get_opaque_trace_state


@functools.cache
def _outside() -> Any:
    cell: list[Any] = []
    thread = threading.Thread(target=lambda: cell.append(trace_state()))  # which no trace has been begun in
    thread.start()
    thread.join()
    return cell[0]


def _is_staged(array: Any) -> bool:
    # What `jax.grad` and `jax.vmap` hand over stands for a value of the trace around them.
    while isinstance(array, Tracer):
        name = _name_of_inner(type(array))
        array = None if name is None else getattr(array, name)
        if not hasattr(array, "dtype"):
            return True
    return False


@functools.cache
def _name_of_inner(kind: type) -> str | None:
    """Names the attribute of a tracer that holds what it stands for.

    Asked of its class, since a tracer that lacks an attribute looks for it in its type, too, which takes long.
    """
    return next((name for name in ("primal", "val") if hasattr(kind, name)), None)
