"""Layers of Equinox."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp

from crossvjp.migration import (
    Canonical,
    Layer,
    Layout,
    Move,
    Refusal,
    Reshape,
    StateMove,
    Transpose,
    held,
    layout,
    padding_of,
    transposed_padding_of,
)

from ._kinds import flatten, rename, shape_of, stating_dtype, statistics

_SWAP = Transpose((1, 0))


def _linear(layer: Layer) -> Sequence[Move]:
    return held(layer, [rename("weight", "kernel", _SWAP), rename("bias", "bias")])


def _conv(layer: Layer) -> Sequence[Move]:
    axes = len(shape_of(layer, "weight"))
    last = Transpose((*range(2, axes), 1, 0))
    return held(layer, [rename("weight", "kernel", last), flatten(layer, "bias", "bias")])


def _attention(layer: Layer) -> Sequence[Move]:
    heads, moves = layer.module.num_heads, []
    for part in ("query", "key", "value"):
        outs, ins = shape_of(layer, f"{part}_proj", "weight")
        split = Reshape((ins, outs), (ins, heads, outs // heads))
        moves.append(Move([(f"{part}_proj", "weight")], [f"{part}_kernel"], [_SWAP, split]))
        by_heads = Reshape((outs,), (heads, outs // heads))
        moves.append(Move([(f"{part}_proj", "bias")], [f"{part}_bias"], [by_heads]))
    outs, ins = shape_of(layer, "output_proj", "weight")
    split = Reshape((ins, outs), (heads, ins // heads, outs))
    moves.append(Move([("output_proj", "weight")], ["out_kernel"], [_SWAP, split]))
    moves.append(Move([("output_proj", "bias")], ["out_bias"]))
    return held(layer, moves)


def _cell(layer: Layer) -> Sequence[Move]:
    moves = [
        rename("weight_ih", "input_kernel", _SWAP),
        rename("weight_hh", "hidden_kernel", _SWAP),
        rename("bias", "bias"),
        rename("bias_n", "hidden_bias"),
    ]
    return held(layer, moves)


def _to_canonical(layer: Layer, own: Any) -> Canonical:
    named = {path[path.index("batch_counter") if "batch_counter" in path else -1]: array for path, array in own.items()}
    count, momentum = named["batch_counter"], layer.module.momentum
    canonical: Canonical = {"mean_count": count, "var_count": count}
    for place, name in enumerate(("mean", "var")):
        hidden = named[str(place)]
        # As the layer itself divides when it does not train.
        scale = jnp.where(count == 0, 1, 1 - jnp.asarray(momentum, hidden.dtype) ** count)
        canonical[f"hidden_{name}"], canonical[name] = hidden, hidden / scale.astype(hidden.dtype)
    return canonical


def _from_canonical(layer: Layer, canonical: Canonical) -> Any:
    own = {}
    for path, kind in layer.state.items():
        name = ("mean", "var")[int(path[-1])] if path[-1].isdigit() else "mean"
        hidden, count = statistics(canonical, name, layer.module.momentum)
        own[path] = hidden if path[-1].isdigit() else jnp.asarray(count, kind.dtype)
    return own


def _ema_to_canonical(layer: Layer, own: Any) -> Canonical:
    return {"/".join(path): array for path, array in own.items()}


def _ema_from_canonical(layer: Layer, canonical: Canonical) -> Any:
    return {path: canonical["/".join(path)] for path in layer.state}


def _conv_settings(module: eqx.nn.Conv) -> dict[str, Any]:
    padding = padding_of(module.padding, module.kernel_size, module.stride, module.dilation)
    return {
        "strides": tuple(module.stride),
        "dilation": tuple(module.dilation),
        "input_dilation": (1,) * module.num_spatial_dims,
        "padding": padding if module.padding_mode == "ZEROS" else (padding, module.padding_mode),
        "groups": module.groups,
        "use_bias": module.use_bias,
        "masked": False,
    }


def _transposed_settings(module: eqx.nn.ConvTranspose) -> dict[str, Any]:
    padding = _transposed_padding(module)
    return {
        "strides": tuple(module.stride),
        "dilation": tuple(module.dilation),
        "padding": padding if module.padding_mode == "ZEROS" else (padding, module.padding_mode),
        "groups": module.groups,
        "use_bias": module.use_bias,
        "masked": False,
    }


def _transposed_padding(module: eqx.nn.ConvTranspose) -> Any:
    """Gives the padding of the dilated input; Equinox's pads are those of the convolution that is transposed."""
    sizes = (module.kernel_size, module.stride, module.dilation)
    if module.padding == "SAME":
        return transposed_padding_of("SAME", *sizes)
    if module.padding == "SAME_LOWER":
        return "SAME_LOWER"
    pads: Any = module.padding if module.padding != "VALID" else ((0, 0),) * module.num_spatial_dims
    spans = [rate * (size - 1) for size, rate in zip(module.kernel_size, module.dilation, strict=True)]
    return tuple(
        (span - before, span - after + extra)
        for span, (before, after), extra in zip(spans, pads, module.output_padding, strict=True)
    )


