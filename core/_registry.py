"""Which adapter a handle belongs to. No framework is imported to find out."""

from __future__ import annotations

import importlib
import sys
import types
from typing import Any

import jax

from ._arrays import is_array
from ._boundary import Adapter
from ._errors import HandleError

# A handle of a framework can't exist before the framework's module is imported, so those that are
# not in `sys.modules` need no question. The order counts where one framework builds on another.
_BUILT_IN = {
    "flax.linen": "crossvjp.adapters.linen",
    "flax.nnx": "crossvjp.adapters.nnx",
    "haiku": "crossvjp.adapters.haiku",
    "equinox": "crossvjp.adapters.equinox",
}
_PLAIN = "crossvjp.adapters.pytree"

_registered: list[Adapter] = []

# What types belong to, for one set of adapters. A new set gets a new dict, so that a thread that is still
# asking the old ones writes its answer where nobody looks any more.
_by_type: dict[type, Adapter | None] = {}
_asked: tuple[str, ...] = ()


def register_adapter(adapter: Adapter) -> Adapter:
    """Adds an adapter for a framework of your own. Adapters added later are asked first, all before ours.

    Args:
        adapter: an instance of a class that follows the `Adapter` protocol.

    Returns:
        The adapter.
    """
    global _by_type
    _registered.insert(0, adapter)
    _by_type = {}
    return adapter


def adapter_of(mdl: Any) -> Adapter:
    """Finds the adapter of a handle, or of a tuple, list or dict of handles.

    Raises:
        HandleError: no adapter knows the handle, or its parts belong to several frameworks.
    """
    own = _ask(mdl, _loaded_frameworks()) if isinstance(mdl, types.FunctionType) else _adapter_of_type(mdl)
    if own is not None:
        return own
    leaves = jax.tree.leaves(mdl, is_leaf=lambda part: _adapter_of_type(part) is not None)
    adapters = {adapter.name: adapter for leaf in leaves if (adapter := _adapter_of_type(leaf)) is not None}
    if len(adapters) > 1:
        raise HandleError(
            f"A module handle must belong to one framework, but this {type(mdl).__name__} holds modules of "
            f"{' and '.join(sorted(adapters))}. Pass all but one as inputs of the function."
        )
    if adapters:
        return next(iter(adapters.values()))
    if mdl is None or any(is_array(leaf) for leaf in leaves):
        return _built_in(_PLAIN)[0]
    frameworks = "Flax Linen, Flax NNX, Haiku or Equinox"
    raise HandleError(
        f"The module handle must be a module of {frameworks}, a pytree of arrays, a tuple, list or dict of "
        f"these, or None for no module, but is {_described(mdl)}. An adapter for another framework is added with "
        "`register_adapter`."
    )


def is_handle(mdl: Any) -> bool:
    """Says whether a value can be opened as a module."""
    try:
        adapter_of(mdl)
    except HandleError:
        return False
    return True


def _described(mdl: Any) -> str:
    text = repr(mdl)
    return f"{text if len(text) <= 80 else text[:77] + '...'} of type {type(mdl).__name__}"


def _adapter_of_type(part: Any) -> Adapter | None:
    """Asks every adapter that may know the type; the answer is kept.

    Functions are no parts of a handle: an activation in a dict of parameters stays what it is.
    """
    global _asked, _by_type
    kind = type(part)
    if kind is types.FunctionType:
        return None
    loaded = _loaded_frameworks()
    if loaded != _asked:  # a framework was imported since: what was unknown may be known now
        _by_type, _asked = {}, loaded
    known = _by_type
    if kind not in known:
        known[kind] = _ask(part, loaded)
    return known[kind]


def _loaded_frameworks() -> tuple[str, ...]:
    return tuple(framework for framework in _BUILT_IN if framework in sys.modules)


def _ask(mdl: Any, loaded: tuple[str, ...]) -> Adapter | None:
    candidates = [*_registered, *_built_ins(loaded)]
    return next((adapter for adapter in candidates if adapter.matches(mdl)), None)


def known_adapters() -> list[Adapter]:
    """Lists the adapters that were registered, then those of the loaded frameworks, then that of plain JAX."""
    return [*_registered, *_built_ins(_loaded_frameworks()), *_built_in(_PLAIN)]


def load_adapters(name: str) -> None:
    """Imports one of our adapters, by the framework's short name; any other name does nothing.

    Raises:
        ImportError: the framework is not installed.
    """
    for framework, module in _BUILT_IN.items():
        if framework.rpartition(".")[2] == name:
            importlib.import_module(framework)
            _built_in(module)


def _built_ins(loaded: tuple[str, ...]) -> list[Adapter]:
    return [adapter for framework in loaded for adapter in _built_in(_BUILT_IN[framework])]


def _built_in(module: str) -> tuple[Adapter, ...]:
    return importlib.import_module(module).ADAPTERS


def belongs_to(adapter: Adapter, leaf: Any) -> bool:
    """Says whether a leaf is a module handle of the adapter's framework."""
    return not is_array(leaf) and _adapter_of_type(leaf) is adapter


def is_reference(value: Any) -> bool:
    """Says whether a value is a module handle that refers to state which lives elsewhere."""
    adapter = None if is_array(value) else _adapter_of_type(value)
    return adapter is not None and adapter.by_reference


def held_modules(adapter: Adapter, tree: Any) -> list[Any]:
    """Lists the distinct modules of one framework among the leaves of a call's arguments."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda leaf: belongs_to(adapter, leaf))
    return list({id(leaf): leaf for leaf in leaves if belongs_to(adapter, leaf)}.values())
