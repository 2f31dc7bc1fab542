"""Plain functions of parameters as guests."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax

from crossvjp import HandleError
from crossvjp.extend import (
    Alike,
    Guest,
    Keys,
    Options,
    Variables,
    changed,
    has_parameter,
    is_array,
    note_missing_key,
    path_of,
)


class PlainGuest(Alike):
    """A pair `(init, apply)`, or a `Partial` of `apply` and its values.

    A dict of "params" and more holds collections, of which `apply` returns those that it changed beside its output.
    Everything else is parameters, as far as it is floating arrays, and buffers.
    """

    methods: frozenset[str] = frozenset()

    def __init__(self, init: Callable[..., Any] | None, apply: Callable[..., Any], values: Any):
        self._init = init
        self._apply = apply
        self._values = values
        self._structure: Any = None
        super().__init__(values if init is None else (init, apply), has_values=init is None)

    def init(self, keys: Keys, method: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Variables:
        values = self._values if self._init is None else self._made(keys.for_parameters(), args, kwargs)
        self._structure = jax.tree.map(_type_of, values)
        return _variables(values)

    def apply(
        self, variables: Variables, keys: Keys, method: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Any, Variables]:
        structure = self._structure_for(args, kwargs)
        values = _filled(structure, variables)
        takes_key = "key" not in kwargs and has_parameter(self._apply, "key")
        key = keys.single() if takes_key else None
        given = {**kwargs, **({} if key is None else {"key": key})}
        try:
            out = self._apply(values, *args, **given)
        except (RuntimeError, TypeError) as error:
            if takes_key and key is None and "key" in str(error):
                note_missing_key(error, "for the argument `key` of `apply`")
            raise
        if not _has_collections(structure) or set(structure) == {"params"}:
            return out, {}
        if not (isinstance(out, tuple) and len(out) == 2 and isinstance(out[1], Mapping)):
            raise HandleError(
                "The variables of the plain guest have other collections than 'params', so its `apply` must return "
                f"(out, collections), with a dict of those that it changed, but returned a {type(out).__name__}."
            )
        out, updates = out
        if "params" in updates or not set(updates) <= set(structure):
            raise HandleError(
                f"`apply` of the plain guest may change {sorted(set(structure) - {'params'})}, but gave back "
                f"{sorted(updates)}."
            )
        return out, changed(_variables({"params": {}, **updates}), variables)

    def _made(self, key: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        init: Any = self._init
        return init(key) if _takes_only_a_key(init) else init(key, *args, **kwargs)

    def _structure_for(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Gives the values' tree with types for arrays; traces `init` where another process has run it."""
        if self._structure is None and self._init is None:
            self._structure = jax.tree.map(_type_of, self._values)
        if self._structure is None:
            held: list[Any] = []

            def run() -> None:
                values = self._made(jax.random.key(0), args, kwargs)
                held.append(jax.tree.map(_type_of, values))

            jax.eval_shape(run)
            self._structure = held.pop()
        return self._structure


def _type_of(leaf: Any) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if is_array(leaf) else leaf


def _has_collections(values: Any) -> bool:
    return isinstance(values, Mapping) and "params" in values


def _variables(values: Any) -> Variables:
    found: Variables = {}
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(values):
        if is_array(leaf):
            collection, path = _place(values, path_of(key_path), leaf)
            found.setdefault(collection, {})[path] = leaf
    return found


def _place(values: Any, path: tuple[str, ...], leaf: Any) -> tuple[str, tuple[str, ...]]:
    if _has_collections(values):
        return path[0], path[1:] or ("value",)
    trained = jax.numpy.issubdtype(leaf.dtype, jax.numpy.inexact)
    return "params" if trained else "buffers", path or ("value",)


def _filled(structure: Any, variables: Variables) -> Any:
    def one(key_path: Any, leaf: Any) -> Any:
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        collection, path = _place(structure, path_of(key_path), leaf)
        if path not in variables.get(collection, {}):
            raise HandleError(f"The host has no value for the guest's array at {'/'.join((collection, *path))!r}.")
        return variables[collection][path]

    return jax.tree_util.tree_map_with_path(one, structure)


def _takes_only_a_key(init: Callable[..., Any]) -> bool:
    try:
        parameters = list(inspect.signature(init).parameters.values())
    except (TypeError, ValueError):  # built-in functions have no signature
        return False
    return len(parameters) == 1 and parameters[0].kind is not inspect.Parameter.VAR_POSITIONAL


class PlainHosting:
    """Plain functions in the modules of all frameworks; they hold no submodules themselves."""

    framework = "plain"
    makes_hosts = False

    def guest(self, model: Any, options: Options) -> Guest | None:
        if isinstance(model, jax.tree_util.Partial) and len(model.args) == 1 and not model.keywords:
            return PlainGuest(None, model.func, model.args[0])
        if isinstance(model, tuple) and len(model) == 2 and all(callable(part) for part in model):
            return PlainGuest(*model, None)
        return None

    def own(self, model: Any, options: Options) -> Any:
        return None

    def host(self, guest: Guest, options: Options) -> Any:
        raise HandleError("Plain JAX has no modules that could hold a guest.")
