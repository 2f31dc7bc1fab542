"""`grad_vars`: one vocabulary for choosing variables, with a hook for each framework's own words."""

from __future__ import annotations

import fnmatch
import inspect
import re
from collections.abc import Callable
from typing import Any, TypeAlias

from ._errors import ArgumentError
from ._paths import Path

Predicate: TypeAlias = Callable[[Path, Any], bool]

_GLOB = re.compile(r"[*?\[/]")


def predicate(grad_vars: Any, named: Callable[[Any], Predicate]) -> Predicate:
    """Turns `grad_vars` into a predicate on `(path, leaf)`.

    Args:
        grad_vars: `True`, a path glob or compiled regex (both on the path joined by `/`; a `*`
            also matches `/`), a predicate `(path, leaf) -> bool` or `leaf -> bool`, a list of
            these of which any may match, or a word of the framework.
        named: gives the predicate for a word of the framework, such as a collection's name.

    Raises:
        ArgumentError: `grad_vars` is none of these.
    """
    if grad_vars is True:
        return lambda path, leaf: True
    if isinstance(grad_vars, list | tuple | set | frozenset):
        choices = [predicate(choice, named) for choice in grad_vars]
        return lambda path, leaf: any(choice(path, leaf) for choice in choices)
    if isinstance(grad_vars, re.Pattern):
        return lambda path, leaf: grad_vars.search("/".join(path)) is not None
    if isinstance(grad_vars, str) and _GLOB.search(grad_vars):
        return lambda path, leaf: fnmatch.fnmatchcase("/".join(path), grad_vars)
    if callable(grad_vars) and not isinstance(grad_vars, type):
        if _count_parameters(grad_vars) == 1:
            return lambda path, leaf: bool(grad_vars(leaf))
        return lambda path, leaf: bool(grad_vars(path, leaf))
    return named(grad_vars)


def unknown_choice(grad_vars: Any, words: str) -> ArgumentError:
    """Builds the error for a word that the framework does not have."""
    return ArgumentError(
        f"`grad_vars` must be {words}, True, a path glob such as '*/bias', a compiled regex, a predicate "
        f"(path, leaf) -> bool, or a list of these, but is {grad_vars!r}."
    )


def check_selected(grad_vars: Any, selected: int, available: list[Path]) -> None:
    """Refuses a filter that selects nothing.

    The words "params" and `True` may: a module without parameters is no mistake.

    Raises:
        ArgumentError: `grad_vars` is a filter, and no differentiable array passes it.
    """
    if selected or (isinstance(grad_vars, str) and grad_vars == "params") or grad_vars is True:
        return
    paths = ["/".join(path) for path in available]
    listed = ", ".join(repr(path) for path in paths[:12]) + (", ..." if len(paths) > 12 else "")
    raise ArgumentError(
        f"`grad_vars` {grad_vars!r} selects no differentiable array of the module. "
        + (f"Its paths are {listed}." if paths else "The module has none.")
    )


def _count_parameters(function: Any) -> int:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    return sum(1 for parameter in parameters if parameter.kind in kinds and parameter.default is parameter.empty)
