"""Credit assignment without the transposed weights."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._arrays import ArrayType, is_inexact, take_apart
from .._checks import positive
from .._cotangents import Cotangents
from .._errors import ArgumentError
from .._highway import Highway
from .._rule import Rule
from .._used import used_arguments


class FeedbackAlignment(Rule):
    r"""Sends cotangents back through a fixed kernel in place of the layer's own.

        x_bar = the pullback of the layer with `feedback` for its kernel;   for a dense layer  y_bar @ feedback^T

    To be put on a dense or convolutional layer alone, without its activation. The variables keep their own
    gradient.

    Args:
        feedback: of the kernel's shape, in the framework's own layout.

    Raises:
        ArgumentError: the layer has no kernel, or one of another shape, or is not linear in its inputs.

    Reference:
        Lillicrap, Cownden, Tweed, Akerman (2016), doi:10.1038/ncomms13276.
    """

    feedback: Float[Array, "*kernel"]
    needs_variables = True

    def backward(self, call, y_bar):
        """Linearises at the fixed kernel for the inputs."""
        kernel = _kernel(call, self)
        if self.feedback.shape != kernel.shape:
            raise ArgumentError(
                f"FeedbackAlignment's `feedback` must have the shape of the layer's kernel, {kernel.shape}, but has "
                f"{self.feedback.shape}."
            )
        return _back_through(call, y_bar, self.feedback.astype(kernel.dtype), self)


class SignSymmetry(Rule):
    r"""Sends cotangents back through the signs of the layer's kernel.

        x_bar = the pullback of the layer with `size * sign(kernel)` for its kernel

    To be put on a dense or convolutional layer alone, without its activation. The variables keep their own
    gradient.

    Args:
        size: > 0, in units of the kernel; may be traced.

    Raises:
        ArgumentError: the layer has no kernel, or is not linear in its inputs.

    Reference:
        Liao, Leibo, Poggio (2016), arXiv:1510.05067; Xiao et al. (2018), arXiv:1811.03567.
    """

    size: Float[Array, ""] | float = 1.0
    needs_variables = True

    def __post_init__(self):
        positive(self, "size")

    def backward(self, call, y_bar):
        """Linearises at the signs for the inputs."""
        kernel = _kernel(call, self)
        return _back_through(call, y_bar, jnp.sign(kernel) * jnp.asarray(self.size, kernel.dtype), self)


class DirectFeedbackAlignment(Rule):
    r"""Gives a hidden layer the error of the network's output, through a fixed matrix, as its cotangent.

        variables_bar = the layer's own pullback of  error @ feedback,   error = the cotangent of the network's output

    The error comes down a `Highway`: a hidden layer is called as `fn(mdl, x, road) -> (y, road)`, with its
    activation, and the network's output departs, `road.depart(y)`. The input x gets no cotangent: the layer
    below has the error too. The last layer keeps its own gradient and is not under the rule.

    Args:
        feedback: one row an output of the network, one column a hidden unit, in the order of an example's
            flattened hidden layer.

    Raises:
        ArgumentError: the layer is not called with a highway, or `feedback` has another shape.

    Reference:
        Nøkland (2016), arXiv:1609.01596.
    """

    feedback: Float[Array, "outputs hidden"]
    needs_variables = True
    symbolic_zeros = False

    def backward(self, call, y_bar):
        """Reads the error, and passes it on."""
        hidden, road_bar = _beside_highway(y_bar)
        error = road_bar.read()
        rows = error.reshape(len(error), -1)  # (batch, outputs)
        expected = rows.shape[1], hidden[0].size
        if self.feedback.shape != expected:
            raise ArgumentError(
                f"DirectFeedbackAlignment's `feedback` must have the shape {expected}, the outputs of the network by "
                f"the hidden units, but has {self.feedback.shape}."
            )
        bar = call.pullback(((rows @ self.feedback).reshape(hidden.shape).astype(hidden.dtype), None))
        passed = (road_bar.carry(error) if isinstance(part, Highway) else None for part in call.inputs)
        return bar.replace(inputs=tuple(passed))


def _beside_highway(y_bar: Any) -> tuple[Any, Highway]:
    """Takes the cotangents of a layer's output and of the highway apart."""
    match y_bar:
        case (jax.Array() as hidden, Highway() as road_bar):
            return hidden, road_bar
    raise ArgumentError(
        "DirectFeedbackAlignment needs a highway from the end of the network: call the layer as fn(mdl, x, road) -> "
        "(y, road) with a crossvjp.Highway, and let the network's output depart on it, road.depart(y)."
    )


def _kernel(call: Any, author: Rule) -> Any:
    """Gives the one variable with the most axes, and at least two."""
    leaves = jax.tree.leaves(call.variables)
    axes = [leaf.ndim for leaf in leaves]
    if axes.count(max(axes)) > 1 or max(axes) < 2:
        raise ArgumentError(
            f"{type(author).__name__} must be put on one dense or convolutional layer, whose kernel is the variable "
            f"with the most axes, but the variables are {', '.join(str(ArrayType.of(leaf)) for leaf in leaves)}."
        )
    return leaves[axes.index(max(axes))]


def _back_through(call: Any, y_bar: Any, kernel: Any, author: Rule) -> Cotangents:
    """Gives the variables their own cotangents, and the inputs those of the layer with another kernel."""
    most = kernel.ndim
    variables = jax.tree.map(lambda leaf: kernel if leaf.ndim == most else leaf, call.variables)
    arrays, layout = take_apart((call.inputs, call.keywords))

    def other(arrays: Any) -> Cotangents:
        inputs, keywords = layout.fill(arrays)
        return call.vjp_at(variables, *inputs, **keywords)[1](y_bar)

    used = used_arguments(lambda arrays: jax.tree.leaves(other(arrays).inputs), list(map(ArrayType.of, arrays)))
    if any(is_inexact(array) for array, is_used in zip(arrays, used, strict=True) if is_used):
        raise ArgumentError(
            f"{type(author).__name__} must be put on a layer that is linear in its inputs; leave the activation "
            "outside of the rule."
        )
    return other(arrays).replace(variables=call.pullback(y_bar).variables)
