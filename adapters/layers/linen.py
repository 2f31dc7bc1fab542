"""Layers of Flax Linen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn

from crossvjp.migration import Concatenate, Layer, Layout, Move, Refusal, layout

from . import _flax
from ._kinds import rename, shape_of, stating_dtype


def _general(layer: Layer) -> Sequence[Move]:
    module = layer.module
    outs = 1 if isinstance(module.features, int) else len(module.features)
    return _flax.general_linear(len(module.batch_dims), outs)(layer)


def _general_settings(module: nn.DenseGeneral) -> dict[str, Any]:
    axes = (module.axis,) if isinstance(module.axis, int) else tuple(module.axis)
    trailing = axes == tuple(range(-len(axes), 0))
    return {"use_bias": module.use_bias, "axes": (-1,) if trailing else axes}


def _gates(layer: Layer, gates: str) -> list[Move]:
    """Joins the layers that Linen makes for each gate."""
    hidden = shape_of(layer, f"h{gates[0]}", "kernel")[1]
    sizes = (hidden,) * len(gates)
    return [
        Move([(f"i{gate}", "kernel") for gate in gates], ["input_kernel"], [Concatenate(1, sizes)]),
        Move([(f"h{gate}", "kernel") for gate in gates], ["hidden_kernel"], [Concatenate(1, sizes)]),
    ]


def _lstm(layer: Layer) -> Sequence[Move]:
    sizes = (shape_of(layer, "hi", "kernel")[1],) * 4
    return [
        *_gates(layer, "ifgo"),
        Move([(f"h{gate}", "bias") for gate in "ifgo"], ["bias"], [Concatenate(0, sizes)]),
    ]


def _gru(layer: Layer) -> Sequence[Move]:
    sizes = (shape_of(layer, "hr", "kernel")[1],) * 3
    return [
        *_gates(layer, "rzn"),
        Move([(f"i{gate}", "bias") for gate in "rzn"], ["bias"], [Concatenate(0, sizes)]),
        Move([("hn", "bias")], ["hidden_bias"]),
    ]


_RNN: Mapping[Any, str] = {("i", "kernel"): "input_kernel", ("i", "bias"): "bias", ("h", "kernel"): "hidden_kernel"}

LAYOUTS: tuple[Layout, ...] = stating_dtype(
    layout(nn.Dense, "linear", _flax.KERNEL, settings={"use_bias": "use_bias"}),
    layout(nn.DenseGeneral, "linear", _general, settings=_general_settings),
    layout(nn.Einsum, "einsum", _flax.KERNEL, settings={"equation": "einsum_str", "use_bias": "use_bias"}),
    layout(nn.Conv, "conv", _flax.KERNEL, settings=_flax.conv_settings),
    layout(nn.ConvTranspose, "conv_transpose", _flax.transposed_conv, settings=_flax.transposed_settings),
    layout(nn.LayerNorm, "layer_norm", _flax.AFFINE, settings=_flax.norm_settings),
    layout(nn.RMSNorm, "rms_norm", _flax.AFFINE, absent={"bias": 0.0}, settings=_flax.rms_settings),
    layout(nn.GroupNorm, "group_norm", _flax.AFFINE, settings=_flax.group_settings),
    layout(nn.InstanceNorm, "group_norm", _flax.AFFINE, settings=_flax.group_settings),
    layout(nn.BatchNorm, "batch_norm", _flax.AFFINE, state=_flax.RUNNING, settings=_flax.batch_norm_settings),
    layout(nn.Embed, "embedding", lambda layer: [rename("embedding", "embedding")]),
    layout(nn.MultiHeadDotProductAttention, "attention", _flax.attention, settings=_flax.attention_settings),
    layout(nn.LSTMCell, "lstm", _lstm, settings=_flax.cell_settings),
    layout(nn.OptimizedLSTMCell, "lstm", _lstm, settings=_flax.cell_settings),
    layout(nn.GRUCell, "gru", _gru, settings=_flax.cell_settings),
    layout(nn.SimpleCell, "rnn", _RNN, absent={"hidden_bias": "bias"}, settings=_flax.cell_settings),
    layout(nn.PReLU, "prelu", {"negative_slope": "negative_slope"}),
)
REFUSALS: tuple[Refusal, ...] = ()
