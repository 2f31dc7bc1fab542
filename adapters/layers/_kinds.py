"""What the tables of several frameworks share: the canonical arrays, which are Linen's, and settings by their names.

| kind | canonical arrays |
|---|---|
| linear | kernel (in, out), bias (out) |
| conv, conv_transpose | kernel (spatial.., in / groups, out), bias (out) |
| layer_norm, rms_norm, group_norm, batch_norm | scale, bias (features) |
| embedding | embedding (vocabulary, features) |
| attention | {query, key, value}_kernel (in, heads, size), _bias (heads, size); out_kernel (heads, size, out), _bias |
| lstm | input_kernel (in, 4 h), hidden_kernel (h, 4 h), bias (4 h); gates i, f, g, o |
| gru | input_kernel (in, 3 h), hidden_kernel (h, 3 h), bias (3 h), hidden_bias (h); gates r, z, n |
| rnn | input_kernel (in, h), hidden_kernel (h, h), bias (h), hidden_bias (h) |
| prelu | negative_slope |

The state of batch_norm is mean and var; where they are kept undivided by 1 - momentum^count, also hidden_mean,
hidden_var, mean_count and var_count.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from crossvjp.migration import Canonical, Layer, Layout, Move, Piece, Reshape


def rename(own: str, canonical: str, *pieces: Piece) -> Move:
    """Moves one array that lies directly in the layer."""
    return Move([(own,)], [canonical], pieces)


def shape_of(layer: Layer, *path: str) -> tuple[int, ...]:
    """Gives the shape of a parameter, or `()` where the layer has none at this path."""
    return tuple(layer.params[path].shape) if path in layer.params else ()


def flatten(layer: Layer, own: str, canonical: str) -> Move:
    """Moves an array of one entry a feature that may be kept with axes of size one."""
    shape = shape_of(layer, own)
    return rename(own, canonical, Reshape(shape, (math.prod(shape),)))


def name_of(function: Any) -> str:
    """Names an activation function."""
    return getattr(function, "__name__", repr(function))


def stating_dtype(*layouts: Layout) -> tuple[Layout, ...]:
    """Adds what the layers compute in to their settings: a dtype that the module names, or that of what it is given."""
    return tuple(dataclasses.replace(layout, settings=_with_dtype(layout.settings)) for layout in layouts)


def _with_dtype(settings: Callable[[Any], Mapping[str, Any]]) -> Callable[[Any], Mapping[str, Any]]:
    return lambda module: {**settings(module), "dtype": _dtype}


def _dtype(layer: Layer) -> str:
    dtype = getattr(layer.module, "dtype", None)
    own = {jnp.dtype(kind.dtype) for kind in layer.params.values()}
    return "inferred" if dtype is None or {jnp.dtype(dtype)} == own else jnp.dtype(dtype).name


def long_count(momentum: float) -> int:
    """Gives a number of updates after which no bit of 1 - momentum^count differs from 1."""
    steps = 10**6 if momentum < 0.9999 else math.ceil(-60 * math.log(2) / math.log(min(momentum, 1 - 1e-9)))
    return min(max(steps, 10**6), 2**31 - 1)


def statistics(canonical: Canonical, name: str, momentum: float) -> tuple[Any, Any]:
    """Gives the running sum and the number of updates for one statistic, "mean" or "var".

    A running average that has no sum, because its framework keeps none or has not updated it yet, is its own sum after
    so many updates that the division by 1 - momentum^count does nothing.
    """
    average = canonical[name]
    hidden, count = canonical.get(f"hidden_{name}"), canonical.get(f"{name}_count")
    if hidden is None or count is None:
        return average, jnp.asarray(long_count(momentum), jnp.int32)
    set_aside = (count == 0) & jnp.any(hidden != average)
    return jnp.where(set_aside, average, hidden), jnp.where(set_aside, long_count(momentum), count)
