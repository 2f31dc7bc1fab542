"""What a Haiku module is apart from its arrays and names: calls of equal ones may share what JAX makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

import haiku as hk
import jax

from crossvjp.extend import Static, is_array

# What Haiku notes of each module: names, and where it was made. `_auto_repr` has the name among its arguments.
_NAMED = {"module_name", "name", "_auto_repr", "_submodules", "_creation_frame_id"}


def unnamed(mdl: Any, held: Set[str] | None, bundles: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Any:
    """Describes a module without its name.

    Args:
        mdl: the handle.
        held: the modules of the frame that belong to it.
        bundles: the names of its arrays, by collection and module.

    Returns:
        Something hashable, equal for modules that make the same of equal arrays; `None` if that can't be said: of
        functions, and of modules that hold arrays, themselves, or others that are not below them.
    """
    if not isinstance(mdl, hk.Module) or held is None:
        return None
    prefix = mdl.module_name
    if not all(f"{name}/".startswith(f"{prefix}/") for name in held):
        return None
    config = _config(mdl, prefix, ())
    return None if config is None else (config, names_below(prefix, bundles))


def names_below(prefix: str, bundles: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Any:
    """Lists the names of arrays, as seen from a module of that name."""
    return tuple(
        (
            collection,
            tuple((module.removeprefix(prefix), tuple(sorted(values))) for module, values in sorted(modules.items())),
        )
        for collection, modules in bundles.items()
    )


def _config(module: hk.Module, prefix: str, around: tuple[hk.Module, ...]) -> Any:
    if any(module is outer for outer in around):  # it holds itself
        return None
    found: list[Any] = []
    for name, value in vars(module).items():
        if name in _NAMED:
            continue
        leaves, treedef = jax.tree.flatten(value, is_leaf=lambda leaf: isinstance(leaf, hk.Module))
        parts = [
            _config(leaf, prefix, (*around, module)) if isinstance(leaf, hk.Module) else _static(leaf)
            for leaf in leaves
        ]
        if None in parts:
            return None
        found.append((name, treedef, tuple(parts)))
    return type(module), module.module_name.removeprefix(prefix), tuple(found)


def _static(leaf: Any) -> Static | None:
    return None if is_array(leaf) else Static(leaf)
