"""One network written in four frameworks: convolution, batch norm, embedding, attention, LSTM, layer norm, dense."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from crossvjp.adapters.haiku import bind

CHANNELS, WORDS, HIDDEN, CLASSES, STEPS = 4, 7, 4, 3, 120

IMAGES = jax.random.normal(jax.random.key(1), (2, 5, 5, 2))
TOKENS = jax.random.randint(jax.random.key(2), (2, 3), 0, WORDS)
SAMPLE = (IMAGES, TOKENS)


@dataclasses.dataclass(frozen=True)
class Rewrite:
    """The network in one framework.

    Args:
        target: makes a model as `migrate` takes a target.
        trained: makes one with values, as `migrate` takes a source.
        call: how it is called.
        train: how it is called in training.
        apart: takes a model with values apart, into `(params, state)`.
        run: `(params, state, images, train) -> (y, state)`, as the framework's users write it.
    """

    target: Callable[[], Any]
    trained: Callable[[], Any]
    call: Callable[..., Any]
    train: Callable[..., Any]
    apart: Callable[[Any], tuple[Any, Any]]
    run: Callable[..., tuple[Any, Any]]

    def calls(self, side: str) -> dict[str, Any]:
        """Gives the arguments of `migrate` for the model as its "source" or "target"."""
        return {f"{side}_call": self.call, f"{side}_train": self.train}


class LinenNet(nn.Module):
    """The network in Linen."""

    @nn.compact
    def __call__(self, images, tokens, train):
        y = nn.Conv(CHANNELS, (3, 3), name="conv")(images)
        y = nn.BatchNorm(use_running_average=not train, momentum=0.9, name="norm")(y)
        y = jnp.mean(jax.nn.relu(y), (1, 2))  # (batch, channels)
        z = nn.Embed(WORDS, 4, name="embed")(tokens)
        z = nn.MultiHeadDotProductAttention(2, name="attention")(z)
        z: Any = nn.RNN(nn.LSTMCell(HIDDEN, name="lstm"))(z)
        both = jnp.concatenate([y, z[:, -1]], -1)  # (batch, channels + hidden)
        both = nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, name="layer_norm")(both)
        return nn.Dense(CLASSES, name="head")(both)


def _linen_trained() -> Any:
    variables = jax.jit(LinenNet().init, static_argnums=3)(jax.random.key(3), *SAMPLE, True)
    return LinenNet().bind(jax.tree.map(_varied, variables))


class HaikuNet(hk.Module):
    """The network in Haiku."""

    def __call__(self, images, tokens, train):
        y = hk.Conv2D(CHANNELS, 3, name="conv")(images)
        y = hk.BatchNorm(True, True, 0.9, name="norm")(y, train)
        y = jnp.mean(jax.nn.relu(y), (1, 2))
        z = hk.Embed(WORDS, 4, name="embed")(tokens)
        init = hk.initializers.VarianceScaling(1.0)
        z = hk.MultiHeadAttention(2, 2, w_init=init, name="attention")(z, z, z)
        lstm = hk.LSTM(HIDDEN, name="lstm")
        z: Any
        z, _ = hk.dynamic_unroll(lstm, z, lstm.initial_state(z.shape[0]), time_major=False)
        both = jnp.concatenate([y, z[:, -1]], -1)
        return hk.Linear(CLASSES, name="head")(hk.LayerNorm(-1, True, True, name="layer_norm")(both))


def haiku_net() -> Any:
    """The transformed function."""
    return hk.transform_with_state(lambda *args: HaikuNet(name="net")(*args))


def _haiku_trained() -> Any:
    params, state = jax.jit(haiku_net().init, static_argnums=3)(jax.random.key(3), *SAMPLE, True)
    params = jax.tree.map(_varied, params)
    # As after a training of 120 steps: Haiku's average and its sum differ in bits, and Linen goes on as Haiku does.
    grown = {module: {"counter": jnp.array(STEPS), "hidden": _varied(pair["hidden"])} for module, pair in state.items()}
    late = {module: {**pair, "average": pair["hidden"] / (1 - jnp.power(0.9, STEPS))} for module, pair in grown.items()}
    return bind(haiku_net(), params, late)


class NnxNet(nnx.Module):
    """The network in NNX."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(2, CHANNELS, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(CHANNELS, momentum=0.9, rngs=rngs)
        self.embed = nnx.Embed(WORDS, 4, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs)
        self.lstm = nnx.RNN(nnx.OptimizedLSTMCell(4, HIDDEN, rngs=rngs), rngs=rngs)
        self.layer_norm = nnx.LayerNorm(CHANNELS + HIDDEN, epsilon=1e-5, use_fast_variance=False, rngs=rngs)
        self.head = nnx.Linear(CHANNELS + HIDDEN, CLASSES, rngs=rngs)

    def __call__(self, images, tokens, train):
        y = self.norm(self.conv(images), use_running_average=not train)
        y = jnp.mean(jax.nn.relu(y), (1, 2))
        z: Any = self.lstm(self.attention(self.embed(tokens)))
        return self.head(self.layer_norm(jnp.concatenate([y, z[:, -1]], -1)))


def _nnx_trained() -> Any:
    model = NnxNet(nnx.Rngs(3))
    nnx.update(model, jax.tree.map(_varied, nnx.state(model, (nnx.Param, nnx.BatchStat))))
    return model


