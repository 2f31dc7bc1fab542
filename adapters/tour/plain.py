"""The network in plain JAX: functions of parameters. Every other framework is compared with this one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

import crossvjp as cv
from crossvjp.tour.network import DROPOUT, EPSILON, MOMENTUM, Arrays, Layers, cross_entropy


def conv(params: dict[str, Array], x: Array) -> Array:
    """Convolves with stride 2."""
    return lax.conv_general_dilated(x, params["kernel"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def batch_norm(params: dict[str, Array], x: Array, mean: Array, var: Array) -> Array:
    """Normalises by the given statistics, then scales and shifts."""
    return (x - mean) / jnp.sqrt(var + EPSILON) * params["scale"] + params["bias"]


def batch_norm_of_batch(params: dict[str, Array], x: Array) -> tuple[Array, tuple[Array, Array]]:
    """Normalises by the statistics of the batch, and returns them too."""
    mean, var = jnp.mean(x, (0, 1, 2)), jnp.var(x, (0, 1, 2))
    return batch_norm(params, x, mean, var), (mean, var)


def dense(params: dict[str, Array], x: Array) -> Array:
    """Multiplies by the kernel and adds the bias."""
    return x @ params["kernel"] + params["bias"]


def dropout(key: Array, x: Array) -> Array:
    """Sets some features to zero and scales the others up."""
    return jnp.where(jax.random.bernoulli(key, 1 - DROPOUT, x.shape), x / (1 - DROPOUT), 0.0)


def network(
    under: Callable[..., Any], params: Layers, statistics: Layers, images: Array, key: Array | None = None
) -> tuple[Array, Layers]:
    """Computes the logits and the new statistics; without a key it evaluates.

    `under` is `rule.lift`: a layer `fn(params, x)` becomes `under(fn)`, with the same arguments.
    """
    x = under(conv)(params["conv"], images)
    stats = statistics["norm"]
    if key is None:
        x = under(batch_norm)(params["norm"], x, stats["mean"], stats["var"])
    else:
        x, (mean, var) = under(batch_norm_of_batch)(params["norm"], x)
        stats = {name: MOMENTUM * stats[name] + (1 - MOMENTUM) * new for name, new in (("mean", mean), ("var", var))}
    x = jax.nn.gelu(x).reshape(len(x), -1)  # (batch, row * column * channel)
    x = jax.nn.gelu(under(dense)(params["hidden"], x))
    x = x if key is None else dropout(key, x)
    return under(dense)(params["output"], x), {"norm": stats}


class PlainTraining:
    """Training in plain JAX; see `network.Training`. Without a rule, layers run as they are."""

    def __init__(self, rule: cv.Rule | None, optimizer: optax.GradientTransformation, arrays: Arrays):
        under = (lambda fn: fn) if rule is None else rule.lift
        self._arrays = arrays
        self._memory = optimizer.init(arrays.params)

        def loss_fn(
            params: Layers, statistics: Layers, images: Array, labels: Array, key: Array
        ) -> tuple[Array, Layers]:
            logits, statistics = network(under, params, statistics, images, key)
            return cross_entropy(logits, labels), statistics

        @jax.jit
        def step(arrays: Arrays, memory: Any, images: Array, labels: Array, key: Array) -> tuple[Arrays, Any, Array]:
            (loss, statistics), grads = jax.value_and_grad(loss_fn, has_aux=True)(*arrays, images, labels, key)
            updates, memory = optimizer.update(grads, memory, arrays.params)
            params: Any = optax.apply_updates(arrays.params, updates)
            return Arrays(params, statistics), memory, loss

        self._step = step
        self._logits = jax.jit(lambda arrays, images: network(under, arrays.params, arrays.statistics, images)[0])

    def step(self, images: Array, labels: Array, key: Array) -> Array:
        """Trains on one batch; returns its loss."""
        self._arrays, self._memory, loss = self._step(self._arrays, self._memory, images, labels, key)
        return loss

    def logits(self, images: Array) -> Array:
        """Evaluates with the running statistics."""
        return self._logits(self._arrays, images)

    def arrays(self) -> Arrays:
        """Gives the current arrays; the common layout is this file's own."""
        return self._arrays
