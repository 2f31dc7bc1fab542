"""Orbax: the folder of one checkpoint, as `PyTreeCheckpointer` and `StandardCheckpointer` write it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from crossvjp.adapters.files._errors import FileError
from crossvjp.adapters.files._trees import flat, text

MARK = "_METADATA"


def item_of(path: Path) -> Path:
    """Finds the checkpoint: the folder itself, or the one item in a folder of a `CheckpointManager`'s step."""
    if (path / MARK).exists():
        return path
    items = sorted(inner.parent for inner in path.glob(f"*/{MARK}")) or sorted(
        inner.parent for inner in path.glob(f"*/*/{MARK}")
    )
    if not items:
        raise FileError(f"the folder has no file {MARK}, so it is no checkpoint of Orbax, or not a whole one")
    if len(items) > 1:
        names = ", ".join(str(item.relative_to(path)) for item in items)
        raise FileError(f"it holds several checkpoints: {names}. Name one of these folders")
    return items[0]


def read(path: Path) -> Any:
    """Reads the arrays as NumPy arrays, on whatever devices they were."""
    item = item_of(path).absolute()
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        types = checkpointer.metadata(item).item_metadata
        tree = getattr(types, "tree", types)
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return checkpointer.restore(item, ocp.args.PyTreeRestore(restore_args=as_numpy))


def write(path: Path, tree: dict[str, Any]) -> None:
    """Writes a checkpoint."""
    for names, leaf in flat(tree).items():
        if np.size(leaf) == 0:
            raise FileError(f"{text(names)} has no elements, shape {np.shape(leaf)}, which Orbax can't hold")
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(path.absolute(), ocp.args.PyTreeSave(tree))