class EquinoxNet(eqx.Module):
    """The network in Equinox, for one example."""

    conv: eqx.nn.Conv2d
    norm: eqx.nn.BatchNorm
    embed: eqx.nn.Embedding
    attention: eqx.nn.MultiheadAttention
    lstm: eqx.nn.LSTMCell
    layer_norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 5)
        biases = dict.fromkeys(("query", "key", "value", "output"), True)
        self.conv = eqx.nn.Conv2d(2, CHANNELS, 3, padding="SAME", key=keys[0])
        self.norm = eqx.nn.BatchNorm(CHANNELS, "batch", momentum=0.9, mode="batch")
        self.embed = eqx.nn.Embedding(WORDS, 4, key=keys[1])
        self.attention = eqx.nn.MultiheadAttention(
            2, 4, **{f"use_{name}_bias": on for name, on in biases.items()}, key=keys[2]
        )
        self.lstm = eqx.nn.LSTMCell(4, HIDDEN, key=keys[3])
        self.layer_norm = eqx.nn.LayerNorm(CHANNELS + HIDDEN)
        self.head = eqx.nn.Linear(CHANNELS + HIDDEN, CLASSES, key=keys[4])

    def __call__(self, image, tokens, state, train):
        y, state = self.norm(self.conv(jnp.moveaxis(image, -1, 0)), state, inference=not train)
        y = jnp.mean(jax.nn.relu(y), (1, 2))
        z = jax.vmap(self.embed)(tokens)
        z = self.attention(z, z, z)
        zero = jnp.zeros(HIDDEN)
        (z, _), _ = jax.lax.scan(lambda carry, x: (self.lstm(x, carry), None), (zero, zero), z)
        return self.head(self.layer_norm(jnp.concatenate([y, z], -1))), state


def _equinox_target() -> Any:
    return eqx.nn.make_with_state(EquinoxNet)(jax.random.key(4))


def _equinox_trained() -> Any:
    model, state = _equinox_target()
    varied = lambda leaf: _varied(leaf) if eqx.is_inexact_array(leaf) else leaf
    state = jax.tree.map(lambda leaf: varied(leaf) if eqx.is_inexact_array(leaf) else leaf + STEPS, state)
    return jax.tree.map(varied, model), state


def _equinox_call(train: bool) -> Callable[..., Any]:
    def call(mdl, state, images, tokens):
        return jax.vmap(mdl, in_axes=(0, 0, None, None), out_axes=(0, None), axis_name="batch")(
            images, tokens, state, train
        )

    return call


def _varied(leaf: Any) -> Any:
    """Makes every entry another number, where initial values are zeros or ones; all of them are positive or small."""
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        return leaf
    return leaf + jnp.asarray(np.random.default_rng(leaf.size).uniform(0.1, 0.3, leaf.shape), leaf.dtype)


def _flagged(train: bool) -> Callable[..., Any]:
    return lambda mdl, *sample: mdl(*sample, train)


_FLAGGED = _flagged(False), _flagged(True)


def _linen_apart(bound: Any) -> tuple[Any, Any]:
    return bound.variables["params"], {"batch_stats": bound.variables["batch_stats"]}


def _linen_run(params: Any, state: Any, images: Any, train: bool) -> tuple[Any, Any]:
    return LinenNet().apply({"params": params, **state}, images, TOKENS, train, mutable=["batch_stats"])


def _haiku_run(params: Any, state: Any, images: Any, train: bool) -> tuple[Any, Any]:
    return haiku_net().apply(params, state, None, images, TOKENS, train)


def _nnx_apart(model: Any) -> tuple[Any, Any]:
    return nnx.state(model, nnx.Param), nnx.state(model, nnx.BatchStat)


def _nnx_run(params: Any, state: Any, images: Any, train: bool) -> tuple[Any, Any]:
    model = NnxNet(nnx.Rngs(5))
    nnx.update(model, params, state)
    return model(images, TOKENS, train), nnx.state(model, nnx.BatchStat)


def _equinox_apart(pair: Any) -> tuple[Any, Any]:
    model, state = pair
    return eqx.filter(model, eqx.is_inexact_array), jax.tree.map(lambda leaf: leaf, state)


def _equinox_run(params: Any, state: Any, images: Any, train: bool) -> tuple[Any, Any]:
    rest = eqx.filter(_equinox_target()[0], eqx.is_inexact_array, inverse=True)
    return _equinox_call(train)(eqx.combine(params, rest), jax.tree.map(lambda leaf: leaf, state), images, TOKENS)


def _haiku_apart(net: Any) -> tuple[Any, Any]:
    return net.params, net.state


REWRITES = {
    "linen": Rewrite(LinenNet, _linen_trained, *_FLAGGED, _linen_apart, _linen_run),
    "haiku": Rewrite(haiku_net, _haiku_trained, *_FLAGGED, _haiku_apart, _haiku_run),
    "nnx": Rewrite(lambda: NnxNet(nnx.Rngs(5)), _nnx_trained, *_FLAGGED, _nnx_apart, _nnx_run),
    "equinox": Rewrite(
        _equinox_target, _equinox_trained, _equinox_call(False), _equinox_call(True), _equinox_apart, _equinox_run
    ),
}
