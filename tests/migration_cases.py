"""One layer in every framework that has it, with the same function of the same canonical arrays."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from migration_layers import BUILDERS, CALLS, KEY, Built, Evaluated, channels_first, evaluated, random_arrays

from crossvjp.migration import convert


class Case(NamedTuple):
    """How each framework makes the layer, how it is called where it is not `module(x)`, and on which arguments."""

    args: Callable[[], Any]
    makes: Mapping[str, Callable[[Any], Any]]
    calls: Mapping[str, Callable[..., Any]] = MappingProxyType({})


def draw(*shape: int, seed: int = 1) -> Any:
    return np.random.default_rng(seed).normal(size=shape)


def rngs() -> nnx.Rngs:
    return nnx.Rngs(0)


def attended(module: Any, x: Any, y: Any) -> Any:
    return module(x, y, y)


def depthwise(haiku: Any, *sizes: int) -> Case:
    window = (3,) * len(sizes)
    return Case(
        lambda: (draw(2, *sizes, 4),),
        {
            "linen": lambda dtype: nn.Conv(8, window, feature_group_count=4),
            "haiku": lambda dtype: haiku(2, window),
        },
    )


def haiku_conv_transpose(axes: int) -> Any:
    return {1: hk.Conv1DTranspose, 2: hk.Conv2DTranspose}[axes]


def conv(features: int, ins: int, axes: int, size: int, padding: Any = "SAME", **options: Any) -> Case:
    """Makes a convolution; options are Linen's."""
    strides, dilation = options.pop("strides", 1), options.pop("kernel_dilation", 1)
    groups = options.pop("feature_group_count", 1)
    window, grow = (size,) * axes, (dilation,) * axes
    step = (strides,) * axes
    flax: Any = {"strides": step, "kernel_dilation": grow, "feature_group_count": groups, "padding": padding} | options
    return Case(
        lambda: (draw(2, *(7, 6, 5)[:axes], ins),),
        {
            "linen": lambda dtype: nn.Conv(features, window, **flax),
            "nnx": lambda dtype: nnx.Conv(ins, features, window, rngs=rngs(), **flax),
            "haiku": lambda dtype: hk.ConvND(
                axes, features, window, step, grow, padding, feature_group_count=groups, data_format="channels_last"
            ),
            "equinox": lambda dtype: eqx.nn.Conv(
                axes, ins, features, window, step, padding, grow, groups, key=jax.random.key(0)
            ),
        },
        {"equinox": channels_first},
    )


def conv_transpose(axes: int, size: int, strides: int, padding: Any, equinox: Any, turned: bool = False) -> Case:
    """Makes a transposed convolution; `equinox` has its padding and output padding."""
    window, step = (size,) * axes, (strides,) * axes
    ins, features = 3, 4
    pads, extra = equinox
    return Case(
        lambda: (draw(2, *(5, 4)[:axes], ins),),
        {
            "linen": lambda dtype: nn.ConvTranspose(features, window, step, padding, transpose_kernel=turned),
            "nnx": lambda dtype: nnx.ConvTranspose(ins, features, window, step, padding=padding, rngs=rngs()),
            "haiku": lambda dtype: haiku_conv_transpose(axes)(features, size, strides, padding=padding),
            "equinox": lambda dtype: eqx.nn.ConvTranspose(
                axes, ins, features, window, step, pads, extra, key=jax.random.key(0)
            ),
        },
        {"equinox": channels_first},
    )


def lstm(linen: Any, flax: Any) -> Case:
    return Case(
        lambda: (draw(2, 5), draw(2, 3, seed=2), draw(2, 3, seed=3)),
        {
            "linen": lambda dtype: linen(3),
            "nnx": lambda dtype: flax(5, 3, rngs=rngs()),
            "haiku": lambda dtype: hk.LSTM(3),
            "equinox": lambda dtype: eqx.nn.LSTMCell(5, 3, key=KEY),
        },
        {
            "linen": flax_lstm,
            "nnx": flax_lstm,
            "haiku": lambda cell, x, h, c: jnp.concatenate(cell(x, hk.LSTMState(h, c))[1], -1),
            "equinox": lambda cell, x, h, c: jnp.concatenate(jax.vmap(cell)(x, (h, c)), -1),
        },
    )


