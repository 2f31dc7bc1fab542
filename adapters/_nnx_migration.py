"""NNX models as migration sees them: the Variables of a module, by their paths."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from crossvjp.adapters._nnx_models import NnxModels
from crossvjp.extend import Running, is_array
from crossvjp.migration import Arrays, Call


@dataclasses.dataclass(frozen=True)
class OpenedNnx:
    """An NNX module, split into a definition and its Variables."""

    graphdef: Any
    split: tuple[Any, Any, Any]  # parameters, random streams, everything else
    framework: str = "NNX"

    @property
    def params(self) -> Arrays:
        return _flat(self.split[0])

    @property
    def state(self) -> Arrays:
        return _flat(self.split[2])

    def run(self, call: Call | None, params: Arrays, state: Arrays, sample: Sequence[Any]) -> tuple[Any, Arrays]:
        mdl = self._merged(params, state)
        out = mdl(*sample) if call is None else call(mdl, *sample)
        after = _flat(_split(mdl)[1][2])
        return out, {path: after[path] for path in state}

    def observed(self, running: Running) -> OpenedNnx:
        recording = NnxModels().recording(nnx.merge(self.graphdef, *self.split, copy=True), running)
        return OpenedNnx(*_split(recording))

    def inside(self, module: nnx.Module) -> tuple[Arrays, Arrays]:
        split = _split(module)[1]
        return _flat(split[0]), _flat(split[2])

    def tree(self, params: Arrays) -> Any:
        return _filled(self.split[0], params)

    def flat(self, tree: Any) -> Arrays | None:
        if not isinstance(tree, nnx.State | Mapping) or not self.params:
            return None
        return _flat(tree if isinstance(tree, nnx.State) else nnx.State(tree))

    def made(self, params: Arrays, state: Arrays) -> tuple[Any, Any, Any]:
        model = self._merged(params, state)
        return model, None, model

    def _merged(self, params: Arrays, state: Arrays) -> Any:
        own, streams, rest = self.split
        return nnx.merge(self.graphdef, _filled(own, params), streams, _filled(rest, state), copy=True)


class NnxMigration:
    """Opens NNX modules."""

    def owns(self, model: Any) -> bool:
        return isinstance(model, nnx.Module)

    def source(self, model: nnx.Module) -> OpenedNnx:
        return OpenedNnx(*_split(nnx.clone(model)))

    def target(self, model: nnx.Module, call: Call | None, sample: Sequence[Any]) -> OpenedNnx:
        return self.source(model)


def _split(model: Any) -> tuple[Any, tuple[Any, Any, Any]]:
    graphdef, params, streams, rest = nnx.split(model, nnx.Param, nnx.RngState, ...)
    return graphdef, (params, streams, rest)


def _flat(state: Any) -> Arrays:
    """Lists the arrays of a state; what a Variable holds beside arrays stays with the module."""
    values = ((path, _value(leaf)) for path, leaf in nnx.to_flat_state(state))
    return {tuple(map(str, path)): value for path, value in values if is_array(value) or hasattr(value, "aval")}


def _filled(state: Any, arrays: Arrays) -> Any:
    return nnx.from_flat_state(
        {
            path: jax.tree.map(lambda _, path=path: arrays[tuple(map(str, path))], leaf)
            if tuple(map(str, path)) in arrays
            else leaf
            for path, leaf in nnx.to_flat_state(state)
        }
    )


def _value(leaf: Any) -> Any:
    return leaf.get_raw_value() if isinstance(leaf, nnx.Variable) else leaf
