"""`where`: one vocabulary for choosing the calls of a model, in every framework."""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Callable
from typing import Any, TypeAlias

from ._errors import ArgumentError
from ._paths import Path

Matches: TypeAlias = Callable[[Path, Any], bool]


@dataclasses.dataclass(frozen=True)
class Function:
    """A choice of functions in a traced program, by their names; made by `function`."""

    names: tuple[str, ...]

    def has(self, name: str) -> bool:
        """Says whether a function is chosen."""
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.names)

    def __repr__(self) -> str:
        return f"function({', '.join(map(repr, self.names))})"


def function(*functions: str | Callable[..., Any]) -> Function:
    """Chooses functions that are no modules, as `where` of `attach`: the ReLU of a network that nobody edits.

    They are found by name in the program that JAX traces of the model, under scan, remat and jit too.
    There a function has a name if it is under `jax.jit`, `jax.custom_jvp` or `jax.custom_vjp`, as
    `jax.nn.relu` is; `crossvjp.sites(model, *sample)` lists them. Inside of a function with a derivative
    of its own nothing is found.

    Args:
        *functions: names, globs of names, or the functions themselves.

    Returns:
        The choice.

    Raises:
        ArgumentError: none is given, or one has no name.

    Example:
        >>> import jax
        >>> function(jax.nn.relu, "leaky_*")
        function('relu', 'leaky_*')
    """
    names = [one if isinstance(one, str) else getattr(one, "__name__", None) for one in functions]
    if not names or not all(names):
        raise ArgumentError(f"`function` takes names of functions, or functions that have one, but got {functions!r}.")
    return Function(tuple(name for name in names if name))


def is_by_class(where: Any) -> bool:
    """Says whether a choice looks at a module's class alone, and not at where it stands."""
    return where is True or isinstance(where, type) or (isinstance(where, tuple) and all(map(is_by_class, where)))


def matcher(where: Any) -> Matches:
    """Turns one choice of modules into a predicate on `(path, module)`.

    Raises:
        ArgumentError: `where` is none of the choices that `attach` lists.
    """
    if where is True:
        return lambda path, module: True
    if isinstance(where, type):
        return lambda path, module: isinstance(module, where)
    if isinstance(where, tuple) and where:
        choices = [matcher(choice) for choice in where]
        return lambda path, module: any(choice(path, module) for choice in choices)
    if isinstance(where, re.Pattern):
        return lambda path, module: where.search("/".join(path)) is not None
    if isinstance(where, str):
        return lambda path, module: fnmatch.fnmatchcase("/".join(path), where)
    if callable(where) and not isinstance(where, Function):
        return lambda path, module: bool(where(path, module))
    raise ArgumentError(
        "`where` must be a class, a path glob such as 'encoder/*', a compiled regex, a predicate (path, module) -> "
        "bool, a tuple of these of which any may match, True for every module, crossvjp.function('relu') for "
        f"functions, or a list of pairs (where, rule), but is {where!r}."
    )
