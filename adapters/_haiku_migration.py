"""Haiku models as migration sees them: a transformed function with its parameters and state, by module paths."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import haiku as hk
import jax

from crossvjp.adapters._haiku_transformed import BoundTransformed, bind
from crossvjp.extend import Running, types_of
from crossvjp.migration import Arrays, Call, MigrationError


class Calling:
    """What a call gets: the function, whose state is kept from call to call."""

    def __init__(self, net: BoundTransformed):
        self.net = net

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Applies the function; gives its output alone."""
        if self.net.state is None:
            return self.net(*args, **kwargs)
        out, state = self.net(*args, **kwargs)
        self.net = dataclasses.replace(self.net, state=state)
        return out


class Initializing:
    """What a call gets where there are no parameters yet: it makes them, and then runs."""

    def __init__(self, model: Any):
        self._model = model
        self.params: Any = {}
        self.state: Any = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Initialises and applies the function."""
        key = jax.random.key(0)
        made = self._model.init(key, *args, **kwargs)
        with_state = isinstance(self._model, hk.TransformedWithState)
        params, state = made if with_state else (made, None)
        self.params, self.state = {**params, **self.params}, {**(state or {}), **self.state}
        out = bind(self._model, params, state, rng=key)(*args, **kwargs)
        return out[0] if with_state else out


@dataclasses.dataclass(frozen=True)
class OpenedHaiku:
    """A transformed function, bound to its arrays. Module names are split at their slashes."""

    model: Any
    net: BoundTransformed
    framework: str = "Haiku"

    @property
    def params(self) -> Arrays:
        return _flat(self.net.params)

    @property
    def state(self) -> Arrays:
        return _flat(self.net.state or {})

    def run(self, call: Call | None, params: Arrays, state: Arrays, sample: Sequence[Any]) -> tuple[Any, Arrays]:
        held = None if self.net.state is None else _modules(state)
        mdl = Calling(dataclasses.replace(self.net, params=_modules(params), state=held))
        out = mdl(*sample) if call is None else call(mdl, *sample)
        after = _flat(mdl.net.state or {})
        return out, {path: after[path] for path in state}

    def observed(self, running: Running) -> OpenedHaiku:
        return self

    def inside(self, module: hk.Module) -> tuple[Arrays, Arrays]:
        prefix = f"{module.module_name}/"
        return _below(module.params_dict(), prefix), _below(module.state_dict(), prefix)

    def tree(self, params: Arrays) -> Any:
        return _modules(params)

    def flat(self, tree: Any) -> Arrays | None:
        is_modules = isinstance(tree, Mapping) and all(isinstance(values, Mapping) for values in tree.values())
        return _flat(tree) if is_modules and self.params else None

    def made(self, params: Arrays, state: Arrays) -> tuple[Any, Any, Any]:
        held = None if self.net.state is None else _modules(state)
        net = dataclasses.replace(self.net, params=_modules(params), state=held)
        return self.model or net, (net.params if held is None else (net.params, held)), net


class HaikuMigration:
    """Opens bound transformed functions, and transformed functions that are to be initialised."""

    def owns(self, model: Any) -> bool:
        return isinstance(model, BoundTransformed | hk.Transformed | hk.TransformedWithState)

    def source(self, model: Any) -> OpenedHaiku:
        if not isinstance(model, BoundTransformed):
            raise MigrationError(
                f"A {type(model).__name__} has no values. Bind it to them to move it, "
                "`crossvjp.adapters.haiku.bind(transformed, params)`, and its state, if it has one."
            )
        return OpenedHaiku(None, model)

    def target(self, model: Any, call: Call | None, sample: Sequence[Any]) -> OpenedHaiku:
        if isinstance(model, BoundTransformed):
            return self.source(model)

        def init(*sample: Any) -> Any:
            mdl = Initializing(model)
            _ = mdl(*sample) if call is None else call(mdl, *sample)
            return mdl.params, mdl.state

        params, state = types_of(init, sample, {})
        held = state if isinstance(model, hk.TransformedWithState) else None
        return OpenedHaiku(model, bind(model, params, held))


def _flat(modules: Mapping[str, Mapping[str, Any]]) -> Arrays:
    return {(*module.split("/"), name): leaf for module, values in modules.items() for name, leaf in values.items()}


def _modules(flat: Arrays) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for (*module, name), leaf in flat.items():
        found.setdefault("/".join(module), {})[name] = leaf
    return found


def _below(arrays: Mapping[str, Any], prefix: str) -> Arrays:
    return {
        tuple(name.removeprefix(prefix).split("/")): leaf for name, leaf in arrays.items() if name.startswith(prefix)
    }
