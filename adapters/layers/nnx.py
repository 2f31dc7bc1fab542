"""Layers of Flax NNX."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flax import nnx

from crossvjp.migration import Concatenate, Layer, Layout, Move, Refusal, layout

from . import _flax
from ._kinds import rename, shape_of, stating_dtype


def _general(layer: Layer) -> Sequence[Move]:
    return _flax.general_linear(len(layer.module.batch_axis), len(layer.module.out_features))(layer)


def _general_settings(module: nnx.LinearGeneral) -> dict[str, Any]:
    axes = tuple(module.axis)
    trailing = axes == tuple(range(-len(axes), 0))
    return {"use_bias": module.use_bias, "axes": (-1,) if trailing else axes}


def _lstm(layer: Layer) -> Sequence[Move]:
    """Joins the layers for each gate, which are those of Linen but for the name of the forget gate's."""
    sizes = (shape_of(layer, "hi", "kernel")[1],) * 4
    hidden = ("hi", "hf", "hg", "ho")
    return [
        Move([(gate, "kernel") for gate in ("ii", "if_", "ig", "io")], ["input_kernel"], [Concatenate(1, sizes)]),
        Move([(gate, "kernel") for gate in hidden], ["hidden_kernel"], [Concatenate(1, sizes)]),
        Move([(gate, "bias") for gate in hidden], ["bias"], [Concatenate(0, sizes)]),
    ]


_INPUT: Mapping[Any, str] = {("dense_i", "kernel"): "input_kernel", ("dense_h", "kernel"): "hidden_kernel"}
# The last is what flax#5595 would add; until then these cells lack it.
_GRU = {**_INPUT, ("dense_i", "bias"): "bias", ("hn_bias",): "hidden_bias"}
_INPUT_BIAS = {**_INPUT, ("dense_i", "bias"): "bias"}
_HIDDEN_BIAS = {**_INPUT, ("dense_h", "bias"): "bias"}

LAYOUTS: tuple[Layout, ...] = stating_dtype(
    layout(nnx.Linear, "linear", _flax.KERNEL, settings={"use_bias": "use_bias"}),
    layout(nnx.LinearGeneral, "linear", _general, settings=_general_settings),
    layout(nnx.Einsum, "einsum", _flax.KERNEL, settings={"equation": "einsum_str"}),
    layout(nnx.Conv, "conv", _flax.KERNEL, settings=_flax.conv_settings),
    layout(nnx.ConvTranspose, "conv_transpose", _flax.transposed_conv, settings=_flax.transposed_settings),
    layout(nnx.LayerNorm, "layer_norm", _flax.AFFINE, settings=_flax.norm_settings),
    layout(nnx.RMSNorm, "rms_norm", _flax.AFFINE, absent={"bias": 0.0}, settings=_flax.rms_settings),
    layout(nnx.GroupNorm, "group_norm", _flax.AFFINE, settings=_flax.group_settings),
    layout(nnx.InstanceNorm, "group_norm", _flax.AFFINE, settings=_flax.group_settings),
    layout(nnx.BatchNorm, "batch_norm", _flax.AFFINE, state=_flax.RUNNING, settings=_flax.batch_norm_settings),
    layout(nnx.Embed, "embedding", lambda layer: [rename("embedding", "embedding")]),
    layout(nnx.MultiHeadAttention, "attention", _flax.attention, settings=_flax.attention_settings),
    layout(nnx.LSTMCell, "lstm", _lstm, settings=_flax.cell_settings),
    layout(nnx.OptimizedLSTMCell, "lstm", _HIDDEN_BIAS, settings=_flax.cell_settings),
    layout(nnx.GRUCell, "gru", _GRU, absent={"hidden_bias": 0.0}, settings=_flax.cell_settings),
    layout(nnx.SimpleCell, "rnn", _INPUT_BIAS, absent={"hidden_bias": "bias"}, settings=_flax.cell_settings),
    layout(nnx.PReLU, "prelu", {"negative_slope": "negative_slope"}),
)
REFUSALS: tuple[Refusal, ...] = ()
