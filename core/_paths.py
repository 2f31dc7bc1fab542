"""Key paths of pytrees as tuples of strings, the one form that every framework's paths map onto."""

from __future__ import annotations

from typing import Any, TypeAlias

import jax

Path: TypeAlias = tuple[str, ...]


def key_name(key: Any) -> str:
    """Gives the bare name of one key of a JAX key path, whatever kind of container it indexes."""
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def path_of(key_path: tuple[Any, ...]) -> Path:
    """Turns a JAX key path into a tuple of names."""
    return tuple(key_name(key) for key in key_path)


def show(path: Path) -> str:
    """Prints a path as a subscript, so that it can be pasted behind a variable's name."""
    return "".join(f"[{part!r}]" for part in path) or "its root"


def leaves_with_paths(tree: Any) -> list[tuple[Path, Any]]:
    """Lists the leaves of a pytree with their paths; `None` counts as a leaf."""
    pairs = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda leaf: leaf is None)
    return [(path_of(path), leaf) for path, leaf in pairs]
