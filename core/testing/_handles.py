"""A module in every handle that can hold it: called twice, under two rules, in a container, as a method."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any

from ._compare import assert_close, assert_same_bits
from ._report import Check, NotApplicableError
from ._subject import Subject
from ._wraps import WRAPS, call, gradient

Use = Callable[..., Any]


def _same_for(
    make: Callable[[Callable[[Use], Use]], Use], compare_bars: Callable[[Any, Any], None] = assert_same_bits
) -> Callable[[Subject], None]:
    """Compares a use with its wrapped form, both ways to wrap; what the module can't do itself is not asked."""

    def check(subject: Subject) -> None:
        try:
            expected = gradient(subject, make(lambda use: use))
        except NotApplicableError:
            raise
        except Exception as error:
            raise NotApplicableError(f"the module itself raises {type(error).__name__}: {error}"[:200]) from error
        for wrap in WRAPS.values():
            found = gradient(subject, make(wrap))
            assert_same_bits(found[0], expected[0])
            compare_bars(found[1:], expected[1:])

    return check


def _called_twice(wrap: Callable[[Use], Use]) -> Use:
    return wrap(lambda mdl, *args, **kwargs: (mdl(*args, **kwargs), mdl(*args, **kwargs)))


def _wrapped_twice(wrap: Callable[[Use], Use]) -> Use:
    """Two wrapped calls of one module: names, counters and state go on where the first left them."""
    return lambda mdl, *args, **kwargs: [wrap(call)(mdl, *args, **kwargs) for _ in range(2)]


def _nested(wrap: Callable[[Use], Use]) -> Use:
    return wrap(lambda mdl, *args, **kwargs: wrap(call)(mdl, *args, **kwargs))


def _held_twice(wrap: Callable[[Use], Use]) -> Use:
    """One module that stands in a handle twice is one module: its state goes on, its cotangents are summed."""
    wrapped = wrap(lambda held, *args, **kwargs: [mdl(*args, **kwargs) for mdl in held])
    return lambda mdl, *args, **kwargs: wrapped((mdl, mdl), *args, **kwargs)


def _composite(mix: Callable[[Any], Any], pick: Callable[[Any], Any]) -> Callable[[Callable[[Use], Use]], Use]:
    """A handle that holds the module."""

    def make(wrap: Callable[[Use], Use]) -> Use:
        wrapped = wrap(lambda held, *args, **kwargs: pick(held)(*args, **kwargs))
        return lambda mdl, *args, **kwargs: wrapped(mix(mdl), *args, **kwargs)

    return make


def _bound_method(wrap: Callable[[Use], Use]) -> Use:
    def use(mdl: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(mdl.__call__, types.MethodType):
            raise NotApplicableError(f"{type(mdl).__name__} has no method written in Python")
        return wrap(call)(mdl.__call__, *args, **kwargs)

    return use


HANDLE_CHECKS: Sequence[Check] = (
    Check("a module called twice", _same_for(_called_twice)),
    # Through a state that the second call reads, derivatives are added in another order.
    Check("two calls, one after the other", _same_for(_wrapped_twice, assert_close)),
    Check("a rule inside a rule", _same_for(_nested)),
    Check("a tuple of handles", _same_for(_composite(lambda mdl: (mdl,), lambda held: held[0]))),
    Check("a dict of handles", _same_for(_composite(lambda mdl: {"a": [mdl]}, lambda held: held["a"][0]))),
    Check("a module twice in a handle", _same_for(_held_twice)),
    Check("a bound method", _same_for(_bound_method)),
)
