"""msgpack as `flax.serialization` writes it: what `flax.serialization.to_bytes` and `from_bytes` take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flax import serialization

from crossvjp.adapters.files._errors import FileError


def read(path: Path) -> dict[str, Any]:
    """Reads dicts of arrays."""
    made = serialization.msgpack_restore(path.read_bytes())
    if not isinstance(made, dict):
        raise FileError(f"it holds a {type(made).__name__} instead of parameters")
    return made


def write(path: Path, tree: dict[str, Any]) -> None:
    """Writes dicts of arrays."""
    path.write_bytes(serialization.msgpack_serialize(tree))
