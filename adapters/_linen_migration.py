"""Linen models as migration sees them: a module with its variables, by the paths of its scopes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
from flax.core import DenyList

from crossvjp.extend import Path, Running, types_of
from crossvjp.migration import Arrays, Call, MigrationError


@dataclasses.dataclass(frozen=True)
class OpenedLinen:
    """A Linen module, not bound, and its variables.

    A path in the state has no collection: a batch norm's statistics stand where its parameters do.
    """

    module: nn.Module
    variables: Any
    rngs: Any = None
    framework: str = "Linen"

    @property
    def params(self) -> Arrays:
        return _flat(_plain(self.variables).get("params", {}))

    @property
    def state(self) -> Arrays:
        return {path: value for path, (_, value) in self._state.items()}

    @property
    def _state(self) -> dict[Path, tuple[str, Any]]:
        found: dict[Path, tuple[str, Any]] = {}
        for collection, values in _plain(self.variables).items():
            for path, value in _flat(values).items() if collection != "params" else ():
                if path in found:
                    raise MigrationError(
                        f"The collections {found[path][0]!r} and {collection!r} both have a variable at "
                        f"{'/'.join(path)!r}. Give them different names to move the model."
                    )
                found[path] = collection, value
        return found

    def run(self, call: Call | None, params: Arrays, state: Arrays, sample: Sequence[Any]) -> tuple[Any, Arrays]:
        variables = self._filled(params, state)
        # What is missing is made, so that the comparison of layers finds it, and says where.
        out, after = self.module.apply(
            variables, *sample, method=_method(call), rngs=self.rngs, mutable=DenyList("params")
        )
        written = {path: value for values in after.values() for path, value in _flat(_plain(values)).items()}
        return out, {path: written.get(path, value) for path, value in state.items()}

    def observed(self, running: Running) -> OpenedLinen:
        return self

    def inside(self, module: nn.Module) -> tuple[Arrays, Arrays]:
        held = _plain(module.variables)
        rest = [_flat(values) for collection, values in held.items() if collection != "params"]
        return _flat(held.get("params", {})), {path: value for values in rest for path, value in values.items()}

    def tree(self, params: Arrays) -> Any:
        return _nested(params)

    def flat(self, tree: Any) -> Arrays | None:
        return _flat(_plain(tree)) if isinstance(tree, Mapping) and self.params else None

    def made(self, params: Arrays, state: Arrays) -> tuple[Any, Any, Any]:
        filled = self._filled(params, state)
        # Boxes with the names of axes are the target's; they are put around the new values.
        variables = {
            name: nn.meta.replace_boxed(_dicts(values), filled[name]) if name in filled else {}
            for name, values in self.variables.items()
        }
        return self.module, variables, self.module.bind(variables, rngs=self.rngs)

    def _filled(self, params: Arrays, state: Arrays) -> dict[str, Any]:
        variables = {"params": _nested(params)} if params else {}
        places = self._state
        for name in dict.fromkeys(collection for collection, _ in places.values()):
            variables[name] = _nested({path: value for path, value in state.items() if places[path][0] == name})
        return variables


class LinenMigration:
    """Opens bound modules, and modules that are to be initialised."""

    def owns(self, model: Any) -> bool:
        return isinstance(model, nn.Module)

    def source(self, model: nn.Module) -> OpenedLinen:
        if model.scope is None:
            raise MigrationError(
                f"The Linen module {type(model).__name__} has no values. Bind it to its variables, "
                "`module.bind(variables)`, to move it."
            )
        module, variables = model.unbind()
        return OpenedLinen(module, variables, dict(model.scope.rngs) or None)

    def target(self, model: nn.Module, call: Call | None, sample: Sequence[Any]) -> OpenedLinen:
        if model.scope is not None:
            return self.source(model)
        key = jax.random.key(0)
        variables = types_of(lambda *sample: model.init(key, *sample, method=_method(call)), sample, {})
        return OpenedLinen(model, variables)


def _method(call: Call | None) -> Any:
    def method(mdl: Any, *sample: Any) -> Any:
        return mdl(*sample) if call is None else call(mdl, *sample)

    return method


def _plain(variables: Any) -> Any:
    return nn.meta.unbox(_dicts(variables))


def _dicts(tree: Any) -> Any:
    return {name: _dicts(value) for name, value in tree.items()} if isinstance(tree, Mapping) else tree


def _flat(tree: Any, path: Path = ()) -> Arrays:
    """Lists the leaves of nested dicts, each at its path."""
    if not isinstance(tree, Mapping):
        return {path: tree}
    found: Arrays = {}
    for name, value in tree.items():
        found |= _flat(value, (*path, name))
    return found


def _nested(flat: Arrays) -> Any:
    tree: dict[str, Any] = {}
    for (*above, name), value in flat.items():
        node = tree
        for part in above:
            node = node.setdefault(part, {})
        node[name] = value
    return tree
