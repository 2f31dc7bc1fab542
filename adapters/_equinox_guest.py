"""Equinox modules as guests."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax

from crossvjp import HandleError
from crossvjp.extend import (
    Alike,
    Keys,
    Leaves,
    Path,
    Variables,
    changed,
    has_parameter,
    is_array,
    note_missing_key,
    path_of,
    public_methods,
)


class EquinoxGuest(Alike):
    """An Equinox module with its values, or a function of `key` that makes one.

    Floating arrays are parameters, as Equinox marks no others; other arrays are buffers. State stands where its
    `StateIndex` does.
    """

    def __init__(self, model: Any, make: Callable[..., Any] | None):
        self._model = model
        self._make = make
        super().__init__(model if make is None else make, has_values=make is None)

    @functools.cached_property
    def _structure(self) -> Any:
        """The module, with the initial state in it; of one still to be made, with types for arrays."""
        make: Any = self._make
        return self._model if make is None else eqx.filter_eval_shape(lambda: make(key=jax.random.key(0)))

    @property
    def methods(self) -> frozenset[str]:
        """The names of the module's other public methods."""
        return self._methods

    @functools.cached_property
    def _methods(self) -> frozenset[str]:
        return frozenset(public_methods(type(self._structure), eqx.Module)) - {"__call__"}

    def init(self, keys: Keys, method: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Variables:
        return _variables(self._model if self._make is None else self._make(key=keys.for_parameters()))

    def apply(
        self, variables: Variables, keys: Keys, method: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Any, Variables]:
        whole = _filled(self._structure, variables)
        model, state = eqx.nn.make_with_state(lambda: whole)()
        function = model if method == "__call__" else getattr(model, method)
        takes_key = "key" not in kwargs and has_parameter(function, "key")
        key = keys.single() if takes_key else None
        given = {**kwargs, **({} if key is None else {"key": key})}
        if not indices(model):
            return self._run(function, args, given, takes_key and key is None), {}
        if has_parameter(function, "state"):
            given["state"] = state
        else:
            args = (*args, state)
        out, state = _taken_out(self._run(function, args, given, takes_key and key is None))
        held = {path: state.get(index) for path, index in indices(model)}
        return out, changed({"state": _below(held)}, variables)

    def _run(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], lacks_key: bool) -> Any:
        try:
            return function(*args, **kwargs)
        except (RuntimeError, TypeError) as error:
            if lacks_key and "key" in str(error):
                note_missing_key(error, "for the guest's argument `key`")
            raise


def with_state_inside(model: Any, state: eqx.nn.State | None) -> Any:
    """Gives a module whose indices hold its state as their initial one, as a module has it that was just made.

    Raises:
        HandleError: the state was taken out of the module, and is not given.
    """

    def one(part: Any) -> Any:
        if not _is_index(part):
            return part
        if state is not None:
            return eqx.nn.StateIndex(state.get(part))
        if not jax.tree.leaves(part.init):
            raise HandleError(
                f"The {type(model).__name__} was made by eqx.nn.make_with_state, which took its state out of it: give "
                "both, crossvjp.host((module, state), ...)."
            )
        return part

    return jax.tree.map(one, model, is_leaf=_is_index)


def indices(model: Any) -> list[tuple[Path, eqx.nn.StateIndex[Any]]]:
    """Lists the state indices of a module with their paths."""
    return [(path, part) for path, part in _parts(model) if _is_index(part)]


def _parts(model: Any) -> list[tuple[Path, Any]]:
    return [(path_of(path), part) for path, part in jax.tree_util.tree_leaves_with_path(model, is_leaf=_is_index)]


def _is_index(part: Any) -> bool:
    return isinstance(part, eqx.nn.StateIndex)


def _is_kept(leaf: Any) -> bool:
    return is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)


def _variables(whole: Any) -> Variables:
    found: Variables = {}
    for path, leaf in _parts(whole):
        if _is_kept(leaf):
            found.setdefault(_collection(leaf), {})[path] = leaf
    state = _below({path: index.init for path, index in indices(whole)})
    return {**found, **({"state": state} if state else {})}


def _collection(leaf: Any) -> str:
    return "params" if jax.numpy.issubdtype(leaf.dtype, jax.numpy.inexact) else "buffers"


def _below(values: Mapping[Path, Any]) -> Leaves:
    """Lists the arrays of trees that stand at paths."""
    pairs = [(at, jax.tree_util.tree_leaves_with_path(value)) for at, value in values.items()]
    return {(*at, *path_of(path)): leaf for at, leaves in pairs for path, leaf in leaves}


def _filled(whole: Any, variables: Variables) -> Any:
    """Puts values into a module, and into the initial values of its state."""

    def value(collection: str, path: Path) -> Any:
        if path not in variables.get(collection, {}):
            raise HandleError(f"The host has no value for the guest's array at {'/'.join(path)!r}.")
        return variables[collection][path]

    def one(path: Any, part: Any) -> Any:
        at = path_of(path)
        if _is_index(part):
            held = jax.tree_util.tree_map_with_path(lambda inner, _: value("state", (*at, *path_of(inner))), part.init)
            return eqx.nn.StateIndex(held)
        return value(_collection(part), at) if _is_kept(part) else part

    return jax.tree_util.tree_map_with_path(one, whole, is_leaf=_is_index)


def _taken_out(out: Any) -> tuple[Any, eqx.nn.State]:
    """Takes the State out of what a call returned."""
    parts = out if isinstance(out, tuple) else (out,)
    states = [part for part in parts if isinstance(part, eqx.nn.State)]
    if len(states) != 1:
        raise HandleError(
            "An Equinox guest with state must return a tuple with one eqx.nn.State in it, as Equinox layers do, but "
            f"returned a {type(out).__name__} with {len(states)}."
        )
    rest = tuple(part for part in parts if not isinstance(part, eqx.nn.State))
    return rest[0] if len(rest) == 1 else rest, states[0]
