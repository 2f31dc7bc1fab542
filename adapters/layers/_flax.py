"""What Linen's and NNX's layers have in common: names of arrays, and most names of attributes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from crossvjp.migration import (
    Canonical,
    Flip,
    Layer,
    Move,
    Reshape,
    StateMove,
    Transpose,
    held,
    padding_of,
    per_axis,
    transposed_padding_of,
)

from ._kinds import name_of, rename, shape_of

AFFINE = {"scale": "scale", "bias": "bias"}
KERNEL = {"kernel": "kernel", "bias": "bias"}


def general_linear(batch: int, outs: int) -> Any:
    """Gives the moves of a linear layer over several axes: merged into one for the input, one for the output."""

    def moves(layer: Layer) -> Sequence[Move]:
        kernel, bias = shape_of(layer, "kernel"), shape_of(layer, "bias")
        lead, ins, rest = kernel[:batch], kernel[batch : len(kernel) - outs], kernel[len(kernel) - outs :]
        merged = (*lead, math.prod(ins), math.prod(rest))
        rows = (*bias[:batch], math.prod(bias[batch:]))
        both = rename("kernel", "kernel", Reshape(kernel, merged)), rename("bias", "bias", Reshape(bias, rows))
        return held(layer, both)

    return moves


def transposed_conv(layer: Layer) -> Sequence[Move]:
    """Turns a kernel round that is stored as that of the convolution which the layer transposes."""
    axes = len(shape_of(layer, "kernel"))
    swap = Transpose((*range(axes - 2), axes - 1, axes - 2))
    pieces = (Flip(tuple(range(axes - 2))), swap) if layer.module.transpose_kernel else ()
    return held(layer, [rename("kernel", "kernel", *pieces), rename("bias", "bias")])


def attention(layer: Layer) -> Sequence[Move]:
    """Moves the four projections, and the norms of queries and keys."""
    parts = [(part, array) for part in ("query", "key", "value", "out") for array in ("kernel", "bias")]
    moves = [Move([(part, array)], [f"{part}_{array}"]) for part, array in parts]
    norms = [Move([(f"{part}_ln", "scale")], [f"{part}_norm_scale"]) for part in ("query", "key")]
    return held(layer, [*moves, *norms])


def mean_and_var(layer: Layer, own: Any) -> Canonical:
    return {path[-1]: array for path, array in own.items()}


def from_mean_and_var(layer: Layer, canonical: Canonical) -> Any:
    return {path: canonical[path[-1]] for path in layer.state}


RUNNING = StateMove(mean_and_var, from_mean_and_var)


def conv_settings(module: Any) -> dict[str, Any]:
    """Gives what a convolution depends on."""
    kernel = per_axis(module.kernel_size, 1)
    strides, dilation = per_axis(module.strides, len(kernel)), per_axis(module.kernel_dilation, len(kernel))
    return {
        "strides": strides,
        "dilation": dilation,
        "input_dilation": per_axis(module.input_dilation, len(kernel)),
        "padding": padding_of(module.padding, kernel, strides, dilation),
        "groups": module.feature_group_count,
        "use_bias": module.use_bias,
        "masked": module.mask is not None,
    }


def transposed_settings(module: Any) -> dict[str, Any]:
    """Gives what a transposed convolution depends on."""
    kernel = per_axis(module.kernel_size, 1)
    strides, dilation = per_axis(module.strides, len(kernel)), per_axis(module.kernel_dilation, len(kernel))
    return {
        "strides": strides,
        "dilation": dilation,
        "padding": transposed_padding_of(module.padding, kernel, strides, dilation),
        "groups": 1,
        "use_bias": module.use_bias,
        "masked": module.mask is not None,
    }


def norm_settings(module: Any) -> dict[str, Any]:
    """Gives what a normalisation depends on."""
    names = ("epsilon", "use_scale", "use_bias", "use_fast_variance")
    axes = module.reduction_axes if hasattr(module, "reduction_axes") else None
    axes = (axes,) if isinstance(axes, int) else axes
    return {name: getattr(module, name) for name in names if hasattr(module, name)} | {"axes": axes and tuple(axes)}


def batch_norm_settings(module: Any) -> dict[str, Any]:
    """Gives what a batch norm depends on."""
    return norm_settings(module) | {"momentum": module.momentum}


def rms_settings(module: Any) -> dict[str, Any]:
    """Gives what an RMS norm depends on; it has no mean, so there is no faster variance."""
    return {name: value for name, value in norm_settings(module).items() if name != "use_fast_variance"}


def group_settings(module: Any) -> dict[str, Any]:
    """Gives what a group norm depends on; without a number of groups, each channel is one."""
    size = getattr(module, "group_size", None)
    groups = getattr(module, "num_groups", None)
    return norm_settings(module) | {
        "axes": None,
        "groups": groups or (lambda layer: (channels := channels_of(layer)) and channels // (size or 1)),
    }


def channels_of(layer: Layer) -> int | None:
    """Gives the number of channels that a layer's first parameter has, if it has parameters."""
    return next((kind.shape[-1] for kind in layer.params.values()), None)


def attention_settings(module: Any) -> dict[str, Any]:
    """Gives what attention depends on."""
    return {
        "num_heads": module.num_heads,
        "use_bias": module.use_bias,
        "normalize_qk": module.normalize_qk,
        "dropout_rate": float(module.dropout_rate),
    }


def cell_settings(module: Any) -> dict[str, Any]:
    """Gives what a recurrent cell depends on."""
    return {
        "gate": name_of(module.gate_fn) if hasattr(module, "gate_fn") else None,
        "activation": name_of(module.activation_fn),
        "residual": getattr(module, "residual", None),
    }