def _norm_settings(module: Any) -> dict[str, Any]:
    return {
        "epsilon": module.eps,
        "use_scale": module.use_weight,
        "use_bias": module.use_bias,
        "use_fast_variance": False,
        "axes": tuple(range(-len(module.shape), 0)),
    }


def _group_settings(module: eqx.nn.GroupNorm) -> dict[str, Any]:
    affine = module.channelwise_affine
    settings = {"epsilon": module.eps, "use_scale": affine, "use_bias": affine, "use_fast_variance": False}
    return settings | {"groups": module.groups}


def _batch_settings(module: eqx.nn.BatchNorm) -> dict[str, Any]:
    affine = module.channelwise_affine
    settings = {"epsilon": module.eps, "use_scale": affine, "use_bias": affine, "use_fast_variance": False}
    return settings | {"momentum": module.momentum}


def _attention_settings(module: eqx.nn.MultiheadAttention) -> dict[str, Any]:
    biases = {module.use_query_bias, module.use_key_bias, module.use_value_bias, module.use_output_bias}
    return {
        "num_heads": module.num_heads,
        "use_bias": biases.pop() if len(biases) == 1 else "some",
        "normalize_qk": False,
        "dropout_rate": float(module.dropout.p),
    }


_AFFINE = {"weight": "scale", "bias": "bias"}
_GATED = {"gate": "sigmoid", "activation": "tanh"}
_RUNNING = StateMove(_to_canonical, _from_canonical)
_EMA = StateMove(_ema_to_canonical, _ema_from_canonical)

LAYOUTS: tuple[Layout, ...] = stating_dtype(
    layout(eqx.nn.Linear, "linear", _linear, settings={"use_bias": "use_bias"}),
    layout(eqx.nn.Conv, "conv", _conv, settings=_conv_settings),
    layout(eqx.nn.ConvTranspose, "conv_transpose", _conv, settings=_transposed_settings),
    layout(eqx.nn.LayerNorm, "layer_norm", _AFFINE, settings=_norm_settings),
    layout(eqx.nn.RMSNorm, "rms_norm", _AFFINE, absent={"bias": 0.0}, settings=_norm_settings),
    layout(eqx.nn.GroupNorm, "group_norm", _AFFINE, settings=_group_settings),
    layout(
        eqx.nn.BatchNorm,
        "batch_norm",
        _AFFINE,
        state=_RUNNING,
        settings=_batch_settings,
        when=lambda module: module.mode == "batch",
    ),
    layout(eqx.nn.BatchNorm, "batch_norm_ema", _AFFINE, state=_EMA, settings=_batch_settings),
    layout(eqx.nn.Embedding, "embedding", {"weight": "embedding"}),
    layout(eqx.nn.MultiheadAttention, "attention", _attention, settings=_attention_settings),
    layout(eqx.nn.LSTMCell, "lstm", _cell, absent={"bias": 0.0}, settings=lambda module: _GATED),
    layout(eqx.nn.GRUCell, "gru", _cell, absent={"bias": 0.0, "hidden_bias": 0.0}, settings=lambda module: _GATED),
    layout(eqx.nn.PReLU, "prelu", {"negative_slope": "negative_slope"}),
)
REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        ("batch_norm", "batch_norm_ema"),
        "Equinox's BatchNorm in the mode 'ema' normalises by its running statistics while it trains, and the other "
        "by those of the batch. Make it with mode='batch'",
    ),
)
