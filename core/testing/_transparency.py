"""A wrapped call is the unwrapped one, under every transform."""

from __future__ import annotations

from collections.abc import Sequence

import jax

from ._compare import assert_close, assert_same_bits, numbers
from ._one_by_one import one_by_one
from ._report import Check
from ._subject import Subject
from ._transforms import TRANSFORMS, Transform
from ._wraps import WRAPS, arguments, call, loss_of


def _transparent(transform: Transform, wrap: str) -> Check:
    def check(subject: Subject) -> None:
        wrapped, unwrapped = (
            one_by_one(transform.apply(loss_of(subject, use)))(*arguments(subject)) for use in (WRAPS[wrap](call), call)
        )
        if not transform.differentiates:
            assert_same_bits(wrapped, unwrapped)
            return
        (results, bars), (expected, expected_bars) = wrapped, unwrapped
        assert_same_bits(results, expected)
        if transform.over_lanes:  # the unwrapped gradient may sum over lanes and rows at once
            assert_close(bars, expected_bars)
        else:
            assert_same_bits(bars, expected_bars)

    return Check(f"{wrap} is transparent under {transform}", check)


def _compiled(transform: Transform, wrap: str) -> Check:
    def check(subject: Subject) -> None:
        wrapped, unwrapped = (
            transform.apply(loss_of(subject, use))(*arguments(subject)) for use in (WRAPS[wrap](call), call)
        )
        assert_close(wrapped, unwrapped)  # compiled as wholes, the programs are fused around different residuals
        assert_same_bits(*(jax.tree.map(lambda leaf: leaf == 0, numbers(seen)) for seen in (wrapped, unwrapped)))

    return Check(f"{wrap} agrees, compiled, under {transform}", check)


TRANSPARENCY_CHECKS: Sequence[Check] = (
    *(_transparent(transform, wrap) for transform in TRANSFORMS for wrap in WRAPS),
    *(_compiled(transform, wrap) for transform in TRANSFORMS for wrap in WRAPS if transform.name != "eager"),
)
