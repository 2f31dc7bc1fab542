"""Plain JAX: parameters are a list of dicts, one a layer. `jax.custom_vjp` by hand is the framework's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.cases import (
    CHANNELS,
    DROPOUT,
    EPSILON,
    FEATURES,
    HEADS,
    MOMENTUM,
    WIDTH,
    Case,
    Layer,
    Variant,
    by_hand,
    lifted,
    stack,
)


def case(layer: Layer, variant: Variant, depth: int) -> Case:
    """Builds the model of `depth` layers under one variant of the rule."""
    layer_fn, init = LAYERS[layer]
    call = by_hand(layer_fn) if variant == "by hand" else lifted(layer_fn, variant)
    params, rests = zip(*(init(jax.random.key(index)) for index in range(depth)), strict=True)
    return stack(layer, [call] * depth, list(params), list(rests))


def _init_dense(key: jax.Array) -> tuple[Any, Any]:
    return _some_dense(key, WIDTH, WIDTH), None


def _init_block(key: jax.Array) -> tuple[Any, Any]:
    norm, stats = _some_norm(WIDTH), _some_stats(WIDTH)
    return {"dense": _some_dense(key, WIDTH, WIDTH), "norm": norm}, {"norm": stats, "key": jax.random.key(1)}


def _init_transformer(key: jax.Array) -> tuple[Any, Any]:
    sizes = {"qkv": (FEATURES, 3 * FEATURES), "out": (FEATURES, FEATURES)}
    sizes |= {"wide": (FEATURES, 4 * FEATURES), "narrow": (4 * FEATURES, FEATURES)}
    params = {name: _some_dense(key, *size) for name, size in sizes.items()}
    return params | {name: _some_norm(FEATURES) for name in ("norm1", "norm2")}, {"key": jax.random.key(1)}


def _init_residual(key: jax.Array) -> tuple[Any, Any]:
    kernel = jax.random.normal(key, (3, 3, CHANNELS, CHANNELS)) / (9 * CHANNELS) ** 0.5
    conv = {"kernel": kernel, "bias": jnp.zeros(CHANNELS)}
    params = {"conv1": conv, "conv2": conv, "norm1": _some_norm(CHANNELS), "norm2": _some_norm(CHANNELS)}
    return params, {"norm1": _some_stats(CHANNELS), "norm2": _some_stats(CHANNELS)}


def _some_dense(key: jax.Array, rows: int, columns: int) -> dict[str, jax.Array]:
    return {"kernel": jax.random.normal(key, (rows, columns)) / rows**0.5, "bias": jnp.zeros(columns)}


def _some_norm(width: int) -> dict[str, jax.Array]:
    return {"scale": jnp.ones(width), "shift": jnp.zeros(width)}


def _some_stats(width: int) -> dict[str, jax.Array]:
    return {"mean": jnp.zeros(width), "var": jnp.ones(width)}


def _dense(params: Any, rest: Any, x: jax.Array) -> tuple[jax.Array, Any]:
    return x @ params["kernel"] + params["bias"], rest


def _block(params: Any, rest: Any, x: jax.Array) -> tuple[jax.Array, Any]:
    y, _ = _dense(params["dense"], None, x)
    y, stats = _batch_norm(params["norm"], rest["norm"], y)
    dropout_key, next_key = jax.random.split(rest["key"])
    return _dropped(dropout_key, y), {"norm": stats, "key": next_key}


def _transformer(params: Any, rest: Any, x: jax.Array) -> tuple[jax.Array, Any]:
    *dropout_keys, next_key = jax.random.split(rest["key"], 3)
    x = x + _dropped(dropout_keys[0], _attention(params, _layer_norm(params["norm1"], x)))
    y, _ = _dense(params["wide"], None, _layer_norm(params["norm2"], x))
    y, _ = _dense(params["narrow"], None, jax.nn.gelu(y))
    return x + _dropped(dropout_keys[1], y), {"key": next_key}


def _residual(params: Any, rest: Any, x: jax.Array) -> tuple[jax.Array, Any]:
    y, stats1 = _batch_norm(params["norm1"], rest["norm1"], _conv(params["conv1"], x))
    y, stats2 = _batch_norm(params["norm2"], rest["norm2"], _conv(params["conv2"], jax.nn.relu(y)))
    return jax.nn.relu(x + y), {"norm1": stats1, "norm2": stats2}


LAYERS: dict[Layer, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "dense": (_dense, _init_dense),
    "block": (_block, _init_block),
    "transformer": (_transformer, _init_transformer),
    "residual": (_residual, _init_residual),
}


def _attention(params: Any, x: jax.Array) -> jax.Array:
    y, _ = _dense(params["qkv"], None, x)
    q, k, v = (
        part.reshape(*x.shape[:2], HEADS, -1) for part in jnp.split(y, 3, -1)
    )  # (batch, length, heads, features)
    y, _ = _dense(params["out"], None, jax.nn.dot_product_attention(q, k, v).reshape(x.shape))
    return y


def _conv(params: Any, x: jax.Array) -> jax.Array:
    y = jax.lax.conv_general_dilated(x, params["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return y + params["bias"]


def _layer_norm(params: Any, x: jax.Array) -> jax.Array:
    mean, var = jnp.mean(x, -1, keepdims=True), jnp.var(x, -1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(var + EPSILON) * params["scale"] + params["shift"]


def _batch_norm(params: Any, stats: Any, x: jax.Array) -> tuple[jax.Array, Any]:
    axes = tuple(range(x.ndim - 1))
    mean, var = jnp.mean(x, axes), jnp.var(x, axes)
    y = (x - mean) * jax.lax.rsqrt(var + EPSILON) * params["scale"] + params["shift"]
    return y, {"mean": _moved(stats["mean"], mean), "var": _moved(stats["var"], var)}


def _dropped(key: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.where(jax.random.bernoulli(key, 1 - DROPOUT, x.shape), x / (1 - DROPOUT), 0)


def _moved(average: jax.Array, value: jax.Array) -> jax.Array:
    return MOMENTUM * average + (1 - MOMENTUM) * value
