"""A rule under check: what it says of itself, and how it is put on a module."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable
from typing import Any, TypeAlias

from .._custom_vjp import custom_vjp
from .._errors import ArgumentError
from .._registry import is_handle
from .._rule import Rule
from ._report import NotApplicableError
from ._wraps import call

Functions: TypeAlias = tuple[Callable[..., Any], Callable[..., Any]]
"""`(forward_fn, backward_fn)`, as `custom_vjp` takes them."""


@dataclasses.dataclass(frozen=True)
class Claims:
    """What a rule says of itself.

    Args:
        linear: its cotangents are linear in `y_bar`.
        exact: they are those of autodiff, to rounding.
        replaces_forward: its forward pass gives another value than the function alone.
        stops: what it gives no cotangent for, on purpose: globs on paths that start with
            `variables/`, `inputs/<position>` or `keywords/<name>`.
    """

    linear: bool = True
    exact: bool = False
    replaces_forward: bool = False
    stops: tuple[str, ...] = ()


def claims_of(the_rule: Any, **claims: Any) -> Claims:
    """Gives what a rule says of itself, but for what is said here."""
    own = isinstance(the_rule, Rule)
    says = Claims(the_rule.linear, the_rule.exact, the_rule.replaces_forward) if own else Claims()
    return dataclasses.replace(says, **claims)


@dataclasses.dataclass(frozen=True)
class UnderRule:
    """Calls modules under a rule, `use(mdl, *args)`; `on` puts it on other functions of a handle."""

    on: Callable[[Callable[..., Any]], Callable[..., Any]]
    rule: Rule | None = None
    key: Any = None

    def __call__(self, mdl: Any, *args: Any, **kwargs: Any) -> Any:
        return self.on(call)(mdl, *args, **kwargs)


def under_rule(the_rule: Any, key: Any = None) -> UnderRule:
    """Makes the use that the checks are run on.

    Args:
        the_rule: a `Rule`, or the pair `(forward_fn, backward_fn)` of `custom_vjp`.
        key: as in `Rule.lift`.

    Raises:
        ArgumentError: `the_rule` is neither.
    """
    if isinstance(the_rule, Rule):
        return UnderRule(lambda fn: _by_rule(fn, the_rule, key), the_rule, key)
    if isinstance(the_rule, tuple) and len(the_rule) == 2 and all(map(callable, the_rule)):
        return UnderRule(lambda fn: _by_functions(fn, the_rule))
    raise ArgumentError(f"`the_rule` must be a Rule or the pair (forward_fn, backward_fn), but is {the_rule!r}.")


def _by_rule(fn: Callable[..., Any], the_rule: Rule, key: Any) -> Callable[..., Any]:
    def use(mdl: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(mdl, types.MethodType) or is_handle(mdl):
            return the_rule.lift(fn, key=key)(mdl, *args, **kwargs)
        alone = lambda _, *args, **kwargs: fn(mdl, *args, **kwargs)  # a plain function of inputs
        return the_rule.lift(alone, key=key)(None, *args, **kwargs)

    return use


def _by_functions(fn: Callable[..., Any], functions: Functions) -> Callable[..., Any]:
    if fn is not call:
        raise NotApplicableError("a forward function belongs to one function")
    return custom_vjp(fn, *functions)
