"""Classes of attached models: subclasses that keep their base's name and whose methods do something else."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any


def public_methods(cls: type, ends: type) -> list[str]:
    """Lists the methods that a class and its bases define, without those of the framework's own base class.

    Properties, static methods, class methods and fields that hold functions are none.
    """
    fields = {field.name for field in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else set()
    found: dict[str, None] = {}
    for base in cls.__mro__:
        if base in ends.__mro__:
            continue
        for name, value in vars(base).items():
            is_method = callable(getattr(base, name, None)) and not isinstance(
                value, staticmethod | classmethod | property | type
            )
            if is_method and name not in fields and (name == "__call__" or not name.startswith("_")):
                found[name] = None
    return list(found)


def subclass(base: type, members: Mapping[str, Any], **options: Any) -> type:
    """Makes a subclass that goes by the name of its base."""
    names = {name: vars(base)[name] for name in ("__module__", "__qualname__", "__doc__") if name in vars(base)}
    return type(base)(base.__name__, (base,), {**names, **members}, **options)


def named_like(function: Callable[..., Any], like: Callable[..., Any]) -> Callable[..., Any]:
    """Gives a function the name, documentation and signature of another, and none of its attributes."""
    function.__name__, function.__doc__ = getattr(like, "__name__", "method"), like.__doc__
    function.__wrapped__ = like  # pyright: ignore[reportFunctionMemberAccess]  where `inspect.signature` looks
    return function
