"""The numbers that every framework's test modules hold."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

BATCH, FEATURES, HIDDEN, CLASSES, RATE, MOMENTUM = 5, 3, 4, 2, 0.5, 0.9


def mlp_numbers() -> dict[str, Any]:
    """Makes the kernels (in, out) and biases of a network of two layers."""
    keys = jax.random.split(jax.random.key(11), 4)
    shapes = {"kernel_1": (FEATURES, HIDDEN), "bias_1": (HIDDEN,), "kernel_2": (HIDDEN, CLASSES), "bias_2": (CLASSES,)}
    return {name: jax.random.normal(key, shape) for (name, shape), key in zip(shapes.items(), keys, strict=True)}


def batch() -> Any:
    """Makes inputs of shape (batch, features)."""
    return jax.random.normal(jax.random.key(7), (BATCH, FEATURES))


def mlp(numbers: dict[str, Any], x: Any) -> Any:
    """Computes the network in plain JAX."""
    hidden = jnp.tanh(x @ numbers["kernel_1"] + numbers["bias_1"])  # (batch, hidden)
    return hidden @ numbers["kernel_2"] + numbers["bias_2"]  # (batch, classes)
