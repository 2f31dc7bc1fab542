"""safetensors: keys as `_trees.spell` writes paths; empty dicts are listed in the file's metadata."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from crossvjp.adapters.files._errors import FileError
from crossvjp.adapters.files._trees import Names, empties, flat, planted, spell, unspell

_EMPTY = "crossvjp.empty"
_DTYPES: dict[str, Any] = {
    **{
        f"{letter}{bits}": f"{word}{bits}" for letter, word in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)
    },
    **{f"F{bits}": f"float{bits}" for bits in (16, 32, 64)},
    "BOOL": "bool",
    "C64": "complex64",
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
}


def read(path: Path) -> dict[str, Any]:
    """Reads the arrays. Keys that `spell` did not write stay as they are, all of them."""
    content = path.read_bytes()
    leaves = {key: _array(key, stored) for key, stored in safetensors.deserialize(content)}
    size = int.from_bytes(content[:8], "little")
    more = json.loads(content[8 : 8 + size]).get("__metadata__", {})
    empty = json.loads(more[_EMPTY]) if _EMPTY in more else []
    ours = all(unspell(key) is not None for key in [*leaves, *empty])
    paths: dict[str, Names] = {key: (unspell(key) if ours else None) or (key,) for key in [*leaves, *empty]}
    return planted({paths[key]: leaf for key, leaf in leaves.items()}, [paths[key] for key in empty])


def write(path: Path, tree: dict[str, Any]) -> None:
    """Writes the arrays."""
    leaves = {spell(names): np.asarray(leaf, order="C") for names, leaf in flat(tree).items()}
    empty = [spell(names) for names in empties(tree)]
    path.write_bytes(safetensors.numpy.save(leaves, {_EMPTY: json.dumps(empty)} if empty else None))


def _array(key: str, stored: dict[str, Any]) -> np.ndarray:
    if stored["dtype"] not in _DTYPES:
        raise FileError(f"{key!r} is of the dtype {stored['dtype']}, which NumPy and JAX do not have")
    return np.frombuffer(stored["data"], dtype=_DTYPES[stored["dtype"]]).reshape(stored["shape"])
