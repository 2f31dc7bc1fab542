"""Plain JAX: parameters are a list of dicts, one a layer. `jax.custom_vjp` by hand is the framework's own."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.cases import DROPOUT, MOMENTUM, WIDTH, Case, Layer, Variant, by_hand, chain, lifted


def case(layer: Layer, variant: Variant, depth: int) -> Case:
    """Builds the model of `depth` layers under one variant of the rule."""
    layer_fn = _dense if layer == "dense" else _block
    call = by_hand(layer_fn) if variant == "by hand" else lifted(layer_fn, variant)
    params = [_init(layer, jax.random.key(index)) for index in range(depth)]
    rests = [None if layer == "dense" else _state() for _ in range(depth)]
    return Case(lambda params, rests, x: chain([call] * depth, params, rests, x), params, rests)


def _init(layer: Layer, key: jax.Array) -> dict[str, jax.Array]:
    dense = {"kernel": jax.random.normal(key, (WIDTH, WIDTH)) / WIDTH**0.5, "bias": jnp.zeros(WIDTH)}
    return dense if layer == "dense" else {**dense, "scale": jnp.ones(WIDTH), "shift": jnp.zeros(WIDTH)}


def _state() -> dict[str, jax.Array]:
    return {"mean": jnp.zeros((1, WIDTH)), "var": jnp.ones((1, WIDTH)), "key": jax.random.key(1)}


def _dense(params: Any, rest: Any, x: jax.Array) -> tuple[jax.Array, Any]:
    return x @ params["kernel"] + params["bias"][None], rest


def _block(params: Any, rest: Any, x: jax.Array) -> tuple[jax.Array, Any]:
    y, _ = _dense(params, None, x)
    mean, var = jnp.mean(y, axis=0, keepdims=True), jnp.var(y, axis=0, keepdims=True)
    y = (y - mean) * jax.lax.rsqrt(var + 1e-5) * params["scale"][None] + params["shift"][None]
    dropout_key, next_key = jax.random.split(rest["key"])
    kept = jax.random.bernoulli(dropout_key, 1 - DROPOUT, y.shape)
    y = jnp.where(kept, y / (1 - DROPOUT), 0)
    return y, {"mean": _moved(rest["mean"], mean), "var": _moved(rest["var"], var), "key": next_key}


def _moved(average: jax.Array, value: jax.Array) -> jax.Array:
    return MOMENTUM * average + (1 - MOMENTUM) * value
