"""Writing: into a temporary place beside the target, read back, and only then under its name."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from crossvjp.adapters.files._errors import FileError
from crossvjp.adapters.files._formats import Format, format_for
from crossvjp.adapters.files._haiku_pickle import plain
from crossvjp.adapters.files._reading import read
from crossvjp.adapters.files._trees import flat, named_leaves, nested, text


def write(path: str | os.PathLike[str], tree: Any, *, format: str | None = None) -> None:
    """Writes parameters to a new file.

    The file is read back and compared bit for bit before it gets its name, so a format that can't hold something is
    an error, and never a file that lacks it.

    Args:
        path: a file that does not exist yet; for Orbax a folder.
        tree: dicts, tuples and lists of arrays, or any pytree; for `.eqx` the model, or `(model, state)`. Only pickles
            keep tuples and lists; elsewhere they become dicts with the keys "0", "1", ...
        format: of `FORMATS`; by the suffix by default.

    Raises:
        FileExistsError: there is something at `path`, even if it came while this ran.
        FileError: the suffix tells no format, or the format can't hold `tree`.
    """
    target = Path(path)
    refuse_existing(target)
    chosen = format_for(target, format)
    stored = tree if not chosen.by_name else plain(tree) if chosen.keeps_tuples else nested(tree)
    if chosen.by_name and not isinstance(stored, dict | tuple | list):
        raise FileError(f"Expected a tree of arrays to write, but got {tree!r} of type {type(tree).__name__}.")
    with _appearing(target) as temporary:
        try:
            chosen.load().write(temporary, stored)
        except FileError as error:
            raise FileError(f"{str(target)!r} can't be written as {chosen.name}: {error}.") from error
        except (ImportError, MemoryError, OSError):
            raise
        except Exception as error:
            raise FileError(
                f"{str(target)!r} can't be written as {chosen.name} ({type(error).__name__}: {error})."
            ) from error
        _compare(temporary, stored, chosen, target)


def refuse_existing(path: Path) -> None:
    """Raises if there is something at a path, be it a link to nowhere.

    Raises:
        FileExistsError: there is.
    """
    if os.path.lexists(path):
        raise FileExistsError(f"{str(path)!r} exists already, and nothing is ever overwritten. Give another name.")


@contextlib.contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """Gives a place to write to, whose content then appears at the target, or vanishes after an exception."""
    if not target.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {str(target.parent)!r} to write {target.name!r} into.")
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    temporary = folder / target.name
    try:
        yield temporary
        if temporary.is_dir():
            _sync_all(temporary)
            refuse_existing(target)
            os.rename(temporary, target)  # fails unless the target is missing, or an empty folder
        else:
            _sync(temporary)
            _publish_file(temporary, target)
        _sync(target.parent)
    except FileExistsError:
        refuse_existing(target)
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _publish_file(temporary: Path, target: Path) -> None:
    try:
        os.link(temporary, target)  # in one step, and an error if the target exists
    except FileExistsError:
        raise
    except OSError:  # a file system without links: the name is taken first, with an error if it exists
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        os.replace(temporary, target)


def _sync_all(folder: Path) -> None:
    for inner in folder.rglob("*"):
        _sync(inner)
    _sync(folder)


def _sync(path: Path) -> None:
    """Waits until a file, or a folder's list of files, is on the disk, where the system can say so."""
    with contextlib.suppress(OSError):  # Windows opens no folders
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _compare(temporary: Path, stored: Any, chosen: Format, target: Path) -> None:
    """Reads back what was written.

    Raises:
        FileError: it is not what was to be written.
    """
    back = read(temporary, None if chosen.by_name else stored, format=chosen.name)
    leaves = flat if chosen.by_name else named_leaves
    wanted, got = leaves(stored), leaves(back)
    if jax.tree.structure(stored) != jax.tree.structure(back) or wanted.keys() != got.keys():
        raise FileError(f"{str(target)!r}: {chosen.name} does not keep the names. Nothing is written.")
    for names, leaf in wanted.items():
        if not _is_same(leaf, got[names]):
            raise FileError(
                f"{str(target)!r}: {chosen.name} does not keep {text(names)}, {_kind(leaf)}, but gives back "
                f"{_kind(got[names])}. Nothing is written."
            )


def _is_same(a: Any, b: Any) -> bool:
    if not hasattr(a, "dtype"):
        return bool(type(a) is type(b) and (a == b or a != a)) or not isinstance(a, bool | int | float | complex)
    one, other = np.asarray(a), np.asarray(b)
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


def _kind(leaf: Any) -> str:
    return f"{leaf.dtype}{list(leaf.shape)}" if hasattr(leaf, "dtype") else repr(leaf)
