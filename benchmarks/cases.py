"""What every benchmark compares: one model under one rule, written in five ways."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp

import crossvjp as cv

Layer: TypeAlias = Literal["dense", "block", "transformer", "residual"]
"""What one wrapped call runs: `dense` has parameters alone; `block` (Dense, BatchNorm, Dropout) state and a key, too;
`transformer` (self-attention and a network of two layers, each with LayerNorm and Dropout, and skipped) a key;
`residual` (two 3x3 convolutions with BatchNorm, skipped) state."""

Variant: TypeAlias = Literal["plain", "by hand", "own", "rule", "custom_vjp"]
"""No rule; `jax.custom_vjp` over explicit parameters; the framework's own transform; ours, in both forms."""

Apply: TypeAlias = Callable[[Any, Any, Any], tuple[Any, Any]]
"""A pure function, `apply(params, rest, x) -> (y, new_rest)`; `rest` is state and keys."""

FRAMEWORKS = {"plain JAX": "jax", "Linen": "linen", "NNX": "nnx", "Haiku": "haiku", "Equinox": "equinox"}
WITHOUT_OWN = ("plain JAX", "Haiku")  # in plain JAX it is the rule by hand; Haiku has none
LAYERS: tuple[Layer, ...] = get_args(Layer)
VARIANTS: tuple[Variant, ...] = get_args(Variant)
OURS: tuple[Variant, ...] = ("rule", "custom_vjp")
TITLES: dict[Layer, str] = {
    "dense": "Dense",
    "block": "Dense, BatchNorm, Dropout",
    "transformer": "transformer block with dropout",
    "residual": "ResNet block with batch norm",
}
BATCH, WIDTH = 64, 128  # of dense and block
LENGTH, FEATURES, HEADS = 16, 32, 2  # of transformer
CHANNELS = 8  # of residual, and as many rows and columns: so Equinox's order of the axes needs no transposing
SMALL_BATCH = 4  # of both
DROPOUT, MOMENTUM, EPSILON = 0.1, 0.9, 1e-5
SHAPES: dict[Layer, tuple[int, ...]] = {
    "dense": (BATCH, WIDTH),
    "block": (BATCH, WIDTH),
    "transformer": (SMALL_BATCH, LENGTH, FEATURES),
    "residual": (SMALL_BATCH, CHANNELS, CHANNELS, CHANNELS),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A model as a pure function, and its arguments."""

    layer: Layer
    apply: Apply
    params: Any
    rest: Any

    @property
    def arguments(self) -> tuple[Any, Any, Any]:
        """What `apply` is called with: parameters, rest and a batch of inputs."""
        return self.params, self.rest, some_input(self.layer)

    @property
    def gradient(self) -> Callable[..., tuple[Any, Any]]:
        """That of the loss, with the new rest."""
        return jax.grad(self.loss, has_aux=True)

    def loss(self, params: Any, rest: Any, x: Any) -> tuple[Any, Any]:
        """Scores the output; the new rest goes along."""
        y, new_rest = self.apply(params, rest, x)
        return score(y), new_rest


def variants(framework: str) -> list[Variant]:
    """Lists the ways to write the rule that the framework has."""
    return [variant for variant in VARIANTS if variant != "own" or framework not in WITHOUT_OWN]


@functools.cache
def build(framework: str, layer: Layer, variant: Variant, depth: int = 1) -> Case:
    """Builds a model of some layers in one framework, under one variant of the rule."""
    return importlib.import_module(f"benchmarks.with_{FRAMEWORKS[framework]}").case(layer, variant, depth)


def activate(layer: Layer, y: jax.Array) -> jax.Array:
    """Stands between two layers; blocks with a skip follow one another as they are."""
    return jnp.tanh(y) if layer in ("dense", "block") else y


def score(y: jax.Array) -> jax.Array:
    """Makes a loss of the last layer's output."""
    return jnp.mean(jnp.square(y))


@functools.cache  # who empties JAX's caches would compile it anew each time
def some_input(layer: Layer) -> jax.Array:
    """Makes a batch of inputs."""
    return jax.random.normal(jax.random.key(0), SHAPES[layer])


def stack(layer: Layer, calls: list[Apply], params: Any, rests: Any) -> Case:
    """Makes a model of layers that are pure functions, each with its own parameters and rest."""
    return Case(layer, functools.partial(chain, layer, calls), params, rests)


def chain(layer: Layer, calls: list[Apply], params: Any, rests: Any, x: Any) -> tuple[Any, list[Any]]:
    """Applies layer after layer."""
    new_rests = []
    for index, (call, own, rest) in enumerate(zip(calls, params, rests, strict=True)):
        y, new_rest = call(own, rest, x)
        new_rests.append(new_rest)
        x = activate(layer, y) if index + 1 < len(calls) else y
    return x, new_rests


def sign(tree: Any) -> Any:
    """Takes the sign of every leaf: what all variants do to the parameters' gradient."""
    return jax.tree.map(jnp.sign, tree)


@cv.rule(reads_names=False)
def sign_gradient(call: cv.Call, y_bar: Any) -> cv.Cotangents:
    """The rule, for crossvjp."""
    bar = call.pullback(y_bar)
    return bar.replace(variables=sign(bar.variables))


def lifted(fn: Callable[..., Any], variant: Variant) -> Callable[..., Any]:
    """Puts crossvjp's rule, in one of its two forms, on `fn(mdl, *args)`; the plain variant stays as it is."""
    if variant == "plain":
        return fn
    if variant == "rule":
        return sign_gradient.lift(fn)
    assert variant == "custom_vjp", variant

    def forward(mdl: Any, *args: Any) -> Any:
        return cv.vjp(fn, mdl, *args)

    def backward(pullback: Any, y_bar: Any) -> Any:
        *inputs_bar, variables_bar = pullback(y_bar)
        return *inputs_bar, sign(variables_bar)

    return cv.custom_vjp(fn, forward, backward, reads_names=False)


def by_hand(apply: Apply) -> Apply:
    """Puts the same rule on a pure function with nothing but `jax.custom_vjp`."""

    @jax.custom_vjp
    def call(params: Any, rest: Any, x: Any) -> Any:
        return apply(params, rest, x)

    def forward(params: Any, rest: Any, x: Any) -> Any:
        y, pullback, new_rest = jax.vjp(lambda params, x: apply(params, rest, x), params, x, has_aux=True)
        return (y, new_rest), pullback

    def backward(pullback: Any, bars: Any) -> Any:
        y_bar, _ = bars
        params_bar, x_bar = pullback(y_bar)
        return sign(params_bar), None, x_bar

    call.defvjp(forward, backward)
    return call
