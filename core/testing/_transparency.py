"""A wrapped call is the unwrapped one, under every transform."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax

from ._compare import assert_close, assert_same_bits, numbers
from ._one_by_one import one_by_one
from ._report import Check, NotApplicableError
from ._subject import Subject
from ._transforms import TRANSFORMS, Transform
from ._wraps import WRAPS, arguments, call, loss_of

Use: TypeAlias = Callable[..., Any]


def _transparent(transform: Transform) -> Check:
    def check(subject: Subject) -> None:
        unwrapped = one_by_one(transform.apply(loss_of(subject, call)))(*arguments(subject))

        def compare(use: Use) -> None:
            wrapped = one_by_one(transform.apply(loss_of(subject, use)))(*arguments(subject))
            if not transform.differentiates:
                assert_same_bits(wrapped, unwrapped)
                return
            (results, bars), (expected, expected_bars) = wrapped, unwrapped
            assert_same_bits(results, expected)
            if transform.over_lanes:  # the unwrapped gradient may sum over lanes and rows at once
                assert_close(bars, expected_bars)
            else:
                assert_same_bits(bars, expected_bars)

        _under_each_wrap(compare)

    return Check(f"a wrapped call is transparent under {transform}", check)


def _compiled(transform: Transform) -> Check:
    def check(subject: Subject) -> None:
        _agree_compiled(subject, transform, lambda use: use)

    return Check(f"a wrapped call agrees, compiled, under {transform}", check)


def _repeated(subject: Subject) -> None:
    """Calls that repeat within a program share what JAX makes of the first ones."""
    again = lambda use: lambda mdl, *args, **kwargs: [use(mdl, *args, **kwargs) for _ in range(4)]
    transform = next(transform for transform in TRANSFORMS if transform.name == "jit(grad)")
    try:
        transform.apply(loss_of(subject, again(call)))(*arguments(subject))
    except Exception as error:
        raise NotApplicableError(f"the module itself raises {type(error).__name__}: {error}"[:200]) from error
    _agree_compiled(subject, transform, again)


def _agree_compiled(subject: Subject, transform: Transform, make: Callable[[Use], Use]) -> None:
    unwrapped = transform.apply(loss_of(subject, make(call)))(*arguments(subject))
    dropped = jax.tree.map(lambda leaf: leaf == 0, numbers(unwrapped))

    def compare(use: Use) -> None:
        wrapped = transform.apply(loss_of(subject, make(use)))(*arguments(subject))
        assert_close(wrapped, unwrapped)  # compiled as wholes, the programs are fused around different residuals
        assert_same_bits(jax.tree.map(lambda leaf: leaf == 0, numbers(wrapped)), dropped)

    _under_each_wrap(compare)


def _under_each_wrap(compare: Callable[[Use], None]) -> None:
    """Compares a call wrapped in each way; the message says what came of each that failed."""
    failures: dict[str, Exception] = {}
    for name, wrap in WRAPS.items():
        try:
            compare(wrap(call))
        except Exception as error:
            failures[name] = error
    if failures:
        told = [f"as {name}: {type(error).__name__}: {error}" for name, error in failures.items()]
        raise AssertionError("\n".join(told)) from next(iter(failures.values()))


TRANSPARENCY_CHECKS: Sequence[Check] = (
    *map(_transparent, TRANSFORMS),
    *(_compiled(transform) for transform in TRANSFORMS if transform.name != "eager"),
    Check("calls that repeat agree, compiled", _repeated),
)
