"""The network in Flax Linen: `rule(nn.Dense(...))(x)` inside a compact method."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import optax
from flax.training.train_state import TrainState
from jax import Array

import crossvjp as cv
from crossvjp.tour.network import (
    CHANNELS,
    CLASSES,
    DROPOUT,
    EPSILON,
    HIDDEN,
    MOMENTUM,
    Arrays,
    Layers,
    cross_entropy,
)


class Network(nn.Module):
    """The tour's network; with a key it trains, without one it evaluates."""

    rule: cv.Rule

    @nn.compact
    def __call__(self, images: Array, key: Array | None = None) -> Array:
        """Computes the logits."""
        rule, evaluating = self.rule, key is None
        x = rule(nn.Conv(CHANNELS, (3, 3), strides=2, use_bias=False, name="conv"))(images)
        x = rule(nn.BatchNorm(evaluating, momentum=MOMENTUM, epsilon=EPSILON, name="norm"))(x)
        x = nn.gelu(x).reshape(len(x), -1)  # (batch, row * column * channel)
        x = nn.gelu(rule(nn.Dense(HIDDEN, name="hidden"))(x))
        x = nn.Dropout(DROPOUT, deterministic=evaluating)(x, rng=key)
        return rule(nn.Dense(CLASSES, name="output"))(x)


class _State(TrainState):
    """Flax's training state with the collection that batch normalisation needs."""

    batch_stats: Any


class LinenTraining:
    """Training in Flax Linen; see `network.Training`."""

    def __init__(self, rule: cv.Rule, optimizer: optax.GradientTransformation, arrays: Arrays):
        model = Network(rule)
        # The common layout is Linen's own, so the arrays can stand for those of `model.init`.
        self._state = _State.create(
            apply_fn=model.apply, params=arrays.params, tx=optimizer, batch_stats=arrays.statistics
        )

        @jax.jit
        def step(state: _State, images: Array, labels: Array, key: Array) -> tuple[_State, Array]:
            def loss_fn(params: Layers) -> tuple[Array, Any]:
                variables = {"params": params, "batch_stats": state.batch_stats}
                logits, updates = model.apply(variables, images, key, mutable=["batch_stats"])
                return cross_entropy(logits, labels), updates["batch_stats"]

            (loss, batch_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
            return state.apply_gradients(grads=grads, batch_stats=batch_stats), loss

        @jax.jit
        def logits(state: _State, images: Array) -> Any:
            return model.apply({"params": state.params, "batch_stats": state.batch_stats}, images)

        self._step, self._logits = step, logits

    def step(self, images: Array, labels: Array, key: Array) -> Array:
        """Trains on one batch; returns its loss."""
        self._state, loss = self._step(self._state, images, labels, key)
        return loss

    def logits(self, images: Array) -> Array:
        """Evaluates with the running averages."""
        return self._logits(self._state, images)

    def arrays(self) -> Arrays:
        """Gives the current arrays."""
        return Arrays(self._state.params, self._state.batch_stats)
