"""An attached model while it runs, and the calls that it makes."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from ._ambient import Ambient, ambient, entered
from ._arrays import is_array
from ._attachment import Attachment
from ._closures import name_of
from ._models import interceptors
from ._paths import Path
from ._rule import Rule


@dataclasses.dataclass(frozen=True)
class Row:
    """One call that a model makes, as `crossvjp.sites` shows it.

    Attributes:
        path: where the module stands in the model, joined by `/`; the name, for a function.
        kind: the module's class, or "function".
        method: the method that is called.
        parameters: the module's own parameters by name, `(shape, dtype)` each, without those of modules inside.
        rule: the rule that the call runs under, or `None`.
        calls: how often it is made, as traced: once in a loop.
    """

    path: str
    kind: str
    method: str
    parameters: Mapping[str, tuple[tuple[int, ...], str]]
    rule: Rule | None
    calls: int = 1


class Running:
    """An attached model while it runs: what its interceptors ask, and what the run met."""

    def __init__(
        self,
        attachment: Attachment,
        prefix: Path = (),
        rows: list[Any] | None = None,
        observe: Callable[[Visit, tuple[Any, ...], dict[str, Any]], Any] | None = None,
    ):
        self.attachment = attachment
        self.token = attachment.token
        self.prefix = prefix
        self.rows = rows
        self.observe = observe  # makes every call in the place of what follows here
        self.sites: list[tuple[Path, str]] = []
        self.functions: list[str] | None = None
        self.at: Path = ()  # where the guest that runs now is hosted; it knows paths within itself alone

    def check(self) -> None:
        """Refuses choices that nothing has matched so far.

        Raises:
            ArgumentError: there is one.
        """
        self.attachment.check_matched(self.sites, self.functions)

    def rewritten(self, fn: Callable[..., Any], mdl: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls `fn(mdl, *args, **kwargs)`, with rules on the functions that are chosen by name."""
        from ._rewrite import call_rewritten  # here, since it imports jax.extend

        names: list[str] = []

        def choose(name: str) -> tuple[Rule, Any] | None:
            names.append(name)
            return self.attachment.function_rule(name, names.count(name))

        out, asked = call_rewritten(choose, fn, mdl, args, kwargs)
        if asked:
            self.functions = [*(self.functions or ()), *names]
        return out

    def intercepting(self) -> contextlib.AbstractContextManager[None]:
        """A context in which the frameworks tell of every call of a module."""
        return interceptors(self)

    def relative(self, path: Path) -> Path:
        """Gives a path as seen from the model."""
        if self.at:
            return (*self.at, *(path or ("~",)))
        length = len(self.prefix)
        return path[length:] if path[:length] == self.prefix else path

    def call(self, visit: Visit, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Makes one call of a module, under its rule if it has one."""
        around = ambient()
        key = (self.attachment.token, visit.site)
        if key in around.inside or not _is_public(visit.method):
            return visit.plain(*args, **kwargs)
        if self.observe is not None:
            return self.observe(visit, args, kwargs)
        name = type(visit.module).__name__
        self.sites.append((visit.path, name))
        found = self.attachment.rule_at(visit.path, visit.module, visit.method)
        if self.rows is not None:
            index = len(self.rows)
            self.rows.append(None)
            with entered(around.within(key)):
                out = visit.plain(*args, **kwargs)
            parameters = described_parameters(visit.parameters())
            self.rows[index] = Row("/".join(visit.path), name, visit.method, parameters, found and found[0])
            return out
        if found is None or around.rules_off:
            return visit.plain(*args, **kwargs)
        return self.under(found, around.within(key), visit, args, kwargs)

    def under(
        self,
        found: tuple[Rule, Any],
        inside: Ambient,
        visit: Visit,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Makes a call under a rule, in surroundings that are set for each run of it."""

        def run(mdl: Any, *args: Any, **kwargs: Any) -> Any:
            with entered(inside):
                if self.attachment.functions:
                    return self.rewritten(visit.rebuilt, mdl, args, kwargs)
                return visit.rebuilt(mdl, *args, **kwargs)

        module = visit.module
        like = module if visit.is_function else getattr(type(module), visit.method, None)
        run.__name__ = name_of(module) if visit.is_function else f"{type(module).__name__}.{visit.method}"
        if kwargs and like is not None:  # resolves keywords to positions
            run.__signature__ = inspect.signature(like)  # pyright: ignore[reportFunctionMemberAccess]
        rule, key = found
        handle = () if visit.is_function else (module,)
        return rule.lift(run, key=key)(*handle, *args, **kwargs)


@dataclasses.dataclass(frozen=True)
class Visit:
    """A call of a module, as an interceptor meets it.

    Args:
        path: the module's path in the model.
        module: the live module.
        method: the method's name.
        site: names the module among those that are being called.
        plain: `plain(*args, **kwargs)` makes the call as it is.
        rebuilt: `rebuilt(mdl, *args, **kwargs)` calls the method on a module that an adapter rebuilt, and does not
            come here again for the same call.
        parameters: lists the module's own parameters by name, after the call.
        is_function: whether the module is a function, whose variables are its first argument.
    """

    path: Path
    module: Any
    method: str
    site: Any
    plain: Callable[..., Any]
    rebuilt: Callable[..., Any]
    parameters: Callable[[], Mapping[str, Any]] = dict
    is_function: bool = False


def _is_public(method: str) -> bool:
    return method == "__call__" or not method.startswith("_")


def described_parameters(arrays: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Gives shapes and dtypes of arrays by name."""
    return {name: (tuple(array.shape), str(array.dtype)) for name, array in arrays.items() if is_array(array)}
