"""A Haiku model's file: parameters, `(params, state)` in a pickle, and `{"params": ..., "state": ...}` elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import haiku as hk

from crossvjp.adapters.haiku import HaikuAdapter, bind
from crossvjp.migration import Call, Migration


def like(model: Any, call: Call | None, sample: Sequence[Any]) -> Any:
    """Gives what the file must have, on types."""
    net = HaikuAdapter.migration.target(model, call, sample).net
    return {"params": net.params, **({"state": net.state} if net.state else {})}


def filled(model: Any, values: Any) -> Any:
    """Gives the model with the file's values."""
    with_state = isinstance(model, hk.TransformedWithState)
    return bind(model, values["params"], values.get("state", {}) if with_state else None)


def stored(moved: Migration, format: str) -> Any:
    """Gives what is written of a migrated model."""
    if not isinstance(moved.variables, tuple) or format == "pickle":
        return moved.variables
    params, state = moved.variables
    return {"params": params, "state": state}


def unread(model: Any) -> list[str]:
    """Lists globs of what a file may have besides."""
    return []
