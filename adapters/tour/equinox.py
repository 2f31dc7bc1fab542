"""The network in Equinox: `rule.lift(fn)(self.layer, x)`, where `fn` maps the layer over the batch.

Equinox layers take a single example. The usual place for `jax.vmap` is around the whole model, but a rule inside of it
would see each example's own gradient, as one would want for DP-SGD. Here the rule is about the batch's gradient, as in
the other frameworks, so each `vmap` stands inside the rule.
"""

from __future__ import annotations

from typing import Any

import equinox as eqx
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
    FEATURES,
    HIDDEN,
    MOMENTUM,
    PAST_DEBIASING,
    Arrays,
    cross_entropy,
)


def over_batch(layer: Any, x: Array) -> Array:
    """Calls a layer on each example."""
    return jax.vmap(layer)(x)


def over_batch_with_state(layer: Any, x: Array, state: eqx.nn.State) -> tuple[Array, eqx.nn.State]:
    """Calls a layer with state on each example; the examples share the state."""
    return jax.vmap(layer, in_axes=(0, None), out_axes=(0, None), axis_name="batch")(x, state)


class Network(eqx.Module):
    """The tour's network; `eqx.nn.inference_mode` sets its mode."""

    conv: eqx.nn.Conv2d
    norm: eqx.nn.BatchNorm
    hidden: eqx.nn.Linear
    dropout: eqx.nn.Dropout
    output: eqx.nn.Linear
    rule: cv.Rule

    def __init__(self, rule: cv.Rule, key: Array):
        conv_key, hidden_key, output_key = jax.random.split(key, 3)
        self.conv = eqx.nn.Conv2d(1, CHANNELS, 3, stride=2, padding="SAME", use_bias=False, key=conv_key)
        # "batch" is the mode of the other frameworks; "ema" would normalise by the running statistics in training
        self.norm = eqx.nn.BatchNorm(CHANNELS, "batch", eps=EPSILON, momentum=MOMENTUM, mode="batch")
        self.hidden = eqx.nn.Linear(FEATURES, HIDDEN, key=hidden_key)
        self.dropout = eqx.nn.Dropout(DROPOUT)
        self.output = eqx.nn.Linear(HIDDEN, CLASSES, key=output_key)
        self.rule = rule

    def __call__(self, images: Array, state: eqx.nn.State, key: Array | None = None) -> tuple[Array, eqx.nn.State]:
        """Computes the logits of a batch, and the new state."""
        each, each_with_state = self.rule.lift(over_batch), self.rule.lift(over_batch_with_state)
        x = jnp.moveaxis(images, -1, 1)  # (batch, channel, row, column)
        x, state = each_with_state(self.norm, each(self.conv, x), state)
        x = jax.nn.gelu(jnp.moveaxis(x, 1, -1)).reshape(len(x), -1)  # (batch, row * column * channel)
        x = jax.nn.gelu(each(self.hidden, x))
        x = self.dropout(x, key=key)  # on the whole batch, so that one key gives one mask
        return each(self.output, x), state


class EquinoxTraining:
    """Training in Equinox; see `network.Training`."""

    def __init__(self, rule: cv.Rule, optimizer: optax.GradientTransformation, arrays: Arrays):
        model, state = eqx.nn.make_with_state(Network)(rule, jax.random.key(0))
        self._model, self._state = _with_arrays(model, state, arrays)
        self._memory = optimizer.init(eqx.filter(self._model, eqx.is_inexact_array))

        @eqx.filter_value_and_grad(has_aux=True)
        def loss_and_grads(
            model: Network, state: eqx.nn.State, images: Array, labels: Array, key: Array
        ) -> tuple[Array, eqx.nn.State]:
            logits, state = model(images, state, key)
            return cross_entropy(logits, labels), state

        @eqx.filter_jit
        def step(
            model: Network, state: eqx.nn.State, memory: Any, images: Array, labels: Array, key: Array
        ) -> tuple[Network, eqx.nn.State, Any, Array]:
            (loss, state), grads = loss_and_grads(model, state, images, labels, key)
            updates, memory = optimizer.update(grads, memory, eqx.filter(model, eqx.is_inexact_array))
            return eqx.apply_updates(model, updates), state, memory, loss

        @eqx.filter_jit
        def logits(model: Network, state: eqx.nn.State, images: Array) -> Array:
            return eqx.nn.inference_mode(model)(images, state)[0]

        self._step, self._logits = step, logits

    def step(self, images: Array, labels: Array, key: Array) -> Array:
        """Trains on one batch; returns its loss."""
        self._model, self._state, self._memory, loss = self._step(
            self._model, self._state, self._memory, images, labels, key
        )
        return loss

    def logits(self, images: Array) -> Array:
        """Evaluates with the running statistics."""
        return self._logits(self._model, self._state, images)

    def arrays(self) -> Arrays:
        """Gives the current arrays."""
        model: Any = self._model
        mean, var = self._state.get(model.norm.batch_state_index)
        params = {
            "conv": {"kernel": model.conv.weight.transpose(2, 3, 1, 0)},
            "norm": {"scale": model.norm.weight, "bias": model.norm.bias},
            "hidden": {"kernel": model.hidden.weight.T, "bias": model.hidden.bias},
            "output": {"kernel": model.output.weight.T, "bias": model.output.bias},
        }
        return Arrays(params, {"norm": {"mean": mean, "var": var}})


def _with_arrays(model: Network, state: eqx.nn.State, arrays: Arrays) -> tuple[Network, eqx.nn.State]:
    """Puts the common arrays into the model and its state; Equinox kernels have their outputs first."""
    params, statistics = arrays.params, arrays.statistics["norm"]
    leaves = {
        lambda m: m.conv.weight: params["conv"]["kernel"].transpose(3, 2, 0, 1),
        lambda m: m.norm.weight: params["norm"]["scale"],
        lambda m: m.norm.bias: params["norm"]["bias"],
        lambda m: m.hidden.weight: params["hidden"]["kernel"].T,
        lambda m: m.hidden.bias: params["hidden"]["bias"],
        lambda m: m.output.weight: params["output"]["kernel"].T,
        lambda m: m.output.bias: params["output"]["bias"],
    }
    for where, value in leaves.items():
        model = eqx.tree_at(where, model, value)
    norm: Any = model.norm  # which has these indices in mode "batch" only, so their types have a None
    state = state.set(norm.batch_counter, jnp.array(PAST_DEBIASING))
    return model, state.set(norm.batch_state_index, (statistics["mean"], statistics["var"]))
