"""What the command line names: `package.module:name`, `model.py:name`, `float32[2,8]`."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from crossvjp.adapters.migrating.refusal import UsageError
from crossvjp.migration import framework_of

_ARRAY = re.compile(r"(\w+)\[([\d,\s]*)\]")


def model(text: str, option: str) -> Any:
    """Gives a model that is named, or that a function of that name makes.

    Raises:
        UsageError: it can't be imported or made, or is no model.
    """
    found = _named(text, option)
    if framework_of(found) is None and callable(found):
        found = _made(found, text, option)
    if framework_of(found) is None:
        raise UsageError(
            f"{option} {text}: expected a model of Flax Linen, Flax NNX, Haiku (`hk.transform`) or Equinox, or a "
            f"function without arguments that makes one, but found a {type(found).__name__}."
        )
    return found


def call(text: str | None, option: str) -> Callable[..., Any] | None:
    """Gives a function that is named.

    Raises:
        UsageError: it can't be imported, or can't be called.
    """
    if text is None:
        return None
    found = _named(text, option)
    if not callable(found):
        raise UsageError(f"{option} {text}: expected a function `(mdl, *sample) -> y`, but found {found!r}.")
    return found


def sample(texts: Sequence[str]) -> tuple[Any, ...]:
    """Gives the arguments that both models are called with.

    Raises:
        UsageError: one can't be imported or made.
    """
    made: list[Any] = []
    for index, text in enumerate(texts):
        if match := _ARRAY.fullmatch(text):
            made.append(_array(*match.groups(), key=jax.random.key(index), text=text))
            continue
        found = _named(text, "--sample")
        found = _made(found, text, "--sample") if callable(found) else found
        made += found if isinstance(found, tuple) else [found]
    return tuple(made)


def _array(dtype: str, shape: str, key: Any, text: str) -> jax.Array:
    sizes = [int(size) for size in shape.split(",") if size.strip()]
    try:
        kind = jnp.dtype(dtype)
        if jnp.issubdtype(kind, jnp.inexact):
            return jax.random.normal(key, sizes, kind)
        return jax.random.randint(key, sizes, 0, 2).astype(kind)
    except (TypeError, ValueError) as error:
        raise UsageError(f"--sample {text}: expected an array such as float32[2,8], but: {error}.") from None


def _named(text: str, option: str) -> Any:
    place, colon, name = text.rpartition(":")
    if not (colon and place and name):
        raise UsageError(f"{option} {text}: expected `package.module:name` or `file.py:name`.")
    module = _module(place, text, option)
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            names = [name for name in vars(module) if not name.startswith("_")]
            raise UsageError(f"{option} {text}: {place} has no {name!r}, but {', '.join(names) or 'nothing'}.")
        found = getattr(found, part)
    return found


def _module(place: str, text: str, option: str) -> ModuleType:
    file = Path(place)
    is_file = file.suffix == ".py"
    if is_file and not file.is_file():
        raise UsageError(f"{option} {text}: there is no file {place!r}.")
    folder = str(file.resolve().parent if is_file else Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)  # as `python file.py` and `python -m package.module` do
    try:
        return _from_file(file.resolve()) if is_file else importlib.import_module(place)
    except Exception as error:
        raise UsageError(f"{option} {text}: importing {place} raised {_described(error)}") from error


def _from_file(file: Path) -> ModuleType:
    """Imports a file under its own name, once, unless another module has that name."""
    name = file.stem
    known = sys.modules.get(name)
    if known is not None and getattr(known, "__file__", None) == str(file):
        return known
    name = name if known is None else f"{name} at {file}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None  # for a suffix of Python
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _made(function: Callable[[], Any], text: str, option: str) -> Any:
    try:
        return function()
    except Exception as error:
        raise UsageError(f"{option} {text}: calling it without arguments raised {_described(error)}") from error


def _described(error: Exception) -> str:
    """Gives an error of the user's code with its place."""
    frames = traceback.extract_tb(error.__traceback__)
    frame = next((frame for frame in reversed(frames) if os.sep + "importlib" + os.sep not in frame.filename), None)
    place = f" ({frame.filename}, line {frame.lineno})" if frame else ""
    return f"{type(error).__name__}: {error}{place}"
