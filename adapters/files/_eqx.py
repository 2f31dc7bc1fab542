"""Equinox's `.eqx`: the leaves of a model one after the other, without names, so that reading needs the model.

A line of JSON before them, where many keep a model's hyperparameters, is passed over.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np

from crossvjp.adapters.files._errors import FileError
from crossvjp.adapters.files._trees import SCALARS

MAGIC = b"\x93NUMPY"


def records(path: Path) -> list[np.ndarray]:
    """Reads the leaves."""
    content = path.read_bytes()
    file = io.BytesIO(content)
    if content.startswith(b"{"):
        file.readline()
    made = []
    while file.tell() < len(content):
        made.append(np.load(file, allow_pickle=False))
    return made


def is_kept(leaf: Any) -> bool:
    """Says whether Equinox writes a leaf: arrays and Python's numbers."""
    return isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct, np.ndarray, np.generic, *SCALARS))


def typed(record: np.ndarray, dtype: Any) -> np.ndarray:
    """Gives bytes, as which bfloat16 is written, their dtype back."""
    if record.dtype.kind == "V" and record.dtype.itemsize == np.dtype(dtype).itemsize:
        return record.view(dtype)
    return record


def write(path: Path, tree: Any) -> None:
    """Writes a model, or `(model, state)`, as Equinox does."""
    for leaf in jax.tree.leaves(tree):
        dtype = getattr(leaf, "dtype", np.dtype(bool))
        if dtype.itemsize == 1 and dtype.kind == "V":
            raise FileError(f"it can't hold {dtype}: Equinox would not read it back")
    with path.open("wb") as file:
        eqx.tree_serialise_leaves(file, tree)
