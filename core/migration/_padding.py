"""Paddings of convolutions in one form, whatever each framework calls them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

Pads: TypeAlias = tuple[tuple[int, int], ...]


def per_axis(value: Any, axes: int) -> tuple[int, ...]:
    """Gives one number an axis, from one for all of them, one each, or `None` for 1."""
    if value is None:
        return (1,) * axes
    return (int(value),) * axes if isinstance(value, int) else tuple(int(number) for number in value)


def padding_of(padding: Any, kernel: Sequence[int], strides: Sequence[int], dilation: Sequence[int]) -> Pads | str:
    """Gives the padding of a convolution as a pair an axis, or as the string where it depends on the input's size."""
    spans = [rate * (size - 1) for size, rate in zip(kernel, dilation, strict=True)]
    if not isinstance(padding, str):
        return _pairs(padding, len(spans))
    name = padding.upper()
    if name == "VALID":
        return ((0, 0),) * len(spans)
    if name == "SAME" and all(stride == 1 for stride in strides):
        return tuple((span // 2, span - span // 2) for span in spans)
    return tuple((span, 0) for span in spans) if name == "CAUSAL" else name


def transposed_padding_of(
    padding: Any, kernel: Sequence[int], strides: Sequence[int], dilation: Sequence[int]
) -> Pads | str:
    """Gives the padding that `jax.lax.conv_transpose` puts round its dilated input, as a pair an axis."""
    if not isinstance(padding, str):
        return _pairs(padding, len(kernel))
    name, pairs = padding.upper(), []
    if name not in ("SAME", "VALID"):
        return name
    for size, stride, rate in zip(kernel, strides, dilation, strict=True):
        span = rate * (size - 1) + 1
        total = span + stride - 2 + (0 if name == "SAME" else max(span - stride, 0))
        before = span - 1 if name == "VALID" or stride > span - 1 else -(-total // 2)
        pairs.append((before, total - before))
    return tuple(pairs)


def _pairs(padding: Any, axes: int) -> Pads:
    if isinstance(padding, int):
        return ((padding, padding),) * axes
    pairs = [(pad, pad) if isinstance(pad, int) else tuple(int(side) for side in pad) for pad in padding]
    pairs = pairs * axes if len(pairs) == 1 else pairs
    return tuple((before, after) for before, after in pairs)
