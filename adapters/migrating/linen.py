"""A Linen model's file: its variables, `{"params": ..., "batch_stats": ...}`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn

from crossvjp.adapters.linen import LinenAdapter
from crossvjp.migration import Call, Migration


def like(model: nn.Module, call: Call | None, sample: Sequence[Any]) -> Any:
    """Gives what the file must have, on types."""
    opened = LinenAdapter.migration.target(model, call, sample)
    return nn.meta.unbox(opened.variables)


def filled(model: nn.Module, values: Any) -> nn.Module:
    """Gives the model with the file's values."""
    return (model if model.scope is None else model.unbind()[0]).bind(values)


def stored(moved: Migration, format: str) -> Any:
    """Gives what is written of a migrated model."""
    return nn.meta.unbox(moved.variables)


def unread(model: nn.Module) -> list[str]:
    """Lists globs of what a file may have besides."""
    return []
