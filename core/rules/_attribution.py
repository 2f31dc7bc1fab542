"""Backward passes that explain an output by its inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from .._checks import positive
from .._cotangents import Cotangents
from .._rule import Rule


class GuidedBackprop(Rule):
    r"""Lets only positive cotangents through a ReLU, and only where its input is positive.

        x_bar = max(y_bar, 0) * 1[x > 0]

    To be put on `jax.nn.relu`; on another function its own pullback takes the place of the second factor.
    Not linear in `y_bar`.

    Reference:
        Springenberg, Dosovitskiy, Brox, Riedmiller (2014), arXiv:1412.6806.
    """

    linear = False

    def backward(self, call, y_bar):
        """Pulls the positive part back."""
        return call.pullback(_positive_part(y_bar))


class DeconvNet(Rule):
    r"""Lets only positive cotangents through a ReLU, wherever its input is.

        x_bar = max(y_bar, 0)

    To be put on `jax.nn.relu`, or another function of one input with the shape of its output. Not linear in
    `y_bar`.

    Reference:
        Zeiler, Fergus (2013), arXiv:1311.2901.
    """

    linear = False

    def backward(self, call, y_bar):
        """Gives the positive part itself."""
        return Cotangents((_positive_part(y_bar),), None)


class LRPEpsilon(Rule):
    r"""Redistributes relevance over the inputs of a layer: layer-wise relevance propagation, epsilon rule.

        x_bar = x * J^T (y_bar / (y + epsilon * sign(y))),   sign(0) = 1,   J = the layer's Jacobian for its inputs

    The cotangents are relevances: every layer between the inputs and the explained output must be under the
    rule, the activations too. A bias keeps its share; without biases the relevances of the inputs add up to
    that of the output, but for what `epsilon` takes. The variables get no cotangent.

    Args:
        epsilon: > 0, in units of the layer's output; may be traced.

    Reference:
        Bach et al. (2015), doi:10.1371/journal.pone.0130140; in this form Ancona et al. (2018), arXiv:1711.06104.
    """

    epsilon: Float[Array, ""] | float = 1e-6

    def __post_init__(self):
        positive(self, "epsilon")

    def backward(self, call, y_bar):
        """Divides by the output, pulls back and multiplies by the input."""
        bar = call.pullback(_zipped(self._share, y_bar, call.output))
        relevance, by_keyword = (
            _zipped(jnp.multiply, bars, primals)
            for bars, primals in ((bar.inputs, call.inputs), (bar.keywords, call.keywords))
        )
        return bar.replace(inputs=relevance, keywords=by_keyword, variables=None)

    def _share(self, relevance: Any, y: Any) -> Any:
        epsilon = jnp.asarray(self.epsilon, y.dtype)
        return relevance / jnp.where(y < 0, y - epsilon, y + epsilon)


def _positive_part(y_bar: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: jnp.maximum(leaf, 0), y_bar)


def _zipped(fn: Callable[[Any, Any], Any], bars: PyTree, primals: PyTree) -> PyTree:
    """Applies `fn` to each cotangent and its primal; where there is no cotangent, there is none after."""

    def each(bar: Any, primal: Any) -> Any:
        return None if bar is None else fn(bar, primal)

    return jax.tree.map(each, bars, primals, is_leaf=lambda leaf: leaf is None)
