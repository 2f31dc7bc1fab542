"""Plain parameters: any pytree of arrays is a handle."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from crossvjp.adapters._function_models import FunctionModels
from crossvjp.adapters._plain_guest import PlainHosting
from crossvjp.extend import Body, Partition, Predicate, held_channel, predicate, unknown_choice


class ValueBoundary:
    """The boundary of a handle that is a value: nothing is written, and nothing can go stale."""

    def __init__(self, mdl: Any, wanted: Predicate, grad_vars: Any):
        self._partition = Partition(mdl, wanted, grad_vars)
        self.static = self._partition.static
        self.variables, self.context = self._partition.take()

    def call(self, fn: Callable[..., Any], variables: Any, context: Any, *args: Any, **kwargs: Any) -> tuple[Any, None]:
        return fn(self._partition.combine(variables, context), *args, **kwargs), None

    def closed(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


class PytreeAdapter:
    """Opens plain pytrees. "params" is every floating array, or the key "params" of a mapping that has one."""

    name = "plain JAX"
    by_reference = False
    finds_closures = False
    models = FunctionModels()
    hosting = PlainHosting()

    def matches(self, mdl: Any) -> bool:
        return False  # the last resort: the registry falls back on it for any tree with arrays

    def initializing(self, mdl: Any) -> bool:
        return False

    def channel(self, mdl: Any, name: str, initial: Any) -> Any:
        return held_channel(mdl, name)

    def lift(self, mdl: Any, grad_vars: Any, body: Body) -> Any:
        keys = set(map(str, mdl)) if isinstance(mdl, Mapping) else set()

        def named(word: Any) -> Predicate:
            if word == "params" and "params" not in keys:
                return lambda path, leaf: True
            if isinstance(word, str) and word in keys:
                return lambda path, leaf: path[:1] == (word,)
            raise unknown_choice(word, f"'params', one of the keys {sorted(keys)}" if keys else "'params'")

        return body(ValueBoundary(mdl, predicate(grad_vars, named), grad_vars))[0]


ADAPTERS = (PytreeAdapter(),)
