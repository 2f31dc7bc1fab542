"""The formats: their suffixes, how a file of them begins, and the package that brings what they need."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from crossvjp.adapters.files._errors import FileError


@dataclasses.dataclass(frozen=True)
class Format:
    """A format of parameter files.

    Attributes:
        name: what `--from-format` and `--to-format` call it.
        suffixes: of its files; the first is the usual one.
        begins: `(first bytes, size) -> bool`: whether a file is of this format.
        code: the module with `read` and `write`.
        by_name: whether it keeps names with the arrays; the others need the model to read into.
        keeps_tuples: whether what is read is what was written, tuples among it; the others have dicts alone.
    """

    name: str
    suffixes: tuple[str, ...]
    begins: Callable[[bytes, int], bool]
    code: str
    by_name: bool = True
    keeps_tuples: bool = False

    def load(self) -> Any:
        """Imports its code, and with it the package that it needs."""
        return importlib.import_module(f"crossvjp.adapters.files.{self.code}")


def _is_pickle(head: bytes, size: int) -> bool:
    return head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")


def _is_safetensors(head: bytes, size: int) -> bool:
    return head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= size - 8


def _is_msgpack(head: bytes, size: int) -> bool:
    return 0x80 < head[0] <= 0x8F or head[0] in (0xDE, 0xDF) or (head == b"\x80" and size == 1)


def _is_eqx(head: bytes, size: int) -> bool:
    start = head.partition(b"\n")[2] if head.startswith(b"{") else head
    return start.startswith(b"\x93NUMPY")


FORMATS = {
    made.name: made
    for made in (
        # first, since its length may begin like a pickle or msgpack; theirs, read as a length, is longer than any file
        Format("safetensors", (".safetensors",), _is_safetensors, "_safetensors"),
        Format("pickle", (".pkl", ".pickle"), _is_pickle, "_haiku_pickle", keeps_tuples=True),
        Format("npz", (".npz",), lambda head, size: head[:4] in (b"PK\x03\x04", b"PK\x05\x06"), "_npz"),
        Format("msgpack", (".msgpack",), _is_msgpack, "_msgpack"),
        Format("eqx", (".eqx",), _is_eqx, "_eqx", by_name=False, keeps_tuples=True),
        Format("orbax", (".orbax",), lambda head, size: False, "_orbax"),
    )
}


def format_of(path: Path, name: str | None = None) -> Format:
    """Finds the format of an existing file, by what it holds.

    Args:
        path: the file; a folder is an Orbax checkpoint.
        name: the format that it must have; whatever it is by default.

    Raises:
        FileError: it begins like no known format, or not like that of the given name.
        FileNotFoundError: there is no such file.
    """
    if not path.exists():
        raise FileNotFoundError(f"There is no file {str(path)!r}.")
    if path.is_dir():
        found: Format | None = FORMATS["orbax"]
        holds = "a folder"
    else:
        found, holds = _by_content(path)
    wanted = FORMATS[name] if name else found or _by_suffix(path)
    if wanted is None:
        raise FileError(
            f"{str(path)!r} is of no known format: expected {', '.join(sorted(FORMATS))}, found {holds}. If it "
            "is one of them, it is damaged."
        )
    is_unmarked = found is None and wanted.name == "pickle" and path.stat().st_size  # protocols 0 and 1 have no mark
    if found is not wanted and not is_unmarked:
        what = f"{found.name}, {holds}" if found else holds
        raise FileError(f"{str(path)!r} is not {wanted.name}: found {what}. It is damaged, or another kind of file.")
    return wanted


def format_for(path: Path, name: str | None = None) -> Format:
    """Finds the format to write, by the name or else by the suffix.

    Raises:
        FileError: no name is given, and the suffix tells none.
    """
    found = FORMATS[name] if name else _by_suffix(path)
    if found is None:
        usual = ", ".join(f"{one.name} ({one.suffixes[0]})" for one in FORMATS.values())
        raise FileError(f"The suffix of {str(path)!r} names no format. Name the format, or use a suffix of: {usual}.")
    return found


def _by_suffix(path: Path) -> Format | None:
    return next((one for one in FORMATS.values() if path.suffix.lower() in one.suffixes), None)


def _by_content(path: Path) -> tuple[Format | None, str]:
    size = path.stat().st_size
    if size == 0:
        return None, "an empty file"
    with path.open("rb") as file:
        head = file.read(2**16)
    found = next((one for one in FORMATS.values() if one.begins(head, size)), None)
    return found, f"a file of {size} bytes that begins with {head[:12]!r}"
