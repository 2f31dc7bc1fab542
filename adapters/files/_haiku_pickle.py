"""Pickles of Haiku parameters, alone or as `(params, state)`. Reading runs nothing but what makes arrays and dicts.

A pickle is a program. This reader looks every name that it calls up in the table below, so that a file can make dicts
and arrays and nothing else. JAX's arrays and the mappings of Haiku and Flax are read as NumPy's arrays and dicts.
"""

from __future__ import annotations

import collections
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from crossvjp.adapters.files._errors import FileError
from crossvjp.adapters.files._trees import nested


class _Call:
    """A function that a pickle may call; a pickle can't set attributes of it, which it could of a function."""

    __slots__ = ("function",)

    def __init__(self, function: Callable[..., Any]):
        object.__setattr__(self, "function", function)

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    def __setattr__(self, name: str, value: Any) -> None:
        raise pickle.UnpicklingError(f"the pickle sets the attribute {name!r} of a function")


def _jax_array(made_by: Callable[..., Any], args: tuple[Any, ...], state: Any, _: Any) -> np.ndarray:
    made = made_by(*args)
    made.__setstate__(state)
    return made


def _encoded(characters: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"the pickle has bytes in the encoding {encoding!r}")
    return characters.encode("latin1")


_RECONSTRUCT: Any = np.zeros(0).__reduce__()[0]
_FROM_BUFFER: Any = np.zeros(1).__reduce_ex__(5)[0]
_SCALAR: Any = np.float32(0).__reduce__()[0]
_DTYPES = [name for name in dir(ml_dtypes) if isinstance(getattr(ml_dtypes, name), type)]
_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("_codecs", "encode"): _Call(_encoded),
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("jax._src.array", "_reconstruct_array"): _Call(_jax_array),
    ("jax._src.device_array", "reconstruct_device_array"): _Call(_jax_array),  # before jax 0.4
    ("flax.core.frozen_dict", "FrozenDict"): _Call(dict),
    **{("haiku._src.data_structures", name): _Call(dict) for name in ("FlatMapping", "FlatMap", "frozendict")},
    **{("ml_dtypes", name): getattr(ml_dtypes, name) for name in _DTYPES if not name.endswith("info")},
    **{
        (f"numpy.{core}.{module}", name): _Call(function)
        for core in ("core", "_core")
        for module, name, function in [
            ("multiarray", "_reconstruct", _RECONSTRUCT),
            ("multiarray", "scalar", _SCALAR),
            ("numeric", "_frombuffer", _FROM_BUFFER),
        ]
    },
}


class _Reader(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        try:
            return _ALLOWED[module_name, global_name]
        except KeyError:
            raise FileError(
                f"the pickle calls `{module_name}.{global_name}`, but only arrays and dicts of NumPy, JAX, Haiku and "
                "Flax are read from pickles, since a pickle can run any program. If you trust where it is from, load "
                "it yourself and pickle its parameters alone, as dicts of NumPy arrays (`jax.device_get`)"
            ) from None


def read(path: Path) -> Any:
    """Reads what was pickled: dicts, tuples and lists of arrays."""
    with path.open("rb") as file:
        made = _Reader(file).load()
        if file.read(1):
            raise FileError("there is more in it after the end of the pickle")
    if not isinstance(made, Mapping | tuple | list):
        raise FileError(f"it holds a {type(made).__name__} instead of parameters")
    return made


def write(path: Path, tree: Any) -> None:
    """Pickles plain dicts, tuples and lists of NumPy arrays, for every Python with NumPy."""
    path.write_bytes(pickle.dumps(plain(tree), protocol=4))


def plain(tree: Any, where: tuple[str, ...] = ()) -> Any:
    """Makes dicts of mappings and NumPy arrays of arrays."""
    if isinstance(tree, Mapping):
        return {key: plain(value, (*where, str(key))) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        made = [plain(value, (*where, str(index))) for index, value in enumerate(tree)]
        return made if isinstance(tree, list) else tuple(made)
    return tree if tree is None else nested(tree, where)
