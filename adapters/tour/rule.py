"""The rule of the tour, written once; every network of the tour runs under this one object."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

import crossvjp as cv


class UnitNorm(cv.Rule):
    r"""Rescales the module's parameter cotangent to the norm `size`, whatever its own norm is.

        variables_bar = size * g / (||g|| + epsilon),   g = the module's own parameter cotangent, over all its leaves.

    Each layer then takes steps of one length, so training differs from plain gradients from the first step on. The
    rule is smooth wherever `g` is not zero: a rounding error in `g` moves the result by as little, relative to it. A
    rule with thresholds, such as the sign of `g`, could turn the last bit of a sum into a step in the other direction,
    and then frameworks that add in another order would drift apart without being wrong.

    Args:
        size: > 0, in units of the gradient.
        epsilon: > 0, in units of the gradient; keeps a zero gradient zero.

    Reference:
        Yu, Huang, Lin, Salakhutdinov, Carbonell (2017), arXiv:1707.04822; a block is here one layer.
    """

    size: float = 1.0
    epsilon: float = 1e-12

    def backward(self, call: cv.Call, y_bar: Any) -> cv.Cotangents:
        """Keeps the inputs' cotangents, and rescales the variables'."""
        bar = call.pullback(y_bar)
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(bar.variables)))
        scale = self.size / (norm + self.epsilon)
        return bar.replace(variables=jax.tree.map(lambda leaf: scale * leaf, bar.variables))
