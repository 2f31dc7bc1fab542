"""Rules on transformed Haiku functions: `apply` runs under an interceptor."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import haiku as hk
import jax

from crossvjp import HandleError
from crossvjp.adapters._haiku_frames import run_inner
from crossvjp.extend import Ambient, Attachment, Running, Visit, ambient, entered, on_types, types_of

_KINDS = (hk.Transformed, hk.TransformedWithState, hk.MultiTransformed, hk.MultiTransformedWithState)
_MARK = "__crossvjp__"
_BASE_METHODS = frozenset(dir(hk.Module)) - {"__call__"}  # `params_dict` and the like


class HaikuModels:
    """Models that are pairs `(init, apply)`; of `hk.multi_transform`, a tree of functions in the place of `apply`."""

    def owns(self, model: Any) -> bool:
        return isinstance(model, (*_KINDS, hk.Module))

    def attachment_of(self, model: Any) -> Attachment | None:
        if isinstance(model, hk.Module):
            raise HandleError(
                f"The Haiku module {model.module_name} belongs to a transform. Attach rules to the transformed "
                "function, hk.transform(f), or put the rule on the module here, rule(module)(x)."
            )
        return getattr(model.init, _MARK, (None, None))[1]

    def attach(self, model: Any, attachment: Attachment) -> Any:
        init = _under(model.init, attachment, initializing=True)
        setattr(init, _MARK, (model, attachment))
        return model._replace(init=init, apply=jax.tree.map(lambda apply: _under(apply, attachment), model.apply))

    def detach(self, model: Any) -> Any:
        return getattr(model.init, _MARK, (model,))[0]

    def record(
        self, model: Any, attachment: Attachment, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[list[Any], Any]:
        running = Running(attachment, rows=[])
        key = jax.random.key(0)

        def init(*args: Any, **kwargs: Any) -> Any:
            return model.init(key, *args, **kwargs)

        if not callable(model.apply):  # several functions, of which the sample may fit none
            with entered(Ambient((running,))):
                program = on_types(init, args, kwargs)
            return running.rows or [], program
        made = types_of(init, args, kwargs)
        variables = made if isinstance(model, hk.TransformedWithState) else (made,)

        rng = (key,) if takes_rng(model, len(variables)) else ()

        def apply(variables: Any, *args: Any, **kwargs: Any) -> Any:
            return model.apply(*variables, *rng, *args, **kwargs)

        with entered(Ambient((running,))):
            program = on_types(apply, (variables, *args), kwargs)
        return running.rows or [], program

    @contextlib.contextmanager
    def intercepting(self, running: Running) -> Iterator[None]:
        def intercept(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
            module = context.module
            name = getattr(module, "module_name", None)  # none yet in a constructor
            if name is None or context.method_name in _BASE_METHODS:
                return next_fun(*args, **kwargs)

            def rebuilt(mdl: Any, *args: Any, **kwargs: Any) -> Any:
                # Haiku's modules refer to the frame, and that is what the adapter rebuilds.
                return run_inner(intercept, context, args, kwargs)

            path = running.relative(tuple(name.split("/")))
            method, own = context.method_name, lambda: _parameters(module)
            return running.call(Visit(path, module, method, id(module), next_fun, rebuilt, own), args, kwargs)

        with hk.intercept_methods(intercept):
            yield


def _under(function: Callable[..., Any], attachment: Attachment, *, initializing: bool = False) -> Callable[..., Any]:
    """Makes `init` or `apply` of an attached model."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        around = ambient()
        running = Running(attachment)
        with entered(dataclasses.replace(around, running=(*around.running, running))):
            if attachment.functions and not around.rules_off and not initializing:
                out = running.rewritten(lambda _, *args, **kwargs: function(*args, **kwargs), None, args, kwargs)
            else:
                out = function(*args, **kwargs)
        running.check()
        return out

    return run


def takes_rng(model: Any, variables: int) -> bool:
    """Says whether `apply` takes a key; under `hk.without_apply_rng` it does not, and `init` still does."""
    init, apply = (len(inspect.signature(function).parameters) for function in (model.init, model.apply))
    return apply == init + variables


def _parameters(module: hk.Module) -> Mapping[str, Any]:
    own = module.params_dict()
    prefix = f"{module.module_name}/"
    names = {name.removeprefix(prefix): array for name, array in own.items() if name.startswith(prefix)}
    return {name: array for name, array in names.items() if "/" not in name}
