"""Rules that bound cotangents, or move them to their mean."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._checks import non_negative, positive, scalar
from .._rule import Rule, static
from ._trees import norm, scale, times, unit_axes, wide


class ClipByValue(Rule):
    r"""Clips each element of the variables' cotangent.

        variables_bar = min(max(g, -limit), limit),   g = the module's own cotangent of its variables.

    Not linear in `y_bar`. Under `vmap` each lane is clipped by itself.

    Args:
        limit: >= 0, in units of the gradient; may be traced.
    """

    linear = False
    reads_names = False
    needs_variables = True
    limit: Float[Array, ""] | float = 1.0

    def __post_init__(self):
        """Checks the limit."""
        non_negative(self, "limit")

    def backward(self, call, y_bar):
        """Clips the variables' cotangent."""
        scalar(self, "limit")
        bar = call.pullback(y_bar)
        return bar.replace(variables=jax.tree.map(self._clipped, bar.variables))

    def _clipped(self, leaf: Any) -> Any:
        limit = jnp.asarray(self.limit, leaf.dtype)
        return jnp.clip(leaf, -limit, limit)


class ClipByNorm(Rule):
    r"""Scales the variables' cotangent down to norm `max_norm`.

        variables_bar = g * min(1, max_norm / ||g||),   g = the module's own cotangent, ||.|| over all its leaves.

    Not linear in `y_bar`. Under `vmap` each lane is clipped by itself, which is the clipping of
    DP-SGD; under `shard_map` with `check_vma=False`, each shard.

    Args:
        max_norm: > 0, in units of the gradient; may be traced.

    Reference:
        Pascanu, Mikolov, Bengio (2013), arXiv:1211.5063, algorithm 1.
    """

    linear = False
    reads_names = False
    needs_variables = True
    max_norm: Float[Array, ""] | float = 1.0

    def __post_init__(self):
        """Checks the norm."""
        positive(self, "max_norm")

    def backward(self, call, y_bar):
        """Clips the variables' cotangent."""
        bar = call.pullback(y_bar)
        return bar.replace(variables=_clipped_by_norm(bar.variables, self.max_norm))


class ClipOutputNorm(Rule):
    r"""Scales the cotangent that flows into the module down to norm `max_norm`, before the module's own pullback.

        y_bar' = y_bar * min(1, max_norm / ||y_bar||),   ||.|| over all outputs of the call.

    On each step of a recurrence it bounds what one step passes on to the one before. Not linear in
    `y_bar`. The whole batch counts as one cotangent; under `vmap`, each lane by itself.

    Args:
        max_norm: > 0, in units of the output's cotangent; may be traced.

    Reference:
        Pascanu, Mikolov, Bengio (2013), arXiv:1211.5063, who clip the parameters' gradient.
    """

    linear = False
    reads_names = False
    max_norm: Float[Array, ""] | float = 1.0

    def __post_init__(self):
        """Checks the norm."""
        positive(self, "max_norm")

    def backward(self, call, y_bar):
        """Clips what flows in."""
        return call.pullback(_clipped_by_norm(y_bar, self.max_norm))


def _clipped_by_norm(tree: Any, max_norm: Any) -> Any:
    length = norm(tree)
    max_norm = jnp.asarray(max_norm).astype(length.dtype)
    return scale(tree, max_norm / jnp.maximum(length, max_norm))  # no division by a norm of zero


class AdaptiveGradientClipping(Rule):
    r"""Clips the gradient of each unit to a part of the norm of its weights.

        variables_bar_i = g_i * min(1, clipping * max(||w_i||, eps) / ||g_i||)

    with g_i the module's own cotangent of the weights w_i of unit i. Units are the entries along
    `unit_axis` of arrays with at least two axes; an array with fewer is one unit. Not linear in `y_bar`.

    Args:
        clipping: > 0, the paper's lambda, dimensionless; may be traced.
        eps: > 0, in units of the weights: so that weights of zero still learn.
        unit_axis: the axis of the units: -1 for kernels of Linen, NNX and Haiku, which end in the
            output channels; 0 for those of Equinox, which start with them.

    Reference:
        Brock, De, Smith, Simonyan (2021), arXiv:2102.06171.
    """

    linear = False
    reads_names = False
    needs_variables = True
    clipping: Float[Array, ""] | float = 0.01
    eps: Float[Array, ""] | float = 1e-3
    unit_axis: int = static(default=-1)

    def __post_init__(self):
        """Checks the numbers."""
        positive(self, "clipping")
        positive(self, "eps")

    def backward(self, call, y_bar):
        """Clips each unit's cotangent."""
        scalar(self, "clipping")
        scalar(self, "eps")
        bar = call.pullback(y_bar)
        return bar.replace(variables=jax.tree.map(self._clipped, bar.variables, call.variables))

    def _clipped(self, grad: Any, weight: Any) -> Any:
        lengths = (_unit_norm(array, self.unit_axis) for array in (grad, weight))
        grad_norm, weight_norm = lengths
        clipping, eps = (jnp.asarray(number).astype(grad_norm.dtype) for number in (self.clipping, self.eps))
        limit = clipping * jnp.maximum(weight_norm, eps)
        return times(grad, limit / jnp.maximum(grad_norm, limit))


def _unit_norm(leaf: Any, unit_axis: int) -> Any:
    size = jnp.abs(leaf).astype(wide(leaf.dtype))
    return jnp.sqrt(jnp.sum(size**2, axis=unit_axes(leaf.ndim, unit_axis), keepdims=True))


class Centralize(Rule):
    r"""Takes the mean over each unit's weights out of their gradient.

        variables_bar_i = g_i - mean(g_i),   g_i = the module's own cotangent of the weights of unit i.

    Units are the entries along `unit_axis` of arrays with at least two axes; biases and other
    arrays with fewer stay as they are.

    Args:
        unit_axis: the axis of the units, as in `AdaptiveGradientClipping`. `optax.centralize` has
            them on axis 0.

    Reference:
        Yong, Huang, Hua, Zhang (2020), arXiv:2004.01461, equation 1.
    """

    reads_names = False
    needs_variables = True
    unit_axis: int = static(default=-1)

    def backward(self, call, y_bar):
        """Centralises the cotangents of arrays with at least two axes."""
        bar = call.pullback(y_bar)
        return bar.replace(variables=jax.tree.map(self._centralized, bar.variables))

    def _centralized(self, leaf: Any) -> Any:
        if leaf.ndim < 2:
            return leaf
        return leaf - jnp.mean(leaf, axis=unit_axes(leaf.ndim, self.unit_axis), keepdims=True)
