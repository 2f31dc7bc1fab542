"""NNX modules as guests."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

from crossvjp import HandleError
from crossvjp.adapters._flax_metadata import boxed, unboxed
from crossvjp.adapters._nnx_structure import check_structure
from crossvjp.extend import Keys, Path, Variables, changed, public_methods

_GRAPH = True  # opens every module that tree mode opens, and shared variables besides


class NnxGuest:
    """An NNX module with its values, or a function of `rngs` that makes one with the host's keys.

    Its random streams get keys of the host at each call, as by `nnx.reseed`, and are no variables of the host.
    """

    def __init__(self, module: nnx.Module | None, make: Callable[..., Any] | None):
        self._module = None if module is None else nnx.clone(module)  # later writes to the original stay out
        self._make = make

    @functools.cached_property
    def _structure(self) -> tuple[Any, list[tuple[tuple[Any, ...], Any]]]:
        """The module's definition, and its leaves with their paths; of one still to be made, on types alone."""
        make: Any = self._make
        module = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))) if self._module is None else self._module
        return _flattened(module)

    @functools.cached_property
    def methods(self) -> frozenset[str]:
        """The names of the module's other public methods."""
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
        graphdef, template = self._structure
        given = {path: value for leaves in variables.values() for path, value in leaves.items()}
        leaves = [_filled(path, leaf, given) for path, leaf in template]
        module = nnx.merge(graphdef, leaves, copy=True)
        names = sorted({leaf.tag for _, leaf in template if isinstance(leaf, nnx.RngKey)})
        found = keys.spread(names)
        nnx.reseed(module, graph=_GRAPH, policy="match_shape", **found)
        counts = _counts(module)
        out = (module if method == "__call__" else getattr(module, method))(*args, **kwargs)
        after_def, after = _flattened(module)
        if after_def != graphdef:
            check_structure(nnx.merge(graphdef, leaves, copy=True), module)
        drawn = [
            tag for path, (tag, count) in _counts(module).items() if counts.get(path, (tag, count))[1] is not count
        ]
        if not set(drawn) <= set(found):
            raise HandleError(
                f"The guest drew from its stream {next(tag for tag in drawn if tag not in found)!r}, but its host has "
                "no PRNG key for it: give the host one, as its framework has it."
            )
        before = {
            collection: {path: unboxed(value) for path, value in held.items()} for collection, held in variables.items()
        }
        new = {path for held in changed(_variables(after, raw=True), before).values() for path in held}
        boxes = _variables(after)
        return out, {
            collection: chosen
            for collection, held in boxes.items()
            if (chosen := {path: value for path, value in held.items() if path in new})
        }


def _flattened(module: Any) -> tuple[Any, list[tuple[tuple[Any, ...], Any]]]:
    graphdef, flat = nnx.graph.flatten(module, graph=_GRAPH)
    return graphdef, list(flat)


def _values(leaves: list[tuple[tuple[Any, ...], Any]]) -> list[Any]:
    return [leaf for _, leaf in leaves]


def _variables(leaves: list[tuple[tuple[Any, ...], Any]], *, raw: bool = False) -> Variables:
    """Sorts leaves by collection, without what belongs to random streams."""
    found: Variables = {}
    for path, leaf in leaves:
        if not isinstance(leaf, nnx.RngState):
            is_variable = isinstance(leaf, nnx.Variable)
            value = (leaf.get_raw_value() if raw else boxed(leaf)) if is_variable else leaf
            found.setdefault(_collection(leaf), {})[tuple(map(str, path))] = value
    return found


def _collection(leaf: Any) -> str:
    """Names the collection of a leaf: "params" for all that is trained, as every host must know that."""
    if not isinstance(leaf, nnx.Variable):
        return "buffers"
    if isinstance(leaf, nnx.Param):
        return "params"
    try:
        return nnx.variable_name_from_type(type(leaf))
    except ValueError:
        return type(leaf).__name__


def _filled(path: tuple[Any, ...], leaf: Any, given: Mapping[Path, Any]) -> Any:
    """Gives a leaf of the module's definition its value."""
    if isinstance(leaf, nnx.RngState):
        shape = leaf.get_raw_value().shape
        keys = jax.numpy.broadcast_to(jax.random.key(0), shape)  # stands there until the streams are reseeded
        return leaf.replace(keys if isinstance(leaf, nnx.RngKey) else jax.numpy.zeros(shape, jax.numpy.uint32))
    names = tuple(map(str, path))
    if names not in given:
        raise HandleError(f"The host has no value for the guest's variable at {'/'.join(names)!r}.")
    value = unboxed(given[names])
    return leaf.replace(value) if isinstance(leaf, nnx.Variable) else value


def _counts(module: Any) -> dict[tuple[Any, ...], tuple[str, Any]]:
    return {
        path: (leaf.tag, leaf.get_raw_value()) for path, leaf in _flattened(module)[1] if isinstance(leaf, nnx.RngCount)
    }
