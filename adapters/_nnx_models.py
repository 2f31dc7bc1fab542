"""Rules on NNX models: in a copy of the model, the chosen modules get a subclass of their class."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from flax import nnx

from crossvjp.adapters._exchanged import MARK, Exchanges, Place, recording_class
from crossvjp.extend import Attachment, Path, Running, on_types


class NnxModels:
    """Models that are NNX modules."""

    def owns(self, model: Any) -> bool:
        return isinstance(model, nnx.Module)

    def attachment_of(self, model: Any) -> Attachment | None:
        marks = (getattr(type(module), MARK, None) for _, module in _modules(model))
        return next((mark.attachment for mark in marks if mark), None)

    def attach(self, model: Any, attachment: Attachment) -> Any:
        exchanges = Exchanges(attachment, nnx.Module, _as_plain)
        attached = nnx.clone(model)
        for paths, module in _modules(attached):
            made = exchanges.class_for(paths, module)
            if made is not None:
                _set_class(module, made)
        exchanges.check()
        return attached

    def detach(self, model: Any) -> Any:
        if self.attachment_of(model) is None:
            return model
        plain = nnx.clone(model)
        for _, module in _modules(plain):
            mark = getattr(type(module), MARK, None)
            if mark is not None:
                _set_class(module, mark.base)
        return plain

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
        for key, child in nnx.iter_children(node, graph=True):
            if nnx.graph.is_node(child) and id(child) not in above:
                visit(child, (*path, str(key)), above | {id(child)})

    visit(model, (), frozenset({id(model)}))
    return list(found.values())


def _set_class(module: Any, cls: type) -> None:
    object.__setattr__(module, "__class__", cls)


@contextlib.contextmanager
def _as_plain(module: Any, base: type) -> Iterator[Any]:
    """Makes a module an instance of its own class for the time of a run, in which it is the run's alone."""
    attached = type(module)
    _set_class(module, base)
    try:
        yield module
    finally:
        _set_class(module, attached)


def _parameters(module: Any) -> dict[str, Any]:
    return {name: value.get_value() for name, value in vars(module).items() if isinstance(value, nnx.Param)}
