"""Rules on functions, and on what they call: modules of the frameworks that can be intercepted, and named functions."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from crossvjp.extend import (
    Ambient,
    Attachment,
    Running,
    Visit,
    ambient,
    attachment_of,
    entered,
    marked,
    on_types,
    without,
)


class FunctionModels:
    """Models that are functions, `apply(params, *args)` for example; asked last, so it takes whatever can be called."""

    def owns(self, model: Any) -> bool:
        return callable(model) and not isinstance(model, type)

    def attachment_of(self, model: Any) -> Attachment | None:
        return attachment_of(model)

    def attach(self, model: Callable[..., Any], attachment: Attachment) -> Any:
        model = self.detach(model)

        @functools.wraps(model)
        def run(*args: Any, **kwargs: Any) -> Any:
            around = ambient()
            if attachment.token in around.detached:
                return model(*args, **kwargs)
            running = Running(attachment)
            with entered(dataclasses.replace(around, running=(*around.running, running))):
                out = running.call(_visit(model, running), args, kwargs)
            running.check()
            return out

        return marked(run, model, attachment)

    def detach(self, model: Any) -> Any:
        return without(model, attachment_of(model))

    def record(
        self, model: Callable[..., Any], attachment: Attachment, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[list[Any], Any]:
        running = Running(attachment, rows=[])
        with entered(Ambient((running,))):
            program = on_types(lambda *args, **kwargs: running.call(_visit(model, running), args, kwargs), args, kwargs)
        return running.rows or [], program

    def intercepting(self, running: Running) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


def _visit(function: Callable[..., Any], running: Running) -> Visit:
    def plain(*args: Any, **kwargs: Any) -> Any:
        if running.attachment.functions and running.rows is None and not ambient().rules_off:
            return running.rewritten(lambda _, *args, **kwargs: function(*args, **kwargs), None, args, kwargs)
        return function(*args, **kwargs)

    return Visit((), function, "__call__", id(function), plain, function, is_function=True)
