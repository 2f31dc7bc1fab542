"""Transformed Haiku functions as guests."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import haiku as hk

from crossvjp.adapters._haiku_transformed import BoundTransformed
from crossvjp.extend import Alike, Keys, Leaves, Variables, changed, note_missing_key


class HaikuGuest(Alike):
    """A transformed function; one that is bound to parameters and state has these."""

    methods: frozenset[str] = frozenset()

    def __init__(self, transformed: hk.Transformed | hk.TransformedWithState | BoundTransformed):
        self._transformed: Any = transformed
        self._is_bound = isinstance(transformed, BoundTransformed)
        super().__init__(transformed, has_values=self._is_bound)
        if isinstance(transformed, BoundTransformed):
            self._has_state = transformed.state is not None
        else:
            self._has_state = isinstance(transformed, hk.TransformedWithState)
        first = list(inspect.signature(transformed.apply).parameters)[1 + self._has_state :]
        self._takes_rng = first[:1] == ["rng"]  # not under `hk.without_apply_rng`

    def init(self, keys: Keys, method: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Variables:
        held = self._transformed
        if self._is_bound:
            params, state = held.params, held.state or {}
        elif self._has_state:
            params, state = held.init(keys.for_parameters(), *args, **kwargs)
        else:
            params, state = held.init(keys.for_parameters(), *args, **kwargs), {}
        return {name: leaves for name, leaves in (("params", _flat(params)), ("state", _flat(state))) if leaves}

    def apply(
        self, variables: Variables, keys: Keys, method: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Any, Variables]:
        given = [_bundles(variables.get("params", {}))]
        if self._has_state:
            given.append(_bundles(variables.get("state", {})))
        rng = keys.single() if self._takes_rng else None
        try:
            out = self._transformed.apply(*given, *([rng] if self._takes_rng else []), *args, **kwargs)
        except ValueError as error:
            if rng is None and "RNG" in str(error):
                note_missing_key(error, "for `hk.next_rng_key` in the guest")
            raise
        if not self._has_state:
            return out, {}
        out, state = out
        return out, changed({"state": _flat(state)}, variables)


def _flat(bundles: Mapping[str, Mapping[str, Any]]) -> Leaves:
    return {(*module.split("/"), name): value for module, held in bundles.items() for name, value in held.items()}


def _bundles(leaves: Leaves) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for path, value in leaves.items():
        found.setdefault("/".join(path[:-1]), {})[path[-1]] = value
    return found
