"""Rules on NNX models: in a copy of the model, the chosen modules get a subclass of their class."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
from flax import nnx

from crossvjp.adapters._exchanged import (
    Exchanges,
    Place,
    attachment_among,
    class_without,
    marks,
    recording_class,
)
from crossvjp.extend import Attachment, Path, Running, on_types, path_of


class NnxModels:
    """Models that are NNX modules."""

    def owns(self, model: Any) -> bool:
        return isinstance(model, nnx.Module)

    def attachment_of(self, model: Any) -> Attachment | None:
        return attachment_among(_modules(model))

    def attach(self, model: Any, attachment: Attachment) -> Any:
        before = self.attachment_of(model)
        exchanges = Exchanges(attachment, nnx.Module, _as_plain)
        attached = nnx.clone(model) if before is None else _without(model, before)
        for paths, module in _modules(attached):
            made = exchanges.class_for(paths, module)
            if made is not None:
                _set_class(module, made)
        exchanges.check()
        return attached

    def detach(self, model: Any) -> Any:
        has_rules = any(marks(type(module)) for _, module in _modules(model))
        return _without(model, None) if has_rules else model

    def record(
        self, model: Any, attachment: Attachment, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[list[Any], Any]:
        running = Running(attachment, rows=[])
        graphdef, state = nnx.split(self.recording(model, running))

        def run(state: Any, *args: Any, **kwargs: Any) -> Any:
            return nnx.merge(graphdef, state)(*args, **kwargs)

        program = on_types(run, (state, *args), kwargs)
        return running.rows or [], program

    def recording(self, model: Any, running: Running) -> Any:
        """Gives a copy of the plain model that only tells of its calls."""
        model = nnx.clone(model)
        for paths, module in _modules(model):
            place = {"crossvjp_path": Place(paths[0])}
            made = recording_class(type(module), nnx.Module, _as_plain, running, _parameters, place)
            if made is not None:
                _set_class(module, made)
        return model

    def intercepting(self, running: Running) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


def _modules(model: Any) -> list[tuple[list[Path], Any]]:
    """Lists the modules below a model, itself included, each with all paths that lead to it."""
    found: dict[int, tuple[list[Path], Any]] = {}

    def visit(node: Any, path: Path, above: frozenset[int]) -> None:
        if isinstance(node, nnx.Module):
            found.setdefault(id(node), ([], node))[0].append(path)
        for names, child in _children(node):
            if nnx.graph.is_node(child) and id(child) not in above:
                visit(child, (*path, *names), above | {id(child)})

    visit(model, (), frozenset({id(model)}))
    return list(found.values())


def _children(node: Any) -> Iterator[tuple[Path, Any]]:
    if isinstance(node, nnx.Pytree):  # its attributes, of which `nnx.iter_children` leaves out tuples and dicts
        yield from (((name,), child) for name, child in sorted(vars(node).items()) if not name.startswith("_pytree__"))
        return
    children, _ = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda part: part is not node)
    yield from ((path_of(key), child) for key, child in children if child is not node)


def _without(model: Any, attachment: Attachment | None) -> Any:
    plain = nnx.clone(model)
    for _, module in _modules(plain):
        _set_class(module, class_without(type(module), attachment))
    return plain


def _set_class(module: Any, cls: type) -> None:
    object.__setattr__(module, "__class__", cls)


def _as_plain(module: Any, base: type) -> Any:
    """Gives an instance of another class with the very attributes of a module, for other threads use that one too."""
    made = object.__new__(base)
    object.__setattr__(made, "__dict__", vars(module))
    return made


def _parameters(module: Any) -> dict[str, Any]:
    return {name: value.get_value() for name, value in vars(module).items() if isinstance(value, nnx.Param)}
