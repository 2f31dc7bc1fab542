"""Flax Linen: the scopes that a handle reaches, opened and rebuilt for each run.

The same work as `flax.core.lift.pack`, written on the public `Scope`, with two differences: each
run starts from copies of the RNG counters, where `pack` shares them between runs, so that a second
run would draw other masks; and only what a run changed is published. Private names of Flax are
used in `_linen_modules.py` alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
from flax.core import FrozenDict, Scope
from flax.core.scope import in_filter

from crossvjp import ArgumentError, HandleError
from crossvjp.adapters._linen_host import LinenHosting
from crossvjp.adapters._linen_migration import LinenMigration
from crossvjp.adapters._linen_models import LinenModels
from crossvjp.adapters._linen_modules import Ambient, ClosedScopes, OpenedModule, ScopeFacts, spend
from crossvjp.extend import Body, Partition, Predicate, at_once, predicate, run_and_publish, unknown_choice

_NESTED = (dict, FrozenDict)


class LinenBoundary:
    """The outermost scopes that a handle reaches, as one tree of variables.

    The tree is `{collection: {...}}` relative to the lowest scope that holds them all: for a single
    module, exactly its own `variables`.
    """

    def __init__(self, mdl: Any, grad_vars: Any):
        parts, self._treedef = jax.tree.flatten(mdl, is_leaf=_is_handle)
        self._modules = [_opened(part) for part in parts]
        scopes = [scope for module in self._modules for scope in module.scopes]
        self._live, self._places = _outermost(scopes)
        self._roots = [ScopeFacts.of(root) for root in self._live]
        self._prefixes = _prefixes(self._live)
        self._counters = [_copied(root.rng_counters) for root in self._live]
        self._ambient = Ambient.current()
        self._closed = ClosedScopes(self._live)

        def named(word: Any) -> Predicate:
            try:
                in_filter(word, "params")
            except Exception:
                raise unknown_choice(word, "a collection's name, a filter of Flax") from None
            return lambda path, leaf: in_filter(word, path[0])

        tree: dict[str, Any] = {}
        for root, prefix in zip(self._live, self._prefixes, strict=True):
            for collection, values in root.variables().items():
                _graft(tree.setdefault(collection, {}), prefix, _copied(values))
        self._partition = Partition(tree, predicate(grad_vars, named), grad_vars)
        variables, rest = self._partition.take()
        self.variables = {name: held for name, held in variables.items() if jax.tree.leaves(held)}
        self.context = (rest, [dict(root.rngs) for root in self._live])

    @property
    def static(self) -> Any:
        configured = [module.static for module in self._modules]
        return None if None in configured else (tuple(configured), self._treedef, self._ambient)

    def call(self, fn: Callable[..., Any], variables: Any, context: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        arrays, rngs = context
        tree = self._partition.combine(variables, arrays)
        given = [_subtree(tree, prefix) for prefix in self._prefixes]
        held = [_copied(values) for values in given]
        scopes = [
            root.scope(values, keys, _copied(counters))
            for root, values, keys, counters in zip(self._roots, held, rngs, self._counters, strict=True)
        ]
        opened = [_descend(scopes, *place) for place in self._places]
        rest = iter(opened)
        handles = [module.rebuild([next(rest) for _ in module.scopes]) for module in self._modules]
        with self._ambient.entered([module for module in handles if isinstance(module, nn.Module)]):
            out = fn(jax.tree.unflatten(self._treedef, handles), *args, **kwargs)
        updates = [_changed(now, before) for now, before in zip(held, given, strict=True)]
        self._after = [_copied(scope.rng_counters) for scope in scopes]
        self._names = [module.names_of(handle) for module, handle in zip(self._modules, handles, strict=True)]
        for part in handles:
            if isinstance(part, Scope):
                spend(part)
        for values in held:  # a module of this run that is used later finds nothing, rather than old values
            self._closed.add(values)
            _empty(values)
        return out, updates

    def publish(self, updates: list[Any]) -> None:
        """Writes the updates, the RNG counters and the names given inside into the live scopes and modules."""
        for root, collections, counters in zip(self._live, updates, self._after, strict=True):
            for collection, values in collections.items():
                for name, value in values.items():
                    root.put_variable(collection, name, value)
            _overwrite(root.rng_counters, counters)
        for module, names in zip(self._modules, self._names, strict=True):
            module.take_names(names)
        self._release()

    def _release(self) -> None:
        """Lets go of the live scopes and modules, for JAX keeps the boundary for late runs."""
        self._live = []
        self._modules = [] if at_once() else [module.detached() for module in self._modules]

    def closed(self) -> contextlib.AbstractContextManager[None]:
        return self._closed.refused()


class LinenAdapter:
    """Opens bound Linen modules and `flax.core` scopes. `grad_vars` are collections, or paths that start with one."""

    name = "Flax Linen"
    by_reference = True
    finds_closures = False
    models = LinenModels()
    migration = LinenMigration()
    hosting = LinenHosting()

    def matches(self, mdl: Any) -> bool:
        return isinstance(mdl, nn.Module | Scope)

    def initializing(self, mdl: Any) -> bool:
        handles = [part for part in jax.tree.leaves(mdl, is_leaf=_is_handle) if _is_handle(part)]
        return any(_bound_scope(handle).get_flag("initializing", False) for handle in handles)

    def channel(self, mdl: Any, name: str, initial: Any) -> Any:
        scope = mdl if isinstance(mdl, Scope) else mdl.scope
        if (
            scope is not None
            and not scope.has_variable("channels", name)
            and not scope.is_mutable_collection("channels")
        ):
            return initial  # the variables were given without channels: nobody asks for what is sent
        return mdl.variable("channels", name, lambda: initial).value

    def lift(self, mdl: Any, grad_vars: Any, body: Body) -> Any:
        return run_and_publish(LinenBoundary(mdl, grad_vars), body)


def _is_handle(part: Any) -> bool:
    return isinstance(part, nn.Module | Scope)


def _bound_scope(handle: Any) -> Scope:
    scope = handle if isinstance(handle, Scope) else handle.scope
    if scope is None:
        raise HandleError(
            f"The Linen module {type(handle).__name__} is unbound: it has no variables. Call the rule inside a "
            "method marked `nn.compact` or on a submodule of `setup`, or bind it, `module.bind(variables)`."
        )
    return scope


def _opened(part: Any) -> OpenedModule:
    if not _is_handle(part):
        raise ArgumentError(
            f"A Linen handle holds modules and scopes only, but this one has a leaf of type {type(part).__name__}. "
            "Pass arrays as inputs of the function."
        )
    return OpenedModule.open(part, _bound_scope(part))


def _outermost(scopes: list[Scope]) -> tuple[list[Scope], list[tuple[int, tuple[str, ...]]]]:
    """Finds the scopes that no other scope holds, and the place of each scope below them."""
    if len(scopes) == 1:  # nearly always; comparing scopes is slow
        return scopes, [(0, ())]
    distinct = list(dict.fromkeys(scopes))
    roots: list[Scope] = []
    places = []
    for scope in scopes:
        top, below, names = scope, (), ()
        above = scope
        while above.parent is not None:
            names = (above.name, *names)
            above = above.parent
            if above in distinct:
                top, below = above, names
        if top not in roots:
            roots.append(top)
        places.append((roots.index(top), below))
    return roots, places


def _prefixes(roots: list[Scope]) -> list[tuple[str, ...]]:
    """Says where each scope's variables stand in the one tree."""
    if len(roots) == 1:
        return [()]
    if len({id(root.root) for root in roots}) > 1:  # separately bound modules, whose paths say nothing
        return [(str(index),) for index in range(len(roots))]
    common = 0
    while len({root.path[: common + 1] for root in roots}) == 1:
        common += 1
    return [tuple(root.path[common:]) for root in roots]