def flax_lstm(cell: Any, x: Any, h: Any, c: Any) -> Any:
    (new_c, new_h), _ = cell((c, h), x)
    return jnp.concatenate([new_h, new_c], -1)


def flax_cell(cell: Any, x: Any, h: Any) -> Any:
    return cell(h, x)[0]


def heads(use_bias: bool) -> Case:
    many: Any = {"use_query_bias": use_bias, "use_key_bias": use_bias, "use_value_bias": use_bias}
    return Case(
        lambda: (draw(2, 5, 8), draw(2, 4, 8, seed=2)),
        {
            "linen": lambda dtype: nn.MultiHeadAttention(2, qkv_features=6, out_features=7, use_bias=use_bias),
            "nnx": lambda dtype: nnx.MultiHeadAttention(
                2, 8, 6, out_features=7, use_bias=use_bias, decode=False, rngs=rngs(), attention_fn=precise(dtype)
            ),
            "haiku": lambda dtype: hk.MultiHeadAttention(
                2, 3, w_init=hk.initializers.RandomNormal(), model_size=7, with_bias=use_bias
            ),
            "equinox": lambda dtype: eqx.nn.MultiheadAttention(
                2, 8, 8, 8, 7, qk_size=3, vo_size=3, use_output_bias=use_bias, key=KEY, **many
            ),
        },
        dict.fromkeys(("linen", "nnx", "haiku"), attended) | {"equinox": lambda m, x, y: jax.vmap(m)(x, y, y)},
    )


def precise(dtype: Any) -> Any:
    """Gives Linen's attention for float64: NNX's own takes its softmax in float32."""

    def attention(*args: Any, is_causal: bool = False, **kwargs: Any) -> Any:
        assert not is_causal
        return nn.dot_product_attention(*args, **kwargs)

    return attention if dtype == jnp.float64 else nnx.dot_product_attention


def on_flat(module: Any, x: Any) -> Any:
    return module(x.reshape(x.shape[0], -1)).reshape(-1, 2, 3)


def nchw(module: Any, x: Any) -> Any:
    return jnp.moveaxis(module(jnp.moveaxis(x, -1, 1)), 1, -1)


def per_position(module: Any, x: Any) -> Any:
    return jax.vmap(jax.vmap(module))(x)


def rnn(double_bias: bool) -> Case:
    return Case(
        lambda: (draw(2, 5), draw(2, 3, seed=2)),
        {
            "linen": lambda dtype: nn.SimpleCell(3, activation_fn=nn.relu),
            "nnx": lambda dtype: nnx.SimpleCell(5, 3, activation_fn=nnx.relu, dtype=dtype, rngs=rngs()),
            "haiku": lambda dtype: hk.VanillaRNN(3, double_bias=double_bias),
        },
        {"linen": flax_cell, "nnx": flax_cell, "haiku": lambda cell, x, h: cell(x, h)[0]},
    )


def batch_norm(training: bool) -> Case:
    def flax(module: Any, x: Any) -> Any:
        return module(x, use_running_average=not training)

    def equinox(module: Any, state: Any, x: Any) -> Any:
        run = functools.partial(module, inference=not training)
        out, state = jax.vmap(run, (0, None), (0, None), axis_name="batch")(jnp.moveaxis(x, -1, 1), state)
        return jnp.moveaxis(out, 1, -1), state

    return Case(
        IMAGE,
        {
            "linen": lambda dtype: nn.BatchNorm(momentum=0.9),
            "nnx": lambda dtype: nnx.BatchNorm(6, momentum=0.9, rngs=rngs()),
            "haiku": lambda dtype: hk.BatchNorm(True, True, 0.9),
            "equinox": lambda dtype: eqx.nn.BatchNorm(6, "batch", momentum=0.9, mode="batch", dtype=dtype),
        },
        {
            "linen": flax,
            "nnx": flax,
            # While it is initialised it must train: it has no averages yet.
            "haiku": lambda module, x: module(x, is_training=training or hk.running_init()),
            "equinox": equinox,
        },
    )


