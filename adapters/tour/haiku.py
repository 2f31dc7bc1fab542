"""The network in Haiku: `rule(hk.Linear(...))(x)` inside a transform."""

from __future__ import annotations

from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import optax
from jax import Array

import crossvjp as cv
from crossvjp.tour.network import (
    CHANNELS,
    CLASSES,
    DROPOUT,
    EPSILON,
    HIDDEN,
    MOMENTUM,
    PAST_DEBIASING,
    Arrays,
    cross_entropy,
)


def network(rule: cv.Rule, images: Array, key: Array | None = None) -> Array:
    """Computes the logits; with a key it trains, without one it evaluates."""
    x = rule(hk.Conv2D(CHANNELS, 3, stride=2, with_bias=False, name="conv"))(images)
    norm = hk.BatchNorm(create_scale=True, create_offset=True, decay_rate=MOMENTUM, eps=EPSILON, name="norm")
    x = jax.nn.gelu(rule(norm)(x, is_training=key is not None))
    x = hk.Flatten()(x)  # (batch, row * column * channel)
    x = jax.nn.gelu(rule(hk.Linear(HIDDEN, name="hidden"))(x))
    x = x if key is None else hk.dropout(key, DROPOUT, x)
    return rule(hk.Linear(CLASSES, name="output"))(x)


class HaikuTraining:
    """Training in Haiku; see `network.Training`."""

    def __init__(self, rule: cv.Rule, optimizer: optax.GradientTransformation, arrays: Arrays):
        model = hk.transform_with_state(lambda images, key=None: network(rule, images, key))
        self._params, self._state = _to_haiku(arrays)
        self._memory = optimizer.init(self._params)

        def loss_fn(params: Any, state: Any, images: Array, labels: Array, key: Array) -> tuple[Array, Any]:
            logits, state = model.apply(params, state, None, images, key)
            return cross_entropy(logits, labels), state

        @jax.jit
        def step(params: Any, state: Any, memory: Any, images: Array, labels: Array, key: Array) -> tuple[Any, ...]:
            (loss, state), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, state, images, labels, key)
            updates, memory = optimizer.update(grads, memory, params)
            return optax.apply_updates(params, updates), state, memory, loss

        self._step = step
        self._logits = jax.jit(lambda params, state, images: model.apply(params, state, None, images)[0])

    def step(self, images: Array, labels: Array, key: Array) -> Array:
        """Trains on one batch; returns its loss."""
        self._params, self._state, self._memory, loss = self._step(
            self._params, self._state, self._memory, images, labels, key
        )
        return loss

    def logits(self, images: Array) -> Array:
        """Evaluates with the moving averages."""
        return self._logits(self._params, self._state, images)

    def arrays(self) -> Arrays:
        """Gives the current arrays."""
        params, state = self._params, self._state
        common = {
            "conv": {"kernel": params["conv"]["w"]},
            "norm": {"scale": params["norm"]["scale"].ravel(), "bias": params["norm"]["offset"].ravel()},
            "hidden": {"kernel": params["hidden"]["w"], "bias": params["hidden"]["b"]},
            "output": {"kernel": params["output"]["w"], "bias": params["output"]["b"]},
        }
        means = {name: state[f"norm/~/{name}_ema"]["average"].ravel() for name in ("mean", "var")}
        return Arrays(common, {"norm": means})


def _to_haiku(arrays: Arrays) -> tuple[Any, Any]:
    """Renames the arrays; Haiku's batch normalisation keeps its own with all axes, `(1, 1, 1, channel)`."""
    common, keep_axes = arrays.params, lambda array: array.reshape(1, 1, 1, -1)
    params = {
        "conv": {"w": common["conv"]["kernel"]},
        "norm": {"scale": keep_axes(common["norm"]["scale"]), "offset": keep_axes(common["norm"]["bias"])},
        "hidden": {"w": common["hidden"]["kernel"], "b": common["hidden"]["bias"]},
        "output": {"w": common["output"]["kernel"], "b": common["output"]["bias"]},
    }
    state = {
        f"norm/~/{name}_ema": {
            "counter": jnp.array(PAST_DEBIASING, jnp.int32),
            "hidden": keep_axes(value),
            "average": keep_axes(value),
        }
        for name, value in arrays.statistics["norm"].items()
    }
    return params, state
