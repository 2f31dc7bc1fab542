"""Equinox models as migration sees them: the floating arrays of a module, and its state by the indices into it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax

from crossvjp.adapters._equinox_models import EquinoxModels
from crossvjp.extend import Path, Running, path_of
from crossvjp.migration import Arrays, Call, MigrationError


@dataclasses.dataclass(frozen=True)
class OpenedEquinox:
    """An Equinox module, and its state if it was given with one.

    A state's array has the path of its index in the module.
    """

    model: Any
    held: Any = None  # leaves and structure of the state, since a State may be used once
    framework: str = "Equinox"

    @property
    def params(self) -> Arrays:
        return _flat(eqx.filter(self.model, eqx.is_inexact_array))

    @property
    def state(self) -> Arrays:
        return {} if self.held is None else self._read(self.model, self._fresh_state())

    def run(self, call: Call | None, params: Arrays, state: Arrays, sample: Sequence[Any]) -> tuple[Any, Arrays]:
        mdl = self._filled(params)
        if self.held is None:
            return (mdl(*sample) if call is None else call(mdl, *sample)), {}
        held = self._written(mdl, state)
        out = mdl(*sample, held) if call is None else call(mdl, held, *sample)
        if not isinstance(out, tuple) or len(out) != 2 or not isinstance(out[1], eqx.nn.State):
            raise MigrationError(
                "A call of an Equinox model with state must return (output, state), but returned "
                f"{type(out).__name__}. Write it as `lambda mdl, state, x: mdl(x, state)`."
            )
        return out[0], self._read(mdl, out[1])

    def observed(self, running: Running) -> OpenedEquinox:
        return dataclasses.replace(self, model=EquinoxModels().recording(self.model, running))

    def inside(self, module: Any) -> tuple[Arrays, Arrays] | None:
        # Its state stands in another argument; where layers with state are stacked, that is too.
        return None if _indices(module) else (_flat(eqx.filter(module, eqx.is_inexact_array)), {})

    def tree(self, params: Arrays) -> Any:
        return eqx.filter(self._filled(params), _is_float)

    def flat(self, tree: Any) -> Arrays | None:
        return _flat(tree) if isinstance(tree, type(self.model)) and self.params else None

    def made(self, params: Arrays, state: Arrays) -> tuple[Any, Any, Any]:
        model = self._filled(params)
        made = model if self.held is None else (model, self._written(model, state))
        return made, None, made

    def _filled(self, params: Arrays) -> Any:
        def fill(key_path: Any, leaf: Any) -> Any:
            return params.get(path_of(key_path), leaf) if eqx.is_inexact_array(leaf) else leaf

        return jax.tree_util.tree_map_with_path(fill, self.model)

    def _fresh_state(self) -> Any:
        leaves, treedef = self.held
        return jax.tree.unflatten(treedef, leaves)

    def _places(self, model: Any) -> dict[Path, int]:
        """Says which leaf of the state each array is; `State.set` would ask for its weak type too."""
        leaves, treedef = self.held
        numbered = jax.tree.unflatten(treedef, list(range(len(leaves))))
        return {
            (*path, *below): number
            for path, index in _indices(model)
            for below, number in _flat(numbered.get(index)).items()
        }

    def _read(self, model: Any, state: Any) -> Arrays:
        leaves = jax.tree.leaves(state)
        return {path: leaves[number] for path, number in self._places(model).items()}

    def _written(self, model: Any, arrays: Arrays) -> Any:
        leaves, treedef = self.held
        named = {number: path for path, number in self._places(model).items()}
        return jax.tree.unflatten(treedef, [arrays[named[i]] if i in named else x for i, x in enumerate(leaves)])


class EquinoxMigration:
    """Opens Equinox modules, and pairs of a module and its state."""

    def owns(self, model: Any) -> bool:
        if isinstance(model, tuple):
            return len(model) == 2 and isinstance(model[0], eqx.Module) and isinstance(model[1], eqx.nn.State)
        return isinstance(model, eqx.Module)

    def source(self, model: Any) -> OpenedEquinox:
        if isinstance(model, tuple):
            return OpenedEquinox(model[0], jax.tree.flatten(model[1]))
        if _indices(model):
            raise MigrationError(
                f"The Equinox module {type(model).__name__} has state at "
                f"{'/'.join(_indices(model)[0][0])!r}. Pass both, (model, state)."
            )
        return OpenedEquinox(model)

    def target(self, model: Any, call: Call | None, sample: Sequence[Any]) -> OpenedEquinox:
        return self.source(model)


def _flat(tree: Any) -> Arrays:
    return {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _indices(model: Any) -> list[tuple[Path, Any]]:
    def is_index(part: Any) -> bool:
        return isinstance(part, eqx.nn.StateIndex)

    pairs = jax.tree_util.tree_leaves_with_path(model, is_leaf=is_index)
    return [(path_of(path), leaf) for path, leaf in pairs if is_index(leaf)]


def _is_float(leaf: Any) -> bool:
    return eqx.is_inexact_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)
