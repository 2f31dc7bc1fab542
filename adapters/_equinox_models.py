"""Rules on Equinox models: the chosen modules of the tree get a subclass of their class."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax

from crossvjp.adapters._exchanged import Exchanges, Place, attachment_among, class_without, recording_class
from crossvjp.extend import Attachment, Path, Running, on_types, path_of


class _WithMethod(eqx.Module):
    def method(self) -> None:
        """Does nothing."""


_BoundMethod: Any = type(_WithMethod().method)  # a tree that holds the module; what `__call__` gives is none


class EquinoxModels:
    """Models that are Equinox modules."""

    def owns(self, model: Any) -> bool:
        return isinstance(model, eqx.Module)

    def attachment_of(self, model: Any) -> Attachment | None:
        found: list[tuple[list[Path], Any]] = []

        def note(path: Path, module: Any) -> Any:
            found.append(([path], module))
            return module

        _walk(model, (), note)
        return attachment_among(found)

    def attach(self, model: Any, attachment: Attachment) -> Any:
        before = self.attachment_of(model)
        exchanges = Exchanges(attachment, eqx.Module, _of_class)

        def exchange(path: Path, module: Any) -> Any:
            made = exchanges.class_for([path], module)
            return module if made is None else _of_class(module, made)

        attached = _walk(model if before is None else _without(model, before), (), exchange)
        exchanges.check()
        return attached

    def detach(self, model: Any) -> Any:
        return _without(model, None)

    def record(
        self, model: Any, attachment: Attachment, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[list[Any], Any]:
        running = Running(attachment, rows=[])
        program = on_types(self.recording(model, running), args, kwargs)
        return running.rows or [], program

    def recording(self, model: Any, running: Running) -> Any:
        """Gives a copy of the plain model that only tells of its calls."""
        classes: dict[type, type | None] = {}
        members = {
            "__annotations__": {"crossvjp_path": Place},
            "crossvjp_path": eqx.field(static=True, default=Place()),
        }

        def recorded(path: Path, module: Any) -> Any:
            base = type(module)
            if base not in classes:
                classes[base] = recording_class(base, eqx.Module, _of_class, running, _parameters, members)
            made = classes[base]
            return module if made is None else _of_class(module, made, crossvjp_path=Place(path))

        return _walk(model, (), recorded)

    def intercepting(self, running: Running) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


def _walk(node: Any, path: Path, exchange: Callable[[Path, Any], Any]) -> Any:
    """Rebuilds a tree from its leaves, with every module in it exchanged."""
    children, treedef = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda part: part is not node)
    if len(children) == 1 and children[0][1] is node:  # a leaf
        return node
    new = treedef.unflatten([_walk(child, (*path, *path_of(key)), exchange) for key, child in children])
    if isinstance(new, _BoundMethod):
        new = _rebound(new, type(node.__self__))
    return exchange(path, new) if isinstance(new, eqx.Module) else new


def _rebound(method: Any, before: type) -> Any:
    """Gives the bound method of a module whose class was another one: the function that the class has now."""
    module, function = method.__self__, method.__func__
    name = getattr(function, "__name__", "")
    if type(module) is before or getattr(before, name, None) is not function:
        return method
    return _of_class(method, type(method), __func__=getattr(type(module), name))


def _without(model: Any, attachment: Attachment | None) -> Any:
    def plain(path: Path, module: Any) -> Any:
        cls = class_without(type(module), attachment)
        return module if cls is type(module) else _of_class(module, cls)

    return _walk(model, (), plain)


def _of_class(module: Any, cls: type, **fields: Any) -> Any:
    """Makes a module of another class with the same fields; no constructor runs again."""
    made = object.__new__(cls)
    names = {name: value for name, value in vars(module).items() if name != "crossvjp_path"}
    for name, value in {**names, **fields}.items():
        object.__setattr__(made, name, value)
    return made


def _parameters(module: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if eqx.is_inexact_array(value)}
