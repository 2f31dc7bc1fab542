"""npz: one member an array, its key as `_trees.spell` writes the path.

NumPy's file format has no name for the dtypes of `ml_dtypes` (bfloat16, float8): it keeps their bytes, as NumPy does.
Their names, and the places of empty dicts, are in one more member, `__crossvjp__`, that is there only if needed.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from crossvjp.adapters.files._errors import FileError
from crossvjp.adapters.files._trees import Names, empties, flat, planted, spell, unspell

_OURS = "__crossvjp__"


def read(path: Path) -> dict[str, Any]:
    """Reads the arrays. Keys that `spell` did not write stay as they are, all of them."""
    arrays, more = _members(path)
    dtypes = more.get("dtypes", {})
    keys = [*arrays, *more.get("empty", [])]
    paths: dict[str, Names] = {key: unspell(key) or (key,) for key in keys}
    if any(unspell(key) is None for key in keys):
        paths = {key: (key,) for key in keys}
    leaves = {paths[key]: _typed(key, leaf, dtypes.get(key)) for key, leaf in arrays.items()}
    return planted(leaves, [paths[key] for key in more.get("empty", [])])


def write(path: Path, tree: dict[str, Any]) -> None:
    """Writes the arrays, not compressed."""
    leaves = {spell(names): np.asarray(leaf) for names, leaf in flat(tree).items()}
    more: dict[str, Any] = {}
    if foreign := {key: leaf.dtype.name for key, leaf in leaves.items() if leaf.dtype.kind == "V" or _is_ours(leaf)}:
        more["dtypes"] = foreign
    if empty := [spell(names) for names in empties(tree)]:
        more["empty"] = empty
    if more:
        leaves[_OURS] = np.asarray(json.dumps(more))
    with zipfile.ZipFile(path, "w") as archive:
        for key, leaf in leaves.items():
            with archive.open(zipfile.ZipInfo(f"{key}.npy"), "w", force_zip64=True) as member:
                stored = leaf.view(f"V{leaf.dtype.itemsize}") if key in foreign else leaf
                np.lib.format.write_array(member, stored, allow_pickle=False)


def _is_ours(leaf: np.ndarray) -> bool:
    return leaf.dtype.type.__module__ == "ml_dtypes"


def _members(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    arrays = {}
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if not name.endswith(".npy"):
                raise FileError(f"its member {name!r} is no array of NumPy, so it is another kind of zip file")
            with archive.open(name) as member:
                arrays[name.removesuffix(".npy")] = np.lib.format.read_array(member, allow_pickle=False)
    more = json.loads(str(arrays.pop(_OURS))) if _OURS in arrays else {}
    return arrays, more


def _typed(key: str, leaf: np.ndarray, name: str | None) -> np.ndarray:
    if leaf.dtype.kind != "V":
        return leaf
    if name is None and leaf.dtype == np.dtype("V2"):  # the only type of two bytes that NumPy has no name for
        name = "bfloat16"
    if name is None:
        raise FileError(f"it does not say of which dtype {key!r} is: NumPy wrote bytes alone, {leaf.dtype}")
    return leaf.view(getattr(ml_dtypes, name))
