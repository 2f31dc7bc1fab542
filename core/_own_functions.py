"""The functions that a rule holds in its static fields, which may close over traced values."""

from __future__ import annotations

import copy
import dataclasses
import functools
import types
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._rule import Rule


def own_functions(the_rule: Rule) -> list[Any]:
    """Lists the functions in the fields of a rule, and in those of rules inside of it."""
    return [value for _, _, value in _places(the_rule)]


def with_functions(the_rule: Rule, functions: Sequence[Any]) -> Rule:
    """Gives the rule around other functions, in the order of `own_functions`."""
    places = list(_places(the_rule))
    if not places or all(value is new for (_, _, value), new in zip(places, functions, strict=True)):
        return the_rule
    return _rebuilt(the_rule, iter(functions))


def _places(the_rule: Rule) -> Iterator[tuple[Rule, str, Any]]:
    for name, value, inner in _fields(the_rule):
        if inner:
            for part in inner:
                yield from _places(part)
        else:
            yield the_rule, name, value


def _rebuilt(the_rule: Rule, functions: Iterator[Any]) -> Rule:
    new = copy.copy(the_rule)
    for name, value, inner in _fields(the_rule):
        rebuilt = tuple(_rebuilt(part, functions) for part in inner)
        changed = rebuilt[0] if inner and value is inner[0] else rebuilt if inner else next(functions)
        object.__setattr__(new, name, changed)
    return new


def _fields(the_rule: Rule) -> Iterator[tuple[str, Any, tuple[Rule, ...]]]:
    """Lists the fields that hold a function, or rules."""
    for field in dataclasses.fields(the_rule):  # pyright: ignore[reportArgumentType]  made a dataclass
        value = getattr(the_rule, field.name)
        if isinstance(value, types.FunctionType | types.MethodType | functools.partial):
            yield field.name, value, ()
        elif hasattr(value, "own_backward"):
            yield field.name, value, (value,)
        elif isinstance(value, tuple) and value and all(hasattr(part, "own_backward") for part in value):
            yield field.name, value, value
