"""Trees of arrays as files hold them: dicts in dicts, each array at a path of names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from crossvjp.adapters.files._errors import FileError

Names: TypeAlias = tuple[str, ...]
"""Where an array is: `("params", "Dense_0", "kernel")`."""

SCALARS = (bool, int, float, complex)


def spell(path: Names) -> str:
    """Writes a path as one key: the names joined by `/`, in each of them `~` as `~0` and `/` as `~1` (RFC 6901)."""
    return "/".join(name.replace("~", "~0").replace("/", "~1") for name in path)


def unspell(key: str) -> Names | None:
    """Reads such a key; `None` if it is none, as Haiku's own `mlp/~/linear`."""
    rest = key.replace("~0", "").replace("~1", "")
    if "~" in rest:
        return None
    return tuple(name.replace("~1", "/").replace("~0", "~") for name in key.split("/"))


def nested(tree: Any, where: Names = ()) -> Any:
    """Makes dicts of a pytree, with names for keys and NumPy arrays for leaves; empty dicts stay.

    Raises:
        FileError: two keys have one name, or a leaf is no array of numbers.
    """
    if isinstance(tree, SCALARS):
        return tree
    if isinstance(tree, np.ndarray | np.generic | jax.Array):
        return array(tree, where)
    if tree is None:
        return {}
    made: dict[str, Any] = {}
    for name, value in _children(tree, where):
        if name in made:
            raise FileError(f"Two keys of {text(where)} are named {name!r}; in a file only one can be.")
        if value is not None:
            made[name] = nested(value, (*where, name))
    return made


def array(leaf: Any, where: Names = ()) -> np.ndarray:
    """Gives a leaf as a NumPy array of the same dtype, in this machine's byte order."""
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        raise FileError(f"{text(where)} is a random key, which no file format holds; keep `jax.random.key_data` of it.")
    made = np.asarray(leaf)
    if made.dtype.kind not in "biufcV" or made.dtype.hasobject or made.dtype.names:
        raise FileError(f"{text(where)} must be an array of numbers, but has the dtype {made.dtype}.")
    return made if made.dtype.isnative else made.astype(made.dtype.newbyteorder("="))


def flat(tree: Any, where: Names = ()) -> dict[Names, Any]:
    """Lists the arrays and scalars of dicts, lists and tuples in each other by path."""
    if not isinstance(tree, Mapping | list | tuple):
        return {} if tree is None else {where: tree}
    return {path: leaf for name, value in _children(tree, where) for path, leaf in flat(value, (*where, name)).items()}


def empties(tree: Any, where: Names = ()) -> Iterator[Names]:
    """Lists the paths of empty dicts in dicts."""
    for name, value in tree.items():
        if isinstance(value, dict):
            if not value:
                yield (*where, name)
            yield from empties(value, (*where, name))


def planted(leaves: Mapping[Names, Any], empty: Iterable[Names] = ()) -> dict[str, Any]:
    """Makes dicts in dicts of arrays by path.

    Raises:
        FileError: an array has the place of a dict.
    """
    made: dict[str, Any] = {}
    for path, leaf in [*leaves.items(), *((path, {}) for path in empty)]:
        inner = made
        for name in path[:-1]:
            inner = inner.setdefault(name, {})
            if not isinstance(inner, dict):
                raise FileError(f"{text(path)} can't be read, since the file holds an array at a part of that path.")
        if path[-1] in inner:
            raise FileError(f"{text(path)} is in the file twice.")
        inner[path[-1]] = leaf
    return made


def text(path: Names) -> str:
    """Writes a path for messages."""
    return repr("/".join(path)) if path else "The whole"


def kind(leaf: Any) -> str:
    """Says what numbers an array or a Python number holds."""
    dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
    kinds = {"booleans": np.bool_, "integers": np.integer, "floats": np.floating, "complex numbers": np.complexfloating}
    return next((name for name, group in kinds.items() if jnp.issubdtype(dtype, group)), str(dtype))


def named_leaves(tree: Any) -> dict[Names, Any]:
    """Lists the leaves of any pytree by the names along their key paths."""
    found: dict[Names, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        names = tuple(_name(key) for key in path)
        if names in found:
            raise FileError(f"Two arrays of the model are named {text(names)}.")
        found[names] = leaf
    return found


def _children(tree: Any, where: Names) -> list[tuple[str, Any]]:
    if isinstance(tree, Mapping):
        return [(str(key), value) for key, value in tree.items()]
    if isinstance(tree, list | tuple) and not hasattr(tree, "_fields"):
        return [(str(index), value) for index, value in enumerate(tree)]
    children = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda inner: inner is not tree)[0]
    if len(children) == 1 and not children[0][0]:
        raise FileError(f"{text(where)} must be an array of numbers, but is {tree!r} of type {type(tree).__name__}.")
    return [(_name(path[0]), value) for path, value in children]


def _name(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)