IMAGE = lambda: (draw(2, 5, 4, 6),)
SEQUENCE = lambda: (draw(2, 5, 6),)
EPS: Any = {"epsilon": 1e-5}

CASES: dict[str, Case] = {
    "linear": Case(
        lambda: (draw(4, 5),),
        {
            "linen": lambda dtype: nn.Dense(3),
            "nnx": lambda dtype: nnx.Linear(5, 3, rngs=rngs()),
            "haiku": lambda dtype: hk.Linear(3),
            "equinox": lambda dtype: eqx.nn.Linear(5, 3, key=KEY),
        },
    ),
    "linear, no bias": Case(
        lambda: (draw(4, 5),),
        {
            "linen": lambda dtype: nn.Dense(3, use_bias=False),
            "nnx": lambda dtype: nnx.Linear(5, 3, use_bias=False, rngs=rngs()),
            "haiku": lambda dtype: hk.Linear(3, with_bias=False),
            "equinox": lambda dtype: eqx.nn.Linear(5, 3, use_bias=False, key=KEY),
        },
    ),
    "linear over several axes": Case(
        lambda: (draw(4, 5, 2),),
        {
            "linen": lambda dtype: nn.DenseGeneral((2, 3), axis=(-2, -1)),
            "nnx": lambda dtype: nnx.LinearGeneral((5, 2), (2, 3), axis=(-2, -1), rngs=rngs()),
            "haiku": lambda dtype: hk.Linear(6),
            "equinox": lambda dtype: eqx.nn.Linear(10, 6, key=KEY),
        },
        {"haiku": on_flat, "equinox": lambda module, x: on_flat(jax.vmap(module), x)},
    ),
    "linear with a batch axis": Case(
        lambda: (draw(4, 5, 2),),
        {
            "linen": lambda dtype: nn.DenseGeneral(3, batch_dims=(0,)),
            "nnx": lambda dtype: nnx.LinearGeneral(2, 3, batch_axis={0: 4}, rngs=rngs()),
        },
    ),
    "einsum": Case(
        SEQUENCE,
        {
            "linen": lambda dtype: nn.Einsum((6, 2, 3), "bti,ijk->btjk", use_bias=True),
            "nnx": lambda dtype: nnx.Einsum("bti,ijk->btjk", (6, 2, 3), (2, 3), rngs=rngs()),
        },
    ),
    "conv, 1 axis": conv(3, 4, 1, 3),
    "conv, 1 axis, causal": Case(
        SEQUENCE,
        {
            "linen": lambda dtype: nn.Conv(3, (3,), padding="CAUSAL"),
            "nnx": lambda dtype: nnx.Conv(6, 3, (3,), padding="CAUSAL", rngs=rngs()),
            "haiku": lambda dtype: hk.Conv1D(3, 3, padding=hk.pad.causal),
            "equinox": lambda dtype: eqx.nn.Conv1d(6, 3, 3, padding=((2, 0),), key=KEY),
        },
        {"equinox": channels_first},
    ),
    "conv, 2 axes, strided, dilated, grouped": conv(
        4, 6, 2, 2, strides=2, kernel_dilation=2, feature_group_count=2, padding="VALID"
    ),
    "conv, 2 axes, strided, same": conv(3, 4, 2, 4, strides=2),
    "conv, 3 axes, explicit padding": conv(3, 2, 3, 2, padding=((1, 0), (0, 1), (2, 1))),
    "conv, depthwise": Case(
        IMAGE,
        {
            "linen": lambda dtype: nn.Conv(12, (3, 3), feature_group_count=6),
            "nnx": lambda dtype: nnx.Conv(6, 12, (3, 3), feature_group_count=6, rngs=rngs()),
            "haiku": lambda dtype: hk.DepthwiseConv2D(2, 3),
            "equinox": lambda dtype: eqx.nn.Conv2d(6, 12, 3, padding=1, groups=6, key=KEY),
        },
        {"equinox": channels_first},
    ),
    "conv, depthwise, 1 axis": depthwise(hk.DepthwiseConv1D, 5),
    "conv, depthwise, 3 axes": depthwise(hk.DepthwiseConv3D, 4, 3, 2),
    "conv, channels first in Haiku": Case(
        IMAGE,
        {
            "linen": lambda dtype: nn.Conv(3, (3, 3)),
            "haiku": lambda dtype: hk.Conv2D(3, 3, data_format="NCHW"),
            "equinox": lambda dtype: eqx.nn.Conv2d(6, 3, 3, padding="SAME", key=KEY),
        },
        {"haiku": nchw, "equinox": channels_first},
    ),
    "conv_transpose, same": conv_transpose(1, 4, 2, "SAME", ("SAME", 0)),
    "conv_transpose, valid, turned kernel": conv_transpose(2, 2, 3, "VALID", ("VALID", 1), turned=True),
    "conv_transpose, explicit padding": conv_transpose(1, 3, 2, ((1, 2),), (((1, 0),), 0), turned=True),
    "layer_norm": Case(
        SEQUENCE,
        {
            "linen": lambda dtype: nn.LayerNorm(**EPS),
            "nnx": lambda dtype: nnx.LayerNorm(6, rngs=rngs(), **EPS),
            "haiku": lambda dtype: hk.LayerNorm(-1, True, True),
            "equinox": lambda dtype: eqx.nn.LayerNorm(6),
        },
        {"equinox": per_position},
    ),
    "layer_norm over two axes": Case(
        SEQUENCE,
        {
            "linen": lambda dtype: nn.LayerNorm(reduction_axes=(-2, -1), feature_axes=(-2, -1), **EPS),
            "haiku": lambda dtype: hk.LayerNorm((-2, -1), True, True, param_axis=(-2, -1)),
            "equinox": lambda dtype: eqx.nn.LayerNorm((5, 6)),
        },
    ),
    "rms_norm": Case(
        SEQUENCE,
        {
            "linen": lambda dtype: nn.RMSNorm(**EPS),
            "nnx": lambda dtype: nnx.RMSNorm(6, rngs=rngs(), **EPS),
            "haiku": lambda dtype: hk.RMSNorm(-1),
            "equinox": lambda dtype: eqx.nn.RMSNorm(6, use_bias=False),
        },
        {"equinox": per_position},
    ),
    "group_norm": Case(
        IMAGE,
        {
            "linen": lambda dtype: nn.GroupNorm(3, **EPS),
            "nnx": lambda dtype: nnx.GroupNorm(6, None, 2, rngs=rngs(), **EPS),
            "haiku": lambda dtype: hk.GroupNorm(3, data_format="channels_first"),
            "equinox": lambda dtype: eqx.nn.GroupNorm(3, 6),
        },
        {"haiku": nchw, "equinox": channels_first},
    ),
    "instance_norm": Case(
        IMAGE,
        {
            "linen": lambda dtype: nn.InstanceNorm(**EPS),
            "nnx": lambda dtype: nnx.InstanceNorm(6, rngs=rngs(), **EPS),
            "haiku": lambda dtype: hk.InstanceNorm(True, True, data_format="NC..."),
            "equinox": lambda dtype: eqx.nn.GroupNorm(6, 6),
        },
        {"haiku": nchw, "equinox": channels_first},
    ),
    "batch_norm": batch_norm(training=False),
    "batch_norm, training": batch_norm(training=True),
    "embedding": Case(
        lambda: (np.array([[0, 3, 3], [1, 6, 0]]),),
        {
            "linen": lambda dtype: nn.Embed(7, 3),
            "nnx": lambda dtype: nnx.Embed(7, 3, param_dtype=dtype, rngs=rngs()),
            "haiku": lambda dtype: hk.Embed(7, 3),
            "equinox": lambda dtype: eqx.nn.Embedding(7, 3, key=KEY),
        },
        {"equinox": per_position},
    ),
    "attention": heads(True),
    "attention, no bias": heads(False),
    "attention with normalised queries": Case(
        lambda: (draw(2, 5, 8), draw(2, 4, 8, seed=2)),
        {
            "linen": lambda dtype: nn.MultiHeadAttention(2, normalize_qk=True),
            "nnx": lambda dtype: nnx.MultiHeadAttention(
                2, 8, 8, normalize_qk=True, decode=False, rngs=rngs(), attention_fn=precise(dtype)
            ),
        },
        {"linen": attended, "nnx": attended},
    ),
    "lstm": lstm(nn.LSTMCell, nnx.LSTMCell),
    "lstm, optimized": lstm(nn.OptimizedLSTMCell, nnx.OptimizedLSTMCell),
    "gru": Case(
        lambda: (draw(2, 5), draw(2, 3, seed=2)),
        {
            "linen": lambda dtype: nn.GRUCell(3),
            "equinox": lambda dtype: eqx.nn.GRUCell(5, 3, key=KEY),
        },
        {"linen": flax_cell},
    ),
    "gru from NNX, which lacks a bias": Case(
        lambda: (draw(2, 5), draw(2, 3, seed=2)),
        {
            "nnx": lambda dtype: nnx.GRUCell(5, 3, rngs=rngs()),
            "linen": lambda dtype: nn.GRUCell(3),
            "equinox": lambda dtype: eqx.nn.GRUCell(5, 3, key=KEY),
        },
        {"linen": flax_cell, "nnx": flax_cell},
    ),
    "rnn": rnn(double_bias=False),
    "rnn with two biases in Haiku": rnn(double_bias=True),
    "prelu": Case(
        lambda: (draw(2, 5),),
        {
            "linen": lambda dtype: nn.PReLU(),
            "nnx": lambda dtype: nnx.PReLU(param_dtype=dtype),
            "equinox": lambda dtype: eqx.nn.PReLU(),
        },
    ),
}


