"""Rules on Linen models: a subclass of the model's class that runs its methods under an interceptor."""

from __future__ import annotations

import contextlib
import dataclasses
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax

from crossvjp import HandleError
from crossvjp.adapters._linen_modules import distinguish_in_jit, run_unwrapped
from crossvjp.extend import (
    Ambient,
    Attachment,
    Running,
    Visit,
    ambient,
    entered,
    named_like,
    on_types,
    public_methods,
    subclass,
    types_of,
)

_MARK = "__crossvjp__"


class LinenModels:
    """Models that are Linen modules, not bound to variables."""

    def owns(self, model: Any) -> bool:
        return isinstance(model, nn.Module)

    def attachment_of(self, model: nn.Module) -> Attachment | None:
        return getattr(type(model), _MARK, (None, None))[1]

    def attach(self, model: nn.Module, attachment: Attachment) -> nn.Module:
        if model.scope is not None or isinstance(model.parent, nn.Module):
            raise HandleError(
                f"`attach` takes a Linen module before it is bound, but this {type(model).__name__} belongs to "
                "variables or to a parent module. Attach outside, or put the rule on it here, rule(module)(x)."
            )
        distinguish_in_jit(_place)
        model = self.detach(model)
        base = type(model)
        members = {name: _method(getattr(base, name), name, attachment) for name in _own_methods(base)}
        by_function = {name: _by_function(getattr(base, name), attachment) for name in ("apply", "init_with_output")}
        return _copied(
            subclass(base, {**members, **by_function, _MARK: (base, attachment), "__reduce__": _reduced}), model
        )

    def detach(self, model: nn.Module) -> nn.Module:
        base = getattr(type(model), _MARK, (None, None))[0]
        return model if base is None else _copied(base, model)

    def record(
        self, model: nn.Module, attachment: Attachment, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[list[Any], Any]:
        running = Running(attachment, rows=[])
        key = jax.random.key(0)
        variables = types_of(lambda *args, **kwargs: model.init(key, *args, **kwargs), args, kwargs)
        with entered(Ambient((running,))):
            program = on_types(
                lambda variables, *args, **kwargs: model.apply(
                    variables, *args, rngs={"params": key}, mutable=True, **kwargs
                ),
                (variables, *args),
                kwargs,
            )
        return running.rows or [], program

    @contextlib.contextmanager
    def intercepting(self, running: Running) -> Iterator[None]:
        def intercept(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
            module, method = context.module, context.method_name
            if module.scope is None or method == "setup":
                return next_fun(*args, **kwargs)
            path = running.relative(module.path)

            def rebuilt(mdl: nn.Module, *args: Any, **kwargs: Any) -> Any:
                return run_unwrapped(mdl, context, intercept, args, kwargs)

            visit = Visit(path, module, method, path, next_fun, rebuilt, lambda: _parameters(module))
            return running.call(visit, args, kwargs)

        with nn.intercept_methods(intercept):
            yield


def _own_methods(base: type) -> list[str]:
    names = public_methods(base, nn.Module)
    return [name for name in names if name != "setup" and not hasattr(getattr(base, name), "nowrap")]


def _by_function(own: Callable[..., Any], attachment: Attachment) -> Callable[..., Any]:
    """Makes `apply` and the like: their `method` may be any function of the bound model, its base's method too."""

    def run(self: nn.Module, *args: Any, method: Any = None, **kwargs: Any) -> Any:
        if callable(method) and not isinstance(method, nn.Module):
            function = method.__func__ if isinstance(method, types.MethodType) else method
            method = _method(function, "", attachment)
        return own(self, *args, method=method, **kwargs)

    return nn.nowrap(named_like(run, own))


def _method(own: Callable[..., Any], name: str, attachment: Attachment) -> Callable[..., Any]:
    """Makes the method of an attached model: its base's, with the attachment running."""

    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        around = ambient()
        if self.scope is None or any(running.attachment is attachment for running in around.running):
            return own(self, *args, **kwargs)
        running = Running(attachment, self.path)
        with entered(dataclasses.replace(around, running=(*around.running, running))):
            if attachment.functions and not around.rules_off:
                out = running.rewritten(own, self, args, kwargs)
            else:
                out = own(self, *args, **kwargs)
        if name == "__call__":
            running.check()
        return out

    return nn.nowrap(named_like(method, own))


def _copied(cls: type, model: nn.Module) -> nn.Module:
    """Makes a module of another class with the same fields, as `Module.clone` does."""
    fields = [field.name for field in dataclasses.fields(model) if field.init and field.name != "parent"]
    return cls(**{name: getattr(model, name) for name in fields}, parent=None)


def _reduced(self: nn.Module) -> Any:
    base, attachment = getattr(type(self), _MARK)
    return _attached_again, (_copied(base, self), attachment)


def _attached_again(model: nn.Module, attachment: Attachment) -> nn.Module:
    return LinenModels().attach(model, attachment)


def _place(module: nn.Module) -> Any:
    """Gives what a module's rules may depend on beside its class and fields."""
    by_paths = any(running.attachment.depends_on_paths for running in ambient().running)
    return module.path if by_paths and module.scope is not None else None


def _parameters(module: nn.Module) -> Mapping[str, Any]:
    return nn.meta.unbox(dict(module.variables.get("params", {})))
