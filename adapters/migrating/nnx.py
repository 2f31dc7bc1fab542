"""An NNX model's file: its Variables as nested dicts of arrays, without its random streams."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from typing import Any

from flax import nnx

from crossvjp.migration import Call, Migration


def like(model: nnx.Module, call: Call | None, sample: Sequence[Any]) -> Any:
    """Gives what the file must have."""
    return nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.RngState)))


def filled(model: nnx.Module, values: Any) -> nnx.Module:
    """Gives a copy of the model with the file's values; its random streams are its own."""
    graphdef, streams, state = nnx.split(model, nnx.RngState, ...)
    nnx.replace_by_pure_dict(state, values)
    return nnx.merge(graphdef, streams, state, copy=True)


def stored(moved: Migration, format: str) -> Any:
    """Gives what is written of a migrated model: what `nnx.replace_by_pure_dict` takes."""
    return like(moved.model, None, ())


def unread(model: nnx.Module) -> list[str]:
    """Lists globs of what a file may have besides: the random streams, which are part of `nnx.state(model)`."""
    paths = nnx.to_flat_state(nnx.state(model, nnx.RngState)).paths
    return [glob.escape("/".join(map(str, path))) + ending for path in paths for ending in ("", "/value")]
