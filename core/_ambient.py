"""What surrounds a call on its thread: the attached models that run, the sites entered, whether rules are off.

JAX runs functions late, when their surroundings are gone, so a session keeps those that it was opened in.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax

if TYPE_CHECKING:
    from ._running import Running

# Part of the key of `jax.jit`'s caches: a program traced with rules must not serve where there are none.
_traced_under = jax.make_user_context(())


class Same:
    """An object as a site: equal for that very object alone, which may be gone and its `id` another one's."""

    def __init__(self, one: Any):
        self._one = weakref.ref(one)
        self._hash = id(one)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Same) and (one := self._one()) is not None and one is other._one())

    def __hash__(self) -> int:
        return self._hash


@dataclasses.dataclass(frozen=True)
class Ambient:
    """The surroundings of a call."""

    running: tuple[Running, ...] = ()
    inside: frozenset[Any] = frozenset()
    """The sites whose rule is already around the call."""
    rules_off: bool = False
    detached: frozenset[int] = frozenset()
    """The attachments, by token, that functions around an attached one run without."""

    @property
    def cache_key(self) -> Any:
        """What a traced program depends on."""
        return tuple(running.token for running in self.running), self.rules_off, self.detached

    def within(self, site: Any) -> Ambient:
        """Gives the surroundings of what a site's module does itself."""
        return dataclasses.replace(self, inside=self.inside | {site})


class _Thread(threading.local):
    ambient = Ambient()


_thread = _Thread()


def ambient() -> Ambient:
    """Gives the surroundings of this thread."""
    return _thread.ambient


@contextlib.contextmanager
def entered(surroundings: Ambient) -> Iterator[None]:
    """Runs in the given surroundings, under the interceptors of their attached models."""
    before = _thread.ambient
    if surroundings is before:
        yield
        return
    with contextlib.ExitStack() as stack:
        for running in surroundings.running:
            if running not in before.running:
                stack.enter_context(running.intercepting())
        if surroundings.cache_key != before.cache_key:
            stack.enter_context(_traced_under(surroundings.cache_key))
        _thread.ambient = surroundings
        try:
            yield
        finally:
            _thread.ambient = before


@contextlib.contextmanager
def rules_off() -> Iterator[None]:
    """Runs attached models without their rules, for evaluation: forward passes and gradients are the models' own.

    What `jax.jit` compiled with rules is not used inside, nor the other way round. Rules that were put on
    modules by hand stay on.

    Example:
        >>> import jax.numpy as jnp, crossvjp
        >>> reversal = crossvjp.rule(lambda call, y_bar: call.pullback(-y_bar))
        >>> square = crossvjp.attach(lambda w: w**2, reversal, where=True)
        >>> with rules_off():
        ...     plain = jax.grad(square)(3.0)
        >>> float(plain), float(jax.grad(square)(3.0))
        (6.0, -6.0)
    """
    with entered(dataclasses.replace(ambient(), rules_off=True)):
        yield
