"""What the Linen adapter needs of Flax's private API, all in one place; tests/test_private_api.py pins it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
from flax.core import Scope
from flax.linen import module as linen_module
from flax.linen import transforms
from flax.linen.transforms import get_module_scopes, set_module_scopes

from crossvjp import HandleError
from crossvjp.extend import Static


@dataclasses.dataclass(frozen=True)
class OpenedModule:
    """A bound module, or a scope, and every scope that it reaches through its attributes."""

    handle: Any
    scopes: list[Scope]
    state: Any
    fields: dict[str, Any]
    """The module's fields but for its place in the model."""
    is_alone: bool = False
    """Whether none of them holds a module or a Variable. Flax looks for these at length, with a trace of `setup`."""

    @staticmethod
    def open(handle: Any, scope: Scope) -> OpenedModule:
        """Collects the scopes; the module's own position in a compact method is kept with them."""
        if isinstance(handle, Scope):
            return OpenedModule(handle, [scope], None, {})
        names = [field.name for field in dataclasses.fields(handle) if field.name not in ("parent", "name")]
        fields = {name: vars(handle).get(name) for name in names}  # one that is set in `setup` may have no value yet
        is_alone = not any(isinstance(leaf, nn.Module | nn.Variable) for leaf in jax.tree.leaves(fields))
        scopes = [scope] if is_alone else get_module_scopes(handle)[0]
        return OpenedModule(handle, scopes, handle._state.export(), fields, is_alone)

    @property
    def static(self) -> Any:
        """The module's class and its fields but for its place in the model; `None` for a scope, or arrays in them."""
        if isinstance(self.handle, Scope):
            return None
        holds_arrays = any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(self.fields))
        if holds_arrays:  # perhaps of a trace that is over when this is still kept
            return None
        return type(self.handle), tuple(self.fields), tuple(map(Static, self.fields.values()))

    def rebuild(self, scopes: list[Scope]) -> Any:
        """Makes a copy of the module that is bound to other scopes."""
        if isinstance(self.handle, Scope):
            return scopes[0]
        if self.is_alone:
            module = self.handle.clone(parent=scopes[0])
        else:
            module = set_module_scopes(self.handle, (), {}, scopes)[0]
        object.__setattr__(module, "_state", self.state.export())
        return module

    def detached(self) -> OpenedModule:
        """Gives the same without the live variables: the module's attributes, bound to empty scopes."""
        empty = [Scope({}, name=scope.name) for scope in self.scopes]
        handle = empty[0] if isinstance(self.handle, Scope) else self.rebuild(empty)
        return dataclasses.replace(self, handle=handle, scopes=empty)

    def names_of(self, rebuilt: Any) -> Any:
        """Reads off a copy of the module where it stopped counting the names of its children."""
        return None if isinstance(self.handle, Scope) else rebuilt._state.export()

    def take_names(self, names: Any) -> None:
        """Lets the live module go on counting there."""
        if not isinstance(self.handle, Scope):
            self.handle._state.reimport(names)


