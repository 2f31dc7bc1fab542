"""The network in Flax NNX: `rule(self.dense)(x)`, where the module holds the layer."""

from __future__ import annotations

import optax
from flax import nnx
from jax import Array

import crossvjp as cv
from crossvjp.tour.network import (
    CHANNELS,
    CLASSES,
    DROPOUT,
    EPSILON,
    FEATURES,
    HIDDEN,
    MOMENTUM,
    Arrays,
    cross_entropy,
)


class Network(nnx.Module):
    """The tour's network; `train` and `eval` set its mode."""

    def __init__(self, rule: cv.Rule, rngs: nnx.Rngs):
        self.rule = rule
        self.conv = nnx.Conv(1, CHANNELS, (3, 3), strides=2, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(CHANNELS, momentum=MOMENTUM, epsilon=EPSILON, rngs=rngs)
        self.hidden = nnx.Linear(FEATURES, HIDDEN, rngs=rngs)
        self.dropout = nnx.Dropout(DROPOUT)
        self.output = nnx.Linear(HIDDEN, CLASSES, rngs=rngs)

    def __call__(self, images: Array, key: Array | None = None) -> Array:
        """Computes the logits."""
        rule = self.rule
        x = rule(self.norm)(rule(self.conv)(images))
        x = nnx.gelu(x).reshape(len(x), -1)  # (batch, row * column * channel)
        x = nnx.gelu(rule(self.hidden)(x))
        x = self.dropout(x, rngs=key)
        return rule(self.output)(x)


class NnxTraining:
    """Training in Flax NNX; see `network.Training`."""

    def __init__(self, rule: cv.Rule, optimizer: optax.GradientTransformation, arrays: Arrays):
        self._model = Network(rule, nnx.Rngs(0))
        # This also makes the running statistics float64, which NNX keeps in float32 otherwise.
        nnx.update(
            self._model, {name: {**layer, **arrays.statistics.get(name, {})} for name, layer in arrays.params.items()}
        )
        self._optimizer = nnx.Optimizer(self._model, optimizer, wrt=nnx.Param)
        # A view shares its variables with the model, and has a mode of its own.
        self._evaluated = nnx.view(self._model, deterministic=True, use_running_average=True)

        @nnx.jit
        def step(model: Network, optimizer: nnx.Optimizer, images: Array, labels: Array, key: Array) -> Array:
            loss, grads = nnx.value_and_grad(lambda model: cross_entropy(model(images, key), labels))(model)
            optimizer.update(model, grads)
            return loss

        self._step, self._logits = step, nnx.jit(lambda model, images: model(images))

    def step(self, images: Array, labels: Array, key: Array) -> Array:
        """Trains on one batch; returns its loss."""
        return self._step(self._model, self._optimizer, images, labels, key)

    def logits(self, images: Array) -> Array:
        """Evaluates with the running averages."""
        return self._logits(self._evaluated, images)

    def arrays(self) -> Arrays:
        """Gives the current arrays: NNX has the layout of Linen, with a Variable around each array."""
        params, statistics = (nnx.to_pure_dict(nnx.state(self._model, kind)) for kind in (nnx.Param, nnx.BatchStat))
        return Arrays(params, statistics)
