"""Rules on Equinox models: the chosen modules of the tree get a subclass of their class."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax

from crossvjp.adapters._exchanged import MARK, Exchanges, Place, recording_class
from crossvjp.extend import Attachment, Path, Running, on_types, path_of


class EquinoxModels:
    """Models that are Equinox modules."""

    def owns(self, model: Any) -> bool:
        return isinstance(model, eqx.Module)

    def attachment_of(self, model: Any) -> Attachment | None:
        found: list[Attachment] = []

        def note(path: Path, module: Any) -> Any:
            found.extend(one.attachment for one in [getattr(type(module), MARK, None)] if one)
            return module

        _walk(model, (), note)
        return found[0] if found else None

    def attach(self, model: Any, attachment: Attachment) -> Any:
        exchanges = Exchanges(attachment, eqx.Module, _as_plain)

        def exchange(path: Path, module: Any) -> Any:
            made = exchanges.class_for([path], module)
            return module if made is None else _of_class(made, module)

        attached = _walk(model, (), exchange)
        exchanges.check()
        return attached

    def detach(self, model: Any) -> Any:
        def plain(path: Path, module: Any) -> Any:
            mark = getattr(type(module), MARK, None)
            return module if mark is None else _of_class(mark.base, module)

        return _walk(model, (), plain)

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
                classes[base] = recording_class(base, eqx.Module, _as_plain, running, _parameters, members)
            made = classes[base]
            return module if made is None else _of_class(made, module, crossvjp_path=Place(path))

        return _walk(model, (), recorded)

    def intercepting(self, running: Running) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


def _walk(node: Any, path: Path, exchange: Callable[[Path, Any], Any]) -> Any:
    """Rebuilds a tree from its leaves, with every module in it exchanged."""
    children, treedef = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda part: part is not node)
    if len(children) == 1 and children[0][1] is node:  # a leaf
        return node
    node = treedef.unflatten([_walk(child, (*path, *path_of(key)), exchange) for key, child in children])
    return exchange(path, node) if isinstance(node, eqx.Module) else node


def _of_class(cls: type, module: Any, **fields: Any) -> Any:
    """Makes a module of another class with the same fields; no constructor runs again."""
    made = object.__new__(cls)
    names = {name: value for name, value in vars(module).items() if name != "crossvjp_path"}
    for name, value in {**names, **fields}.items():
        object.__setattr__(made, name, value)
    return made


@contextlib.contextmanager
def _as_plain(module: Any, base: type) -> Iterator[Any]:
    yield _of_class(base, module)


def _parameters(module: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if eqx.is_inexact_array(value)}
