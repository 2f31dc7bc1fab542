"""NNX modules as guests."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
from flax import nnx

from crossvjp import HandleError
from crossvjp.adapters._flax_metadata import boxed, collection_of, unboxed
from crossvjp.adapters._nnx_structure import check_structure
from crossvjp.extend import Alike, Keys, Path, Variables, public_methods, used_keys

_Leaves: TypeAlias = list[tuple[tuple[Any, ...], Any]]
MISSING = "crossvjp_missing"
"""Marks the key of a stream that has none: a guest inside this one is not given it."""

_GRAPH = True  # opens every module that tree mode opens, and shared variables besides


class NnxGuest(Alike):
    """An NNX module with its values, or a function of `rngs` that makes one with the host's keys.

    Its random streams get keys of the host at each call, as by `nnx.reseed`, and are no variables of the host.
    """

    def __init__(self, module: nnx.Module | None, make: Callable[..., Any] | None):
        self._module = None if module is None else nnx.clone(module)  # later writes to the original stay out
        self._make = make
        super().__init__(module if make is None else make, has_values=make is None)

    @functools.cached_property
    def _structure(self) -> tuple[Any, _Leaves]:
        """The module's definition, and its leaves with their paths; of one still to be made, on types alone."""
        make: Any = self._make
        module = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))) if self._module is None else self._module
        return _flattened(module)

    @property
    def methods(self) -> frozenset[str]:
        """The names of the module's other public methods."""
        return self._methods

    @functools.cached_property
    def _methods(self) -> frozenset[str]:
        graphdef, leaves = self._structure
        return frozenset(public_methods(type(nnx.merge(graphdef, _values(leaves))), nnx.Module)) - {"__call__"}

    def init(self, keys: Keys, method: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Variables:
        if self._make is None:
            return _variables(self._structure[1])
        module = self._make(rngs=nnx.Rngs(keys.for_parameters()))
        return _variables(_flattened(module)[1])

    def apply(
        self, variables: Variables, keys: Keys, method: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Any, Variables]:
        template = self._structure[1]
        plain = {name: {path: unboxed(value) for path, value in held.items()} for name, held in variables.items()}
        given = {path: value for held in plain.values() for path, value in held.items()}
        found = keys.spread(sorted({leaf.tag for _, leaf in template if isinstance(leaf, nnx.RngKey)}))
        leaves = [_filled(path, leaf, given, found) for path, leaf in template]

        def run(streams: Mapping[str, Any]) -> tuple[Any, Variables, list[str]]:
            out, after, drawn = self._call(leaves, streams, method, args, kwargs)
            written = [(path, leaf) for path, leaf in after if _raw(leaf) is not given.get(tuple(map(str, path)))]
            return out, _variables(written), drawn

        out, updates, drawn = run(found)
        missing = sorted(set(drawn) - set(found))
        # What runs inside may draw keys that nobody uses, or count on without drawing.
        used = used_keys(lambda drawn: run({**found, **dict(zip(missing, drawn, strict=True))})[:2], len(missing))
        for tag in (tag for tag, is_used in zip(missing, used, strict=True) if is_used):
            raise HandleError(
                f"The guest drew from its stream {tag!r}, but its host has no PRNG key for it: give the host one, as "
                "its framework has it."
            )
        return out, updates

    def _call(
        self,
        leaves: list[Any],
        streams: Mapping[str, Any],
        method: str,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> tuple[Any, _Leaves, list[str]]:
        """Calls a method; gives its output, the leaves after it, and the streams whose counters moved."""
        graphdef = self._structure[0]
        module: Any = nnx.merge(graphdef, leaves, copy=True)
        nnx.reseed(module, graph=_GRAPH, policy="match_shape", **streams)
        counts = _counts(_flattened(module)[1])
        out = (module if method == "__call__" else getattr(module, method))(*args, **kwargs)
        graphdef_after, after = _flattened(module)
        if graphdef_after != graphdef:
            check_structure(nnx.merge(graphdef, leaves, copy=True), module, "a host")
        moved = [tag for path, (tag, now) in _counts(after).items() if path in counts and counts[path][1] is not now]
        return out, after, moved


def _flattened(module: Any) -> tuple[Any, _Leaves]:
    graphdef, flat = nnx.graph.flatten(module, graph=_GRAPH)
    return graphdef, list(flat)


def _values(leaves: _Leaves) -> list[Any]:
    return [leaf for _, leaf in leaves]


def _raw(leaf: Any) -> Any:
    return leaf.get_raw_value() if isinstance(leaf, nnx.Variable) else leaf


def _variables(leaves: _Leaves) -> Variables:
    """Sorts leaves by collection, without what belongs to random streams."""
    found: Variables = {}
    for path, leaf in leaves:
        if not isinstance(leaf, nnx.RngState):
            value = boxed(leaf) if isinstance(leaf, nnx.Variable) else leaf
            found.setdefault(collection_of(leaf), {})[tuple(map(str, path))] = value
    return found


def _filled(path: tuple[Any, ...], leaf: Any, given: Mapping[Path, Any], found: Mapping[str, Any]) -> Any:
    """Gives a leaf of the module's definition its value."""
    if isinstance(leaf, nnx.RngState):
        shape = leaf.get_raw_value().shape
        if not isinstance(leaf, nnx.RngKey):
            return leaf.replace(jax.numpy.zeros(shape, jax.numpy.uint32))
        stands_in = jax.numpy.broadcast_to(jax.random.key(0), shape)  # until the streams are reseeded
        return leaf.replace(stands_in) if leaf.tag in found else leaf.replace(stands_in, **{MISSING: True})
    names = tuple(map(str, path))
    if names not in given:
        raise HandleError(f"The host has no value for the guest's variable at {'/'.join(names)!r}.")
    value = unboxed(given[names])
    return leaf.replace(value) if isinstance(leaf, nnx.Variable) else value


def _counts(leaves: _Leaves) -> dict[Any, tuple[str, Any]]:
    return {path: (leaf.tag, leaf.get_raw_value()) for path, leaf in leaves if isinstance(leaf, nnx.RngCount)}
