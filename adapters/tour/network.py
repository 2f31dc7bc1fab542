"""What the five networks have in common: their sizes, their initial arrays, their loss, and what the tour asks of them.

    images (8, 8, 1) -> convolution, 3 x 3, stride 2 -> batch normalisation -> GELU
                     -> dense -> GELU -> dropout -> dense -> logits (10)

Rounding can't flip a decision here: the activation is smooth, there is no maximum pooling, the dropout masks come from
keys alone, and everything is in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol, TypeAlias

import jax
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key

import crossvjp as cv

CHANNELS = 16
HIDDEN = 64
CLASSES = 10
FEATURES = 4 * 4 * CHANNELS  # what is left of 8 x 8 pixels after a stride of 2
DROPOUT = 0.25

# Said to every framework, since their defaults differ: `new = MOMENTUM * old + (1 - MOMENTUM) * batch`.
MOMENTUM = 0.9
EPSILON = 1e-5

# Flax starts the running statistics at mean 0 and variance 1. Haiku and Equinox divide theirs by
# 1 - MOMENTUM**count; a large count makes that 1, so that all five keep the same statistics.
PAST_DEBIASING = 10**6

Layers: TypeAlias = Mapping[str, Mapping[str, Array]]


class Arrays(NamedTuple):
    """The arrays of a network in the one layout that the tour compares: channels last, dense kernels `(in, out)`."""

    params: Layers
    """By layer: `conv`, `norm`, `hidden`, `output`."""

    statistics: Layers
    """The running mean and variance of the layer `norm`."""


class Training(Protocol):
    """A network in training, in one framework."""

    def step(self, images: Float[Array, "batch 8 8 1"], labels: Int[Array, " batch"], key: Key[Array, ""]) -> Array:
        """Trains on one batch; returns its loss. The key alone decides on the dropout mask."""
        ...

    def logits(self, images: Float[Array, "batch 8 8 1"]) -> Float[Array, "batch 10"]:
        """Evaluates: running statistics, no dropout."""
        ...

    def arrays(self) -> Arrays:
        """Gives the current arrays in the common layout."""
        ...


# Builds a network with the rule on every layer that has parameters, and gives it the arrays.
Start: TypeAlias = Callable[[cv.Rule, optax.GradientTransformation, Arrays], Training]


def initial_arrays(seed: int) -> Arrays:
    """Draws the arrays that every framework starts from, in float64."""
    generator = np.random.default_rng(seed)

    def kernel(*shape: int) -> Array:
        fan_in = int(np.prod(shape[:-1]))
        return jax.numpy.asarray(generator.normal(size=shape) / np.sqrt(fan_in))

    zeros, ones = jax.numpy.zeros, jax.numpy.ones
    params = {
        # no bias: the batch normalisation behind it would take it out again
        "conv": {"kernel": kernel(3, 3, 1, CHANNELS)},
        "norm": {"scale": ones(CHANNELS), "bias": zeros(CHANNELS)},
        "hidden": {"kernel": kernel(FEATURES, HIDDEN), "bias": zeros(HIDDEN)},
        "output": {"kernel": kernel(HIDDEN, CLASSES), "bias": zeros(CLASSES)},
    }
    return Arrays(params, {"norm": {"mean": zeros(CHANNELS), "var": ones(CHANNELS)}})


def cross_entropy(logits: Float[Array, "batch 10"], labels: Int[Array, " batch"]) -> Float[Array, ""]:
    """Averages the cross-entropy over a batch."""
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
