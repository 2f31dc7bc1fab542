"""Layers of Haiku."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import haiku as hk
import jax.numpy as jnp

from crossvjp.migration import (
    AddConstant,
    Canonical,
    Layer,
    Layout,
    Move,
    Refusal,
    ReorderBlocks,
    Reshape,
    Split,
    StateMove,
    Transpose,
    held,
    layout,
    padding_of,
    per_axis,
    transposed_padding_of,
)

from ._kinds import flatten, rename, shape_of, stating_dtype, statistics


def _linear(layer: Layer) -> Sequence[Move]:
    return held(layer, [rename("w", "kernel"), rename("b", "bias")])


def _conv(layer: Layer) -> Sequence[Move]:
    return held(layer, [rename("w", "kernel"), flatten(layer, "b", "bias")])


def _transposed(layer: Layer) -> Sequence[Move]:
    axes = len(shape_of(layer, "w"))
    swap = Transpose((*range(axes - 2), axes - 1, axes - 2))
    return held(layer, [rename("w", "kernel", swap), flatten(layer, "b", "bias")])


def _feature_norm(layer: Layer) -> Sequence[Move]:
    """Takes off the axes of size one that stand for what is not a feature axis."""
    moves = []
    for own, name in (("scale", "scale"), ("offset", "bias")):
        shape = shape_of(layer, own)
        if len(shape) > 1:
            features = _axes(layer.module.param_axis, len(shape))
            moves.append(rename(own, name, Reshape(shape, tuple(shape[axis] for axis in features))))
        else:
            moves.append(rename(own, name))
    return held(layer, moves)


def _channel_norm(layer: Layer) -> Sequence[Move]:
    return held(layer, [flatten(layer, "scale", "scale"), flatten(layer, "offset", "bias")])


def _attention(layer: Layer) -> Sequence[Move]:
    heads, moves = layer.module.num_heads, []
    for part in ("query", "key", "value"):
        ins, outs = shape_of(layer, part, "w")
        split = Reshape((ins, outs), (ins, heads, outs // heads))
        moves.append(Move([(part, "w")], [f"{part}_kernel"], [split]))
        moves.append(Move([(part, "b")], [f"{part}_bias"], [Reshape((outs,), (heads, outs // heads))]))
    ins, outs = shape_of(layer, "linear", "w")
    moves.append(Move([("linear", "w")], ["out_kernel"], [Reshape((ins, outs), (heads, ins // heads, outs))]))
    moves.append(Move([("linear", "b")], ["out_bias"]))
    return held(layer, moves)


def _lstm(layer: Layer) -> Sequence[Move]:
    """Cuts the kernel into the input's and the state's rows; adds the 1 that Haiku adds to the forget gate."""
    rows, columns = shape_of(layer, "linear", "w")
    hidden, to_ifgo = columns // 4, (0, 2, 1, 3)
    kernels = [ReorderBlocks(1, to_ifgo), Split(0, (rows - hidden, hidden))]
    return [
        Move([("linear", "w")], ["input_kernel", "hidden_kernel"], kernels),
        Move([("linear", "b")], ["bias"], [ReorderBlocks(0, to_ifgo), AddConstant(0, (0.0, 1.0, 0.0, 0.0))]),
    ]


def _axes(axes: Any, ndim: int) -> list[int]:
    return list(range(ndim)[axes]) if isinstance(axes, slice) else sorted({axis % ndim for axis in axes})


def _to_canonical(layer: Layer, own: Any) -> Canonical:
    canonical: Canonical = {}
    for path, array in own.items():
        name, part = path[-2].removesuffix("_ema"), path[-1]
        if part == "counter":
            canonical[f"{name}_count"] = array
        else:
            canonical[name if part == "average" else f"hidden_{name}"] = array.reshape(-1)
    return canonical


def _from_canonical(layer: Layer, canonical: Canonical) -> Any:
    own, decay = {}, layer.module.mean_ema.decay
    for path, kind in layer.state.items():
        name, part = path[-2].removesuffix("_ema"), path[-1]
        hidden, count = _kept(canonical, name) or statistics(canonical, name, decay)
        value = {"average": canonical[name], "hidden": hidden, "counter": jnp.asarray(count, kind.dtype)}[part]
        own[path] = value.reshape(kind.shape)
    return own


def _kept(canonical: Canonical, name: str) -> tuple[Any, Any] | None:
    """Gives sum and count as they are: Haiku keeps the average beside them, so a count of 0 needs no other."""
    kept = canonical.get(f"hidden_{name}"), canonical.get(f"{name}_count")
    return None if None in [type(part) if part is not None else None for part in kept] else kept


def _conv_settings(module: Any) -> dict[str, Any]:
    kernel, dilation = tuple(module.kernel_shape), getattr(module, "kernel_dilation", None)
    strides = tuple(module.stride)
    dilation = tuple(dilation or module.rhs_dilation)
    return {
        "strides": strides,
        "dilation": dilation,
        "input_dilation": tuple(module.lhs_dilation),
        "padding": padding_of(module.padding, kernel, strides, dilation),
        "groups": getattr(module, "feature_group_count", None) or _one_a_channel,
        "use_bias": module.with_bias,
        "masked": getattr(module, "mask", None) is not None,
    }


def _one_a_channel(layer: Layer) -> int:
    return shape_of(layer, "w")[-1] // layer.module.channel_multiplier


def _transposed_settings(module: hk.ConvNDTranspose) -> dict[str, Any]:
    kernel, strides = tuple(module.kernel_shape), tuple(module.stride)
    ones = per_axis(None, len(kernel))
    return {
        "strides": strides,
        "dilation": ones,
        "padding": None if module.output_shape else transposed_padding_of(module.padding, kernel, strides, ones),
        "groups": 1,
        "use_bias": module.with_bias,
        "masked": module.mask is not None,
    }


def _norm_settings(module: Any) -> dict[str, Any]:
    axis = getattr(module, "axis", None)
    offset = getattr(module, "create_offset", None)
    return {
        "epsilon": module.eps,
        "use_scale": module.create_scale,
        "use_bias": offset,
        "use_fast_variance": getattr(module, "use_fast_variance", None),
        "axes": axis if isinstance(axis, tuple) and all(part < 0 for part in axis) else None,
    }


def _channel_settings(module: Any) -> dict[str, Any]:
    slow = getattr(module, "use_fast_variance", False)
    groups = getattr(module, "groups", None) or _channels
    return _norm_settings(module) | {"axes": None, "use_fast_variance": slow, "groups": groups}


def _channels(layer: Layer) -> int | None:
    return next((math.prod(kind.shape) for kind in layer.params.values()), None)


def _batch_settings(module: hk.BatchNorm) -> dict[str, Any]:
    return _norm_settings(module) | {"axes": None, "use_fast_variance": True, "momentum": module.mean_ema.decay}


def _attention_settings(module: hk.MultiHeadAttention) -> dict[str, Any]:
    return {"num_heads": module.num_heads, "use_bias": module.with_bias, "normalize_qk": False, "dropout_rate": 0.0}


_RUNNING = StateMove(_to_canonical, _from_canonical)
_DEPTHWISE = (hk.DepthwiseConv1D, hk.DepthwiseConv2D, hk.DepthwiseConv3D)
_GATED = {"gate": "sigmoid", "activation": "tanh"}
_VANILLA: Any = {
    ("linear", "w"): "input_kernel",
    ("linear", "b"): "bias",
    ("linear_1", "w"): "hidden_kernel",
    ("linear_1", "b"): "hidden_bias",
}

LAYOUTS: tuple[Layout, ...] = stating_dtype(
    layout(hk.Linear, "linear", _linear, settings={"use_bias": "with_bias"}),
    layout(hk.ConvND, "conv", _conv, settings=_conv_settings),
    *(layout(cls, "conv", _conv, settings=_conv_settings) for cls in _DEPTHWISE),
    layout(hk.ConvNDTranspose, "conv_transpose", _transposed, settings=_transposed_settings),
    layout(hk.InstanceNorm, "group_norm", _channel_norm, settings=_channel_settings),
    layout(hk.LayerNorm, "layer_norm", _feature_norm, settings=_norm_settings),
    layout(hk.RMSNorm, "rms_norm", _feature_norm, absent={"bias": 0.0}, settings=_norm_settings),
    layout(hk.GroupNorm, "group_norm", _channel_norm, settings=_channel_settings),
    layout(hk.BatchNorm, "batch_norm", _channel_norm, state=_RUNNING, settings=_batch_settings),
    layout(hk.Embed, "embedding", {"embeddings": "embedding"}),
    layout(hk.MultiHeadAttention, "attention", _attention, settings=_attention_settings),
    layout(hk.LSTM, "lstm", _lstm, settings=lambda module: _GATED),
    layout(hk.GRU, "haiku_gru", {"w_i": "input_kernel", "w_h": "hidden_kernel", "b": "bias"}),
    layout(
        hk.VanillaRNN,
        "rnn",
        _VANILLA,
        absent={"hidden_bias": "bias"},
        settings=lambda module: {"activation": "relu", "residual": False},
    ),
)
REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        ("gru", "haiku_gru"),
        "Haiku's GRU resets the state before the product with its matrix, W (r * h), and the others after it, "
        "r * (W h + b); no parameters make the two equal. Train it anew, or write the cell as Haiku does",
    ),
    Refusal(
        ("attention", "attention"),
        "heads of Flax have values of the size of their keys, and the other layer's `value_size` is not its `key_size`",
        when=lambda source, target: any(
            isinstance(mine.module, hk.MultiHeadAttention)
            and mine.module.value_size != mine.module.key_size
            and other.framework in ("linen", "nnx")
            for mine, other in ((source, target), (target, source))
        ),
    ),
)
