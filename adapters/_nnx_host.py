"""Models of any framework as NNX modules."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from flax import nnx

from crossvjp import HandleError
from crossvjp.adapters._flax_metadata import boxed, collection_of, unboxed, variable_of
from crossvjp.adapters._nnx_guest import MISSING, NnxGuest
from crossvjp.extend import (
    Guest,
    Keys,
    Options,
    Path,
    Variables,
    makes_models,
    nested,
    without_initialisation,
)

_OWN = frozenset({"guest", "rngs", "places"})


class Hosted(nnx.Module):
    """A guest as an NNX module: its variables stand below this module at their own paths, typed by collection.

    Where one path has values in two collections, and where a name is this module's own, the later one stands
    below the name of its collection.
    """

    def __init__(self, guest: Guest, variables: Variables, rngs: nnx.Rngs | None):
        self.guest = guest
        self.rngs = nnx.data(rngs)
        self.places = _places(variables)
        self._set(variables)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the guest."""
        return self.call_method("__call__", *args, **kwargs)

    def call_method(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Calls a method of the guest."""
        names = () if self.rngs is None else tuple(self.rngs)
        keys = Keys(self._key, names)
        live = self._variables()
        variables = {collection: {path: boxed(one) for path, one in held.items()} for collection, held in live.items()}
        out, updates = self.guest.apply(variables, keys, method, args, kwargs)
        new: Variables = {}
        for collection, held in updates.items():
            for path, value in held.items():
                variable = live.get(collection, {}).get(path)
                if variable is None:
                    new.setdefault(collection, {})[path] = value
                else:
                    variable.set_raw_value(unboxed(value))
        if new:
            self._set(new)
        return out

    def __getattr__(self, name: str) -> Any:
        """Gives the other methods of the guest."""
        guest = vars(self).get("guest")
        if guest is not None and name in guest.methods:
            return functools.partial(self.call_method, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def _key(self, stream: str) -> Any:
        if self.rngs is None or self.rngs[stream].key.get_metadata().get(MISSING, False):
            return None
        return self.rngs[stream]()

    def _set(self, variables: Variables) -> None:
        """Puts values into Variables at their places."""
        places: dict[tuple[str, Path], Path] = {(place[0], place[1:]): moved for place, moved in self.places}
        flat: dict[Path, Any] = {}
        for collection, held in variables.items():
            for path, value in held.items():
                flat[places.get((collection, path)) or path] = variable_of(collection, value)
        for name, value in nested(flat).items():
            before = vars(self).get(name)
            if isinstance(before, Mapping):
                value = _deep(before, value)
            setattr(self, name, nnx.data(value))

    def _variables(self) -> dict[str, dict[Path, nnx.Variable[Any]]]:
        """Lists the live Variables by collection and by their paths in the guest."""
        moved = {where: (place[0], place[1:]) for place, where in self.places}
        found: dict[str, dict[Path, nnx.Variable[Any]]] = {}
        for path, variable in _walk({name: held for name, held in vars(self).items() if name not in _OWN}):
            collection, path = moved.get(path, (collection_of(variable), path))
            found.setdefault(collection, {})[path] = variable
        return found


def _walk(tree: Mapping[str, Any], path: Path = ()) -> list[tuple[Path, nnx.Variable[Any]]]:
    found: list[tuple[Path, nnx.Variable[Any]]] = []
    for name, part in tree.items():
        if isinstance(part, nnx.Variable):
            found.append(((*path, name), part))
        elif isinstance(part, Mapping):
            found += _walk(part, (*path, name))
    return found


def _deep(before: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Puts nested values among others."""
    both = dict(before)
    for name, value in new.items():
        held = both.get(name)
        both[name] = _deep(held, value) if isinstance(held, Mapping) and isinstance(value, Mapping) else value
    return both


def _places(variables: Variables) -> tuple[tuple[Path, Path], ...]:
    """Finds those values that can't stand at their own paths, as pairs of (collection, *path) and the other place."""
    taken: set[Path] = set()
    inside: set[Path] = set()
    found: list[tuple[Path, Path]] = []
    for collection in sorted(variables, key=lambda name: name != "params"):
        for path in variables[collection]:
            above = {path[:depth] for depth in range(1, len(path))}
            if path in taken or path in inside or above & taken or path[0] in _OWN:
                found.append(((collection, *path), (collection, *path)))
            else:
                taken.add(path)
                inside |= above
    return tuple(found)


class NnxHosting:
    """NNX modules in other frameworks, and others in NNX."""

    framework = "nnx"
    makes_hosts = True

    def guest(self, model: Any, options: Options) -> Guest | None:
        if isinstance(model, nnx.Module):
            return NnxGuest(model, None)
        maker: Any = model
        return NnxGuest(None, maker) if makes_models(model, "rngs") else None

    def own(self, model: Any, options: Options) -> Any:
        if not isinstance(model, nnx.Module) and not makes_models(model, "rngs"):
            return None
        rngs = options.taken("NNX", ("rngs", "streams"), sample=True)["rngs"]
        if isinstance(model, nnx.Module):
            module = nnx.clone(model)
            if rngs is not None:
                tags = {leaf.tag for _, leaf in nnx.to_flat_state(nnx.state(module, nnx.RngKey))}
                nnx.reseed(module, policy="match_shape", **{tag: rngs[tag]() for tag in sorted(tags)})
            return module
        if rngs is None:
            raise HandleError("The guest makes its parameters with the host's keys: give `rngs=nnx.Rngs(...)`.")
        return model(rngs=rngs)

    def host(self, guest: Guest, options: Options) -> nnx.Module:
        taken = options.taken("NNX", ("rngs", "streams"), sample=True)
        rngs: nnx.Rngs | None = taken["rngs"]
        streams = taken["streams"] or ("dropout",)
        keys = Keys(lambda stream: _drawn(rngs, stream), streams, lambda: _drawn(rngs, "params"))
        variables = without_initialisation(guest, keys, "__call__", options.sample, options.keywords)
        own = {name: key for name in streams if (key := _drawn(rngs, name)) is not None}
        return Hosted(guest, variables, nnx.Rngs(**own) if own else None)


def _drawn(rngs: nnx.Rngs | None, stream: str) -> Any:
    return rngs[stream]() if rngs is not None and (stream in rngs or "default" in rngs) else None
