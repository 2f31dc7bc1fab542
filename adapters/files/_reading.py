"""Reading: find the format, read, and put the arrays where the model has them."""

from __future__ import annotations

import dataclasses
import fnmatch
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from crossvjp.adapters.files import _matching
from crossvjp.adapters.files._errors import FileError
from crossvjp.adapters.files._formats import Format, format_of
from crossvjp.adapters.files._trees import SCALARS, Names, flat, kind, named_leaves, text


@dataclasses.dataclass(frozen=True)
class Entry:
    """An array of a file: where it is, its shape and its dtype."""

    path: Names
    shape: tuple[int, ...]
    dtype: str


def read(
    path: str | os.PathLike[str], like: Any = None, *, format: str | None = None, ignore: Sequence[str] = ()
) -> Any:
    """Reads saved parameters.

    Args:
        path: the file, or the folder of an Orbax checkpoint.
        like: a pytree of arrays or of their types (`jax.eval_shape(net.init, ...)`) into whose places the file's
            arrays go, by their names; `.eqx` files need the model here, or `(model, state)`.
        format: of `FORMATS`; found out by the file's content by default.
        ignore: globs of paths in the file (`"opt_state/*"`) that are to be left.

    Returns:
        What `like` is, with NumPy arrays of the file's dtypes; without `like` what the file holds, in dicts.

    Raises:
        FileError: the file is damaged or of another format, or does not fit `like` without a rest on either side.
        FileNotFoundError: there is no such file.
    """
    file = Path(path)
    found = format_of(file, format)
    if not found.by_name:
        if like is None:
            raise FileError(f"{str(file)!r} holds arrays without names: reading it needs the model, `like`.")
        return _fill_in_order(file, found, like)
    tree = _contents(file, found)
    if like is None:
        return tree
    kept = {names: leaf for names, leaf in flat(tree).items() if not _ignored(names, ignore)}
    return _fill_by_name(kept, like, file)


def entries(path: str | os.PathLike[str], *, format: str | None = None) -> tuple[str, list[Entry]]:
    """Lists what a file holds.

    Returns:
        The format's name, and the arrays in the file's order.

    Raises:
        FileError: the file is damaged or of no known format.
        FileNotFoundError: there is no such file.
    """
    file = Path(path)
    found = format_of(file, format)
    if not found.by_name:
        leaves = {(f"leaf {index}",): leaf for index, leaf in enumerate(_guarded(file, found, found.load().records))}
    else:
        leaves = flat(_contents(file, found))
    return found.name, [Entry(names, np.shape(leaf), _dtype(leaf)) for names, leaf in leaves.items()]


def _contents(file: Path, found: Format) -> Any:
    tree = _guarded(file, found, found.load().read)
    for names, leaf in flat(tree).items():
        if not isinstance(leaf, (np.ndarray, np.generic, *SCALARS)) or np.asarray(leaf).dtype == object:
            raise FileError(f"{str(file)!r} holds no parameters: {text(names)} is {_short(leaf)}.")
    return tree


def _guarded(file: Path, found: Format, function: Callable[[Path], Any]) -> Any:
    """Reads, and says of what is wrong in which file; each format's package has exceptions of its own."""
    try:
        return function(file)
    except FileError as error:
        raise FileError(f"{str(file)!r} can't be read as {found.name}: {error}.") from error
    except (ImportError, MemoryError, PermissionError):
        raise
    except Exception as error:
        raise FileError(
            f"{str(file)!r} can't be read as {found.name}: it is cut off, damaged, or another kind of file "
            f"({type(error).__name__}: {_short(error)})."
        ) from error


def _fill_by_name(leaves: dict[Names, Any], like: Any, file: Path) -> Any:
    expected = {names: leaf for names, leaf in named_leaves(like).items() if _is_array(leaf)}
    pairs, missing, extra = _matching.match(expected, leaves)
    try:
        _matching.check(pairs, missing, extra, expected, leaves)
    except FileError as error:
        raise FileError(f"{str(file)!r}: {error}") from None
    values = {names: _as_array(leaves[at], expected[names]) for names, at in pairs.items()}
    treedef = jax.tree.structure(like)
    return treedef.unflatten(values.get(names, leaf) for names, leaf in named_leaves(like).items())


def _fill_in_order(file: Path, found: Format, like: Any) -> Any:
    code = found.load()
    records = _guarded(file, found, code.records)
    named = named_leaves(like)
    kept = [names for names, leaf in named.items() if code.is_kept(leaf)]
    if len(kept) != len(records):
        raise FileError(
            f"{str(file)!r} does not fit the model: the file holds {len(records)} arrays, the model has {len(kept)}, "
            f"from {text(kept[0]) if kept else 'nothing'} to {text(kept[-1]) if kept else 'nothing'}."
        )
    for names, record in zip(kept, records, strict=True):
        leaf = named[names]
        if np.shape(leaf) != record.shape:
            raise FileError(
                f"{str(file)!r} does not fit the model: at {text(names)} the model has the shape {np.shape(leaf)}, the "
                f"file's array in that place {record.shape}."
            )
        if kind(leaf) != kind(record):
            raise FileError(
                f"{str(file)!r} does not fit the model: at {text(names)} the model has {kind(leaf)}, the file's array "
                f"in that place is of {record.dtype}."
            )
        named[names] = record if hasattr(leaf, "dtype") else type(leaf)(record.item())
    return jax.tree.structure(like).unflatten(named.values())


def _as_array(leaf: Any, like: Any) -> Any:
    """Gives a Python number, as which some formats keep scalars, the dtype that the model has for it."""
    return np.asarray(leaf, like.dtype) if isinstance(leaf, SCALARS) and not hasattr(leaf, "dtype") else leaf


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def _ignored(names: Names, ignore: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase("/".join(names), glob) for glob in ignore)


def _dtype(leaf: Any) -> str:
    return leaf.dtype.name if hasattr(leaf, "dtype") else f"Python {type(leaf).__name__}"


def _short(value: Any) -> str:
    shown = str(value) if isinstance(value, Exception) else f"{value!r} of type {type(value).__name__}"
    return shown if len(shown) <= 200 else f"{shown[:200]}..."
