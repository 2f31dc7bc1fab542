"""An Equinox model's file: `.eqx`, or its arrays by the names of its fields; with its state, both after each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import equinox as eqx

from crossvjp.migration import Call, Migration


def like(model: Any, call: Call | None, sample: Sequence[Any]) -> Any:
    """Gives what the file must have: the model, or (model, state)."""
    return model


def filled(model: Any, values: Any) -> Any:
    """Gives the model with the file's values."""
    return values


def stored(moved: Migration, format: str) -> Any:
    """Gives what is written of a migrated model."""
    return moved.model if format == "eqx" else eqx.filter(moved.model, eqx.is_array)


def unread(model: Any) -> list[str]:
    """Lists globs of what a file may have besides."""
    return []
