"""Equinox's `.eqx`: the leaves of a model one after the other, without names, so that reading needs the model.

A line of JSON before them, where many keep a model's hyperparameters, is passed over.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import ml_dtypes
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
        made.append(typed(np.load(file, allow_pickle=False)))
    return made


def is_kept(leaf: Any) -> bool:
    """Says whether Equinox writes a leaf: arrays and Python's numbers."""
    return isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct, np.ndarray, np.generic, *SCALARS))


def typed(record: np.ndarray) -> np.ndarray:
    """Gives bytes, as which bfloat16 is written, their dtype back; it is the only one of two bytes that NumPy lacks."""
    return record.view(ml_dtypes.bfloat16) if record.dtype == np.dtype("V2") else record


def write(path: Path, tree: Any) -> None:
    """Writes a model, or `(model, state)`, as Equinox does."""
    for leaf in jax.tree.leaves(tree):
        dtype = getattr(leaf, "dtype", np.dtype(bool))
        if dtype.itemsize == 1 and dtype.kind == "V":
            raise FileError(f"it can't hold {dtype}: Equinox would not read it back")
    with path.open("wb") as file:
        eqx.tree_serialise_leaves(file, tree)
