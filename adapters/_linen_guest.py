"""Linen modules as guests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.errors
import flax.linen as nn

from crossvjp.extend import Alike, Keys, Variables, changed, flat, nested, note_missing_key, public_methods


class LinenGuest(Alike):
    """A Linen module; one that is bound to variables has these.

    A host with one key gives that as Flax takes a single key, for all streams; a host whose streams have names
    gives keys by name.
    """

    def __init__(self, module: nn.Module, streams: tuple[str, ...] | None):
        # What is made while a module of Linen runs has that for its parent, and variables of its own nowhere.
        module = module.clone() if isinstance(module.parent, nn.Module) else module
        given, is_bound = module, module.scope is not None
        self._values: Variables | None = None
        if is_bound:
            module, held = module.unbind()
            self._values = _flat(held)
        self._module: Any = module
        self._streams = streams
        super().__init__(given if is_bound else (given, streams), has_values=is_bound)
        names = public_methods(type(module), nn.Module)
        self.methods = frozenset(names) - {"setup", "__call__"}

    def init(self, keys: Keys, method: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Variables:
        if self._values is not None:
            return self._values
        rngs: Any = keys.for_parameters()
        named = self._named(keys)
        if named is not None:
            rngs = {"params": rngs, **named}
        return _flat(self._module.init(rngs, *args, method=method, **kwargs))

    def apply(
        self, variables: Variables, keys: Keys, method: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Any, Variables]:
        mutable = [collection for collection in variables if collection != "params"]
        held = {collection: nested(leaves) for collection, leaves in variables.items()}
        named = self._named(keys)
        rngs = keys.single() if named is None else named
        try:
            out, state = self._module.apply(held, *args, rngs=rngs, method=method, mutable=mutable, **kwargs)
        except flax.errors.InvalidRngError as error:
            note_missing_key(error, f"and the guest's streams, of which it gets {sorted(named or ())}, by `streams`")
            raise
        return out, changed(_flat(state), variables)

    def _named(self, keys: Keys) -> dict[str, Any] | None:
        """Gives the keys of streams by name, or `None` if one key serves for all."""
        names = self._streams or keys.streams
        return keys.spread(names) if names else None


def _flat(variables: Any) -> Variables:
    return {collection: flat(held) for collection, held in variables.items()}
