"""Channels as variables of the frameworks, and trees of variables that have channels among them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax

from ._channels import Channel, Overwrite, Stack, Sum
from ._errors import ArgumentError
from ._paths import Path, path_of
from ._registry import adapter_of

if TYPE_CHECKING:
    from jaxtyping import PyTree

_KINDS: dict[str, type[Channel]] = {kind.__name__: kind for kind in (Sum, Overwrite, Stack)}


def channel(mdl: Any, name: str, initial: Channel) -> Channel:
    """Gives a channel out of the backward pass that is a variable of a module.

    One line in the module serves for making and for using it:

        norm = crossvjp.channel(self, "norm", crossvjp.Sum())
        y = Probe(norm)(self.dense)(x)

    In Linen it is a variable of the collection "channels", in Haiku parameters of the module, in NNX a
    variable of type `crossvjp.adapters.nnx.ChannelVariable` (say the line in `__init__` too); in
    Equinox it is a field, and in a dict an entry, that must be there. What is sent is where the
    gradient is: differentiate with respect to the channels too, then see `channels` and `settle`.

    Args:
        mdl: the module; in Haiku, the one whose method runs.
        name: its name.
        initial: what it is made of.

    Returns:
        The channel, for the field of a rule.

    Raises:
        ArgumentError: `initial` is no channel, or the module has none and it can't be made here.
    """
    if not isinstance(initial, Channel):
        raise ArgumentError(f"`initial` must be a Sum, an Overwrite or a Stack, but is {initial!r}.")
    adapter = adapter_of(mdl)
    found = adapter.channel(mdl, name, initial)
    if not isinstance(found, Channel):
        raise ArgumentError(f"{name!r} of this {type(mdl).__name__} must be a channel, but is {type(found).__name__}.")
    return found


def held_channel(mdl: Any, name: str) -> Any:
    """Finds a channel that a module holds as a field or an entry.

    Raises:
        ArgumentError: it has none of this name.
    """
    if isinstance(mdl, Mapping) and name in mdl:
        return mdl[name]
    if not isinstance(mdl, Mapping) and hasattr(mdl, name):
        return getattr(mdl, name)
    place = "an entry" if isinstance(mdl, Mapping) else "a field"
    raise ArgumentError(
        f"This {type(mdl).__name__} has no channel {name!r}, and variables can't be added to it in a call. "
        f"Give it {place} {name!r}, such as crossvjp.Sum(), when it is made."
    )


def flat_name(name: str, kind: Channel, path: tuple[Any, ...]) -> str:
    """Names one array of a channel, for a framework whose variables are single arrays: `norm@Sum/value`."""
    return f"{name}@{type(kind).__name__}/{'/'.join(path_of(path))}"


def channels(tree: PyTree) -> dict[str, Channel]:
    """Lists the channels in a tree of variables, or of their gradients, by their paths.

    Args:
        tree: variables of any framework.

    Example:
        >>> channels({"w": jax.numpy.ones(2), "norm": Sum()})
        {'norm': Sum(Array(0., dtype=float32), count=Array(0., dtype=float32))}
    """
    found: dict[str, Any] = {}
    flat: dict[tuple[str, str], dict[Path, Any]] = {}
    for path, leaf in _leaves(tree):
        names = path_of(path)
        if isinstance(leaf, Channel):
            found["/".join(names[:-1] if names[-1:] == ("value",) else names)] = leaf  # an NNX Variable's own key
        elif named := _flat_parts(names):
            prefix, kind, inner = named
            flat.setdefault((prefix, kind), {})[inner] = leaf
    for (prefix, kind), arrays in flat.items():
        found[prefix] = _KINDS[kind]._of(_nested(arrays, ("value",)), arrays[("count",)])
    return found


def settle(tree: PyTree, bars: PyTree) -> tuple[PyTree, PyTree]:
    """Settles all channels in a tree of variables after a backward pass.

    Args:
        tree: variables of any framework, parameters among them or not.
        bars: their gradients, of the same structure.

    Returns:
        The variables with settled channels, all else as it was; and the gradients with zeros for the
        channels, so that an optimiser leaves these alone. (Weight decay would not: mask them.)

    Raises:
        ArgumentError: the structures differ.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_channel)
    bar_leaves, bar_treedef = jax.tree.flatten(bars, is_leaf=_is_channel)
    if treedef != bar_treedef:
        raise ArgumentError(
            f"`bars` must have the structure of `tree`, {treedef}, but has {bar_treedef}: differentiate with respect "
            "to the channels too."
        )
    counts = {}
    for (path, _), bar in zip(leaves, bar_leaves, strict=True):
        named = _flat_parts(path_of(path))
        if named and named[2] == ("count",):
            counts[named[:2]] = bar
    settled, rest = [], []
    for (path, leaf), bar in zip(leaves, bar_leaves, strict=True):
        named = _flat_parts(path_of(path))
        new = leaf
        if isinstance(leaf, Channel):
            new = leaf.settle(bar)
        elif named:
            kind, count = _KINDS[named[1]], counts[named[:2]]
            whole = kind._of(leaf, count).settle(kind._of(bar, count))
            new = whole.count if named[2] == ("count",) else whole.value
        is_sent = isinstance(leaf, Channel) or named
        settled.append(new)
        rest.append(jax.tree.map(jax.numpy.zeros_like, bar) if is_sent else bar)
    return jax.tree.unflatten(treedef, settled), jax.tree.unflatten(treedef, rest)


def _is_channel(node: Any) -> bool:
    return isinstance(node, Channel)


def _leaves(tree: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_channel)


def _flat_parts(names: Path) -> tuple[str, str, Path] | None:
    """Reads a flat name: the path of the channel, its kind, and the path inside."""
    for index, name in enumerate(names):
        start, mark, rest = name.partition("@")
        kind, _, inner = rest.partition("/")
        if mark and kind in _KINDS:
            return "/".join((*names[:index], start)), kind, tuple(inner.split("/"))
    return None


def _nested(arrays: dict[Path, Any], prefix: Path) -> Any:
    """Rebuilds what lies below a path: the array there, or a dict."""
    if prefix in arrays:
        return arrays[prefix]
    keys = list(dict.fromkeys(path[len(prefix)] for path in arrays if path[: len(prefix)] == prefix))
    return {key: _nested(arrays, (*prefix, key)) for key in keys}