@functools.cache
def built(name: str, framework: str, dtype: str) -> Built:
    """Builds a case's layer in one framework, on shapes alone."""
    case = CASES[name]
    make = functools.partial(case.makes[framework], jnp.dtype(dtype))
    call = case.calls.get(framework, CALLS[framework])
    return BUILDERS[framework](make() if framework == "linen" else make, call, arguments(name, dtype))


def arguments(name: str, dtype: str) -> Any:
    """Makes a case's arguments as JAX arrays, which Linen's and Haiku's layers do not always make themselves."""
    return tuple(jnp.asarray(arg, dtype if arg.dtype.kind == "f" else None) for arg in CASES[name].args())


@functools.cache
def at_work(name: str, framework: str, dtype: str) -> Evaluated:
    """Runs a case's layer in one framework, at the arrays of the case's first framework, converted."""
    first, layer = built(name, next(iter(CASES[name].makes)), dtype), built(name, framework, dtype)
    params = random_arrays(first.layer.params, dtype)
    state = {path: np.abs(array) + 0.3 for path, array in random_arrays(first.layer.state, dtype, 1).items()}
    moved = convert(first.layer, first.layout, params, state, layer.layer, layer.layout)
    return evaluated(layer, moved.params, moved.state, arguments(name, dtype))


DIRECTIONS = [
    (name, source, target)
    for name, case in CASES.items()
    for source in case.makes
    for target in case.makes
    if source != target
]
