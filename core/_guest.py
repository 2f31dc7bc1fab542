"""A model as pure functions of its variables: the form in which models of any framework become guests of another."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import jax

from ._arrays import ArrayType, Static, is_array
from ._errors import HandleError
from ._paths import Path
from ._used import used_arguments

Leaves: TypeAlias = dict[Path, Any]
"""Values by their paths in the guest; each an array, or a framework's box of metadata around one."""

Variables: TypeAlias = dict[str, Leaves]
"""Values by collection. "params" holds what is trained, and nothing else does."""


@dataclasses.dataclass
class Keys:
    """The PRNG keys that a host has for one call of its guest. A stream is drawn from only if the guest asks.

    Args:
        draw: gives a key of one of the host's streams, or `None` if the host has none.
        streams: the host's streams that feed the guest. A host with one key alone has none by name.
        initial: gives the key that parameters are made with, or `None`.
    """

    draw: Callable[[str], Any]
    streams: tuple[str, ...] = ()
    initial: Callable[[], Any] = lambda: None

    def single(self) -> Any:
        """Gives one key, that of the first stream; `None` if the host has none."""
        return self.draw(self.streams[0] if self.streams else "")

    def spread(self, names: Sequence[str]) -> dict[str, Any]:
        """Gives a key for each of the guest's streams: the host's of that name, or one made of the single key."""
        own = {name: self.draw(name) for name in names if name in self.streams}
        rest = [name for name in names if name not in own]
        key = self.single() if rest else None
        if key is not None:
            alone = len(names) == 1
            own |= {name: key if alone else jax.random.fold_in(key, zlib.crc32(name.encode())) for name in rest}
        return {name: found for name, found in own.items() if found is not None}

    def for_parameters(self) -> Any:
        """Gives the key that parameters are made with.

        Raises:
            HandleError: the host has none.
        """
        key = self.initial()
        if key is None:
            raise HandleError(
                "The guest makes its parameters with the host's key, but the host has none. Initialise the host with "
                "a key, or give a guest that has its variables already."
            )
        return key


class Guest(Protocol):
    """What an adapter makes of a model, for the hosts of all frameworks."""

    @property
    def methods(self) -> frozenset[str]:
        """The names of its other public methods."""
        ...

    def init(self, keys: Keys, method: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Variables:
        """Makes the variables, or gives the ones that the model has already."""
        ...

    def apply(
        self, variables: Variables, keys: Keys, method: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Any, Variables]:
        """Calls a method of the model. It is pure, and leaves the model as it is.

        Returns:
            What the method returned, and the variables that it changed or made.
        """
        ...


class Alike:
    """Guests that are equal if the same model was given: frameworks compare modules by their static parts.

    Args:
        given: what was given.
        has_values: whether it has its variables already; then it is equal to itself alone, as its values count.
    """

    def __init__(self, given: Any, *, has_values: bool):
        self._given = given
        self._has_values = has_values

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Alike) or type(self) is not type(other) or self._has_values != other._has_values:
            return False
        if self._has_values:
            return self._given is other._given
        return Static(self._given) == Static(other._given)

    def __hash__(self) -> int:
        return hash((type(self), type(self._given)))

    def __repr__(self) -> str:
        given = self._given
        return f"{type(self).__name__}({given.__name__ if isinstance(given, type) else type(given).__name__})"


def flat(tree: Any) -> Leaves:
    """Lists what stands in nested mappings, by paths."""
    found: Leaves = {}

    def visit(part: Any, path: Path) -> None:
        if isinstance(part, Mapping):
            for name, value in part.items():
                visit(value, (*path, str(name)))
        else:
            found[path] = part

    visit(tree, ())
    return found


def nested(leaves: Mapping[Path, Any]) -> dict[str, Any]:
    """Makes nested dicts of paths; the inverse of `flat`.

    Raises:
        HandleError: a value stands where others stand below.
    """
    tree: dict[str, Any] = {}
    for path, value in leaves.items():
        inner = tree
        for depth, name in enumerate(path[:-1], 1):
            inner = inner.setdefault(name, {})
            if path[:depth] in leaves:
                refuse_below(path[:depth], path)
        if path[-1] in inner:
            refuse_below(path, next(other for other in leaves if other[: len(path)] == path and other != path))
        inner[path[-1]] = value
    return tree


def refuse_below(path: Path, other: Path) -> None:
    """Raises the error for a name that is an array and holds arrays too, which nested variables can't be."""
    raise HandleError(
        f"The guest has an array at {'/'.join(path)!r} and another below it, at {'/'.join(other)!r}. A host that nests "
        "variables has no place for both: give one of them another name in the guest."
    )


def changed(after: Variables, before: Variables) -> Variables:
    """Keeps of `after` what `before` does not hold as the very same object."""
    found = {
        collection: {path: value for path, value in leaves.items() if value is not before.get(collection, {}).get(path)}
        for collection, leaves in after.items()
    }
    return {collection: leaves for collection, leaves in found.items() if leaves}


def merged(variables: Variables, updates: Variables) -> Variables:
    """Gives the variables with the updates in their places."""
    names = dict.fromkeys([*variables, *updates])
    return {name: {**variables.get(name, {}), **updates.get(name, {})} for name in names}


def without_initialisation(guest: Guest, keys: Keys, method: str, sample: Any, keywords: Any) -> Variables:
    """Makes variables for a host that has them from its construction on.

    Raises:
        HandleError: the guest needs a sample to be initialised, and got none.
    """
    try:
        return guest.init(keys, method, sample, keywords)
    except TypeError as error:
        if sample or keywords or isinstance(error, HandleError):
            raise
        raise HandleError(
            "The guest makes its variables when it is first called, so the host needs what it is called with: "
            "crossvjp.host(model, framework, x, ...). Or give a guest that has its variables already."
        ) from error


def makes_models(maker: Any, parameter: str) -> bool:
    """Says whether a class or function makes models, with keys that it takes by a parameter of this name."""
    kinds = type | types.FunctionType | types.MethodType | functools.partial
    return (
        isinstance(maker, kinds)
        and not isinstance(maker, jax.tree_util.Partial)  # a function with its values is a model itself
        and has_parameter(maker, parameter)
    )


def has_parameter(function: Callable[..., Any], name: str) -> bool:
    """Says whether a function, or the constructor of a class, takes an argument of this name that is not given yet."""
    if isinstance(function, functools.partial):
        return name not in function.keywords and has_parameter(function.func, name)
    try:
        # Of a class, what its constructor says: metaclasses hide it behind signatures of their own.
        return name in inspect.signature(function.__init__ if isinstance(function, type) else function).parameters
    except (TypeError, ValueError):  # built-in functions have no signature
        return False


def used_keys(function: Callable[[list[Any]], Any], count: int) -> list[bool]:
    """Says which of several PRNG keys reach the arrays that a function returns; traces it if there are any."""
    if not count:
        return []

    def arrays(keys: list[Any]) -> list[Any]:
        return [leaf for leaf in jax.tree.leaves(function(keys)) if is_array(leaf)]

    return used_arguments(arrays, [ArrayType.of(jax.random.key(0))] * count)


NO_KEY = (
    "The guest drew a random number, but its host has no PRNG key for it: give the host one, as its framework has it "
    "({how})."
)


def note_missing_key(error: Exception, how: str) -> None:
    """Adds to an error of the guest's framework that the key is the host's to give."""
    error.add_note(NO_KEY.format(how=how))