def _descend(scopes: list[Scope], index: int, below: tuple[str, ...]) -> Scope:
    scope = scopes[index].rewound()  # its own name reservations, since two handles may share a scope
    for name in below:
        scope = scope.push(name, reuse=True)
    return scope


def _subtree(tree: Mapping[str, Any], prefix: tuple[str, ...]) -> dict[str, Any]:
    found = {}
    for collection, values in tree.items():
        for name in prefix:
            values = values.get(name, {})
        found[collection] = values
    return found


def _graft(tree: dict[str, Any], prefix: tuple[str, ...], values: Any) -> None:
    for name in prefix:
        tree = tree.setdefault(name, {})
    tree.update(values)


def _copied(tree: Any) -> Any:
    """Copies nested mappings as dicts; the leaves, boxes among them, stay the same objects."""
    return {key: _copied(value) for key, value in tree.items()} if isinstance(tree, _NESTED) else tree


def _changed(now: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """Keeps of `now` what `before` does not hold as the very same object."""
    found = {}
    for key, value in now.items():
        old = before.get(key)
        if isinstance(value, _NESTED):
            inner = _changed(value, old if isinstance(old, _NESTED) else {})
            if inner:
                found[key] = inner
        elif value is not old:
            found[key] = value
    return found


def _overwrite(live: dict[Any, Any], values: Mapping[Any, Any]) -> None:
    """Sets nested counters in place: child scopes hold references to the inner dicts."""
    for key, value in values.items():
        if isinstance(value, dict):
            _overwrite(live.setdefault(key, {}), value)
        else:
            live[key] = value


def _empty(tree: dict[str, Any]) -> None:
    for value in tree.values():
        if isinstance(value, dict):
            _empty(value)
    tree.clear()


ADAPTERS = (LinenAdapter(),)