@dataclasses.dataclass(frozen=True)
class Ambient:
    """The dynamic context of a call: interceptors, and what `capture_intermediates` asks for.

    A late run happens outside of it, and has to give the same result.
    """

    interceptors: tuple[Any, ...]
    captures: tuple[Any, ...]

    @staticmethod
    def current() -> Ambient:
        """Takes down the context of this thread."""
        return Ambient(
            tuple(linen_module._global_interceptor_stack._storage), tuple(linen_module._context.capture_stack)
        )

    @contextlib.contextmanager
    def entered(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        """Runs under this context. Submodules made inside belong to the module, if it is a single one."""
        stack, context = linen_module._global_interceptor_stack, linen_module._context
        saved = stack._storage, context.capture_stack
        stack._storage, context.capture_stack = list(self.interceptors), list(self.captures)
        context.module_stack.append(modules[0] if len(modules) == 1 else None)
        try:
            yield
        finally:
            context.module_stack.pop()
            stack._storage, context.capture_stack = saved


def run_unwrapped(mdl: nn.Module, context: Any, interceptor: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Runs an intercepted method on a rebuilt module, under the interceptors that come after the given one.

    The call of the live module has done all that Flax does around a method: names, setup, captured intermediates.
    """
    own = context.orig_method.func
    stack = linen_module._global_interceptor_stack
    all_of_them = stack._storage
    inner = all_of_them[all_of_them.index(interceptor) + 1 :]  # the last one is the innermost
    if not inner:
        return own(mdl, *args, **kwargs)

    @functools.wraps(own)
    def under_all(*args: Any, **kwargs: Any) -> Any:
        stack._storage = all_of_them
        try:
            return own(*args, **kwargs)
        finally:
            stack._storage = inner

    stack._storage = inner
    try:
        return linen_module.run_interceptors(under_all, mdl, *args, **kwargs)
    finally:
        stack._storage = all_of_them


def distinguish_in_jit(place: Callable[[nn.Module], Any]) -> None:
    """Keeps `nn.jit` from serving what it traced of one module for another whose place is a different one.

    Its cache is looked up by a module's class and fields, and neither an interceptor nor a context stands between
    the module and the cache. So what it looks up by has the place too; where that is `None`, it is as it was.
    """
    own = transforms._module_fingerprint
    if own.__module__ != __name__:

        def with_place(module: nn.Module) -> Any:
            there = place(module)
            return own(module) if there is None else (own(module), there)

        transforms._module_fingerprint = with_place


@dataclasses.dataclass(frozen=True)
class ScopeFacts:
    """All of a scope but its variables, keys and counters."""

    name: str | None
    mutable: Any
    path: tuple[str, ...]
    debug_path: tuple[str, ...]
    flags: Any

    @staticmethod
    def of(scope: Scope) -> ScopeFacts:
        """Reads them off a live scope."""
        return ScopeFacts(scope.name, scope.mutable, scope.path, scope.debug_path, scope.flags)

    def scope(self, variables: dict[str, Any], keys: Any, counters: Any) -> Scope:
        """Makes a scope of its own with other variables."""
        scope = Scope(
            variables,
            keys,
            self.name,
            self.mutable,
            parent=None,
            path=self.path,
            debug_path=self.debug_path,
            flags=self.flags,
        )
        scope.rng_counters = counters
        return scope


class ClosedScopes:
    """The scopes that no backward pass may use: the live ones, and those of finished runs."""

    def __init__(self, live: Sequence[Scope]):
        # Weakly, for the live variables may be tracers, and must not outlive their trace.
        self._live = [weakref.ref(scope.root) for scope in live]
        self._spent: list[Any] = []

    def add(self, variables: dict[str, Any]) -> None:
        """Adds the mapping in which a finished run kept its variables."""
        self._spent.append(variables)

    def _holds(self, scope: Scope) -> bool:
        live = [root._variables for reference in self._live if (root := reference()) is not None]
        return any(scope.root._variables is variables for variables in (*live, *self._spent))

    @contextlib.contextmanager
    def refused(self) -> Iterator[None]:
        """Makes every call of a module of these scopes an error."""

        def refuse(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
            scope = context.module.scope
            if scope is not None and self._holds(scope):
                raise _gone(f"The Linen module {type(context.module).__name__} at {scope.path_text}")
            return next_fun(*args, **kwargs)

        with nn.intercept_methods(refuse):
            yield


def spend(scope: Scope) -> None:
    """Makes every later use of a scope that a run handed out an error."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise _gone("A scope")

    for name in ("reserve", "push", "variables", "get_variable", "has_variable", "put_variable", "make_rng", "rewound"):
        setattr(scope, name, refuse)


def _gone(what: str) -> HandleError:
    return HandleError(
        f"{what} is not usable in the backward pass: its variables belong to the forward pass. Return a snapshot of "
        "them, `crossvjp.variables(mdl)`, among the residuals of `forward_fn`."
    )
