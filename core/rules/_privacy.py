"""Per-example gradients: their norms, and gradients in which each example's share is clipped."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from .._channels import Sum
from .._checks import positive
from .._errors import ArgumentError
from .._rule import Rule, static
from ._dense import dense_layer
from ._trees import times, wide


class PerExampleClip(Rule):
    r"""Clips each example's gradient of the parameters to norm `max_norm`, then sums: the clipping of DP-SGD.

        variables_bar = sum_i g_i * min(1, max_norm / ||g_i||),   g_i = the cotangent that example i alone gives.

    For any module whose examples lie along axis 0 of its inputs. It computes every g_i, which takes their
    memory; `GhostClip` does without. The inputs' cotangents are the module's own. Not linear in `y_bar`.
    If the loss is a mean, g_i has its factor 1 / batch. The noise of DP-SGD is to be added to the sum over
    all modules and devices.

    Args:
        max_norm: > 0, in units of the gradient; may be traced.
        independent: the module treats each example by itself; as in `call.per_example`.

    Reference:
        Abadi et al. (2016), arXiv:1607.00133, algorithm 1.
    """

    max_norm: Float[Array, ""] | float = 1.0
    independent: bool = static(default=True)
    linear = False
    symbolic_zeros = False
    needs_variables = True

    def __post_init__(self):
        positive(self, "max_norm")

    def backward(self, call, y_bar):
        """Sums the clipped gradients."""
        each = call.per_example(y_bar, independent=self.independent).variables
        factors = _clipping(_squares(each), self.max_norm)
        clipped = jax.tree.map(lambda leaf: jnp.sum(_by_example(leaf, factors), axis=0), each)
        return call.pullback(y_bar).replace(variables=clipped)


class PerLayerClip(Rule):
    r"""Clips each example's gradient of one layer's parameters to norm `max_norm`, while going back through it.

        variables_bar = J^T (min(1, max_norm / ||g_i||) * y_bar_i)_i,   J = the layer's Jacobian for its parameters.

    Put on every layer it clips layer by layer in a single backward pass. A dense layer, of sequences too, takes
    its norms from its input and `y_bar`, without any per-example gradient; another module computes those for
    their norms. Examples lie along axis 0 of the inputs and outputs. The inputs' cotangents are the module's
    own, unclipped. Not linear in `y_bar`.

    Args:
        max_norm: > 0, in units of the gradient; may be traced.

    Reference:
        He et al. (2022), arXiv:2212.01539.
    """

    max_norm: Float[Array, ""] | float = 1.0
    linear = False
    symbolic_zeros = False
    needs_variables = True

    def __post_init__(self):
        positive(self, "max_norm")

    def backward(self, call, y_bar):
        """Weighs the examples of `y_bar`."""
        factors = _clipping(_squared_norms(call, y_bar), self.max_norm)
        clipped = call.pullback(_weighed(y_bar, factors, self)).variables
        return call.pullback(y_bar).replace(variables=clipped)


class PerExampleNorm(Rule):
    r"""Tells the squared norm of each example's gradient of the parameters; the gradient stays as it is.

        squares_i = ||g_i||^2;   for a dense layer  sum_st (a_is . a_it + 1) (c_is . c_it)

    with a the layer's input and c = `y_bar`, over the positions s, t of a sequence (the 1 is the bias); no
    per-example gradient is computed then, unless the sequence is so long that it is smaller. Another module
    computes them. Squares add up: with one channel for all layers they are those of the whole model. Examples
    lie along axis 0 of the inputs.

    Args:
        squares: a channel of shape (batch,).

    Reference:
        Goodfellow (2015), arXiv:1510.01799; for sequences Li et al. (2022), arXiv:2110.05679.
    """

    squares: Sum
    exact = True
    symbolic_zeros = False
    needs_variables = True

    def backward(self, call, y_bar):
        """Emits the squares."""
        return call.pullback(y_bar).with_fields(squares=self.squares.emit(_squared_norms(call, y_bar)))


class GhostClip(Rule):
    r"""Clips each example's gradient of a whole model to norm `max_norm` in two backward passes, without computing it.

        variables_bar = J^T (min(1, max_norm / sqrt(squares_i)) * y_bar_i)_i,   squares = the sum of the layers'

    The model takes a `Sum` channel of shape (batch,) as an input, and each of its layers with parameters is
    under `PerExampleNorm` with that channel. The first pass gives the squares, the second the sum of the
    clipped gradients, as `PerExampleClip` has it. The cotangents of the inputs are the model's own. Not linear
    in `y_bar`.

    Args:
        max_norm: > 0, in units of the gradient; may be traced.

    Raises:
        ArgumentError: not exactly one input of the call is a `Sum`.

    Reference:
        Li et al. (2022), arXiv:2110.05679.
    """

    max_norm: Float[Array, ""] | float = 1.0
    linear = False
    symbolic_zeros = False
    needs_variables = True

    def __post_init__(self):
        positive(self, "max_norm")

    def backward(self, call, y_bar):
        """Goes back for the norms, then with the examples weighed."""
        norms = call.pullback(y_bar)
        factors = _clipping(_only_channel(norms, self).value, self.max_norm)
        return norms.replace(variables=call.pullback(_weighed(y_bar, factors, self)).variables)


def _squared_norms(call: Any, y_bar: Any) -> Float[Array, " batch"]:
    """Gives the squared norm of each example's gradient of the call's variables."""
    layer = dense_layer(call, y_bar)
    if layer is None:
        return _squares(call.per_example(y_bar).variables)
    x, has_bias = layer
    dtype = wide(y_bar.dtype)
    a = x.reshape(len(x), -1, x.shape[-1]).astype(dtype)  # (batch, time, in)
    c = y_bar.reshape(len(x), -1, y_bar.shape[-1]).astype(dtype)  # (batch, time, out)
    if 2 * a.shape[1] ** 2 > a.shape[2] * c.shape[2]:  # a long sequence: its products are larger than its gradient
        biases = [jnp.sum(c, axis=1)] if has_bias else []
        return _squares([jnp.einsum("bti,bto->bio", a, c), *biases])
    inputs = jnp.einsum("bsi,bti->bst", a, a) + has_bias
    return jnp.sum(inputs * jnp.einsum("bso,bto->bst", c, c), axis=(1, 2))


def _squares(each: PyTree) -> Float[Array, " batch"]:
    """Sums the squares of gradients with the examples along axis 0."""
    flat = [leaf.reshape(len(leaf), -1).astype(wide(leaf.dtype)) for leaf in jax.tree.leaves(each)]
    return functools.reduce(jnp.add, [jnp.sum(leaf**2, axis=1) for leaf in flat])


def _clipping(squares: Float[Array, " batch"], max_norm: Any) -> Float[Array, " batch"]:
    return jnp.minimum(1.0, max_norm / jnp.sqrt(squares))  # a zero gradient is not clipped: its factor is min(1, inf)


def _by_example(leaf: Any, factors: Float[Array, " batch"]) -> Any:
    return times(leaf, factors.reshape(-1, *(1 for _ in leaf.shape[1:])))


def _weighed(y_bar: PyTree, factors: Float[Array, " batch"], author: Rule) -> PyTree:
    for path, leaf in jax.tree.leaves_with_path(y_bar):
        if leaf.shape[:1] != factors.shape:
            raise ArgumentError(
                f"{author!r} needs outputs with the {len(factors)} examples along axis 0, but the output"
                f"{jax.tree_util.keystr(path)} has shape {leaf.shape}. Put the rule on the model, not on its loss."
            )
    return jax.tree.map(lambda leaf: _by_example(leaf, factors), y_bar)


def _only_channel(bar: Any, author: Rule) -> Sum:

    def is_channel(node: Any) -> bool:
        return isinstance(node, Sum)

    found = [node for node in jax.tree.leaves((bar.inputs, bar.keywords), is_leaf=is_channel) if is_channel(node)]
    if len(found) != 1:
        raise ArgumentError(
            f"{author!r} needs one Sum channel among the inputs of the call, for the squared norms of PerExampleNorm, "
            f"but there are {len(found)}."
        )
    return found[0]
