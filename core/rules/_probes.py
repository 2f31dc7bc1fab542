"""Rules that only watch: the gradients stay as they are, and what was seen leaves through channels."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from .._channels import Channel, Sum
from .._errors import ArgumentError
from .._rule import Rule, static
from ._dense import dense_layer
from ._trees import norm, wide


class Probe(Rule):
    r"""Tells a statistic of a call's cotangents.

    The gradients are the module's own, bit for bit, and what is not asked for is not computed: compiled
    without a gradient of `tap`, the rule costs nothing.

    Args:
        tap: a channel of the statistic's shape. A `Sum` adds over calls, a `Stack` keeps the steps of a scan apart.
        of: what to look at: the cotangents of the `"output"`, of the `"inputs"` or of the `"variables"`.
        statistic: from a pytree of arrays to an array: the l2 norm of all of them, or `max_abs`, a `Histogram`
            or a function of yours.

    Raises:
        ArgumentError: `of` is another word.
    """

    tap: Channel
    of: str = static(default="output")
    statistic: Callable[[PyTree], Array] = static(default=norm)
    exact = True

    def __post_init__(self):
        if self.of not in ("output", "inputs", "variables"):
            raise ArgumentError(f"`of` must be 'output', 'inputs' or 'variables', but is {self.of!r}.")

    def backward(self, call, y_bar):
        """Emits the statistic."""
        bar = call.pullback(y_bar)
        seen = {"output": y_bar, "inputs": bar.inputs, "variables": bar.variables}[self.of]
        return bar.with_fields(tap=self.tap.emit(self.statistic(seen)))


class FirstNaN(Rule):
    r"""Tells whether a NaN or infinity of the backward pass comes from this call.

        made_here = all of y_bar is finite and some cotangent of the inputs or the variables is not

    Put on every layer with a tap each, it is 1 where a gradient first stopped being finite, and 0 in the
    layers that only passed it on. If no layer says 1, the loss gave it. The gradients are the module's own.

    Args:
        made_here: a channel of shape (); a `Sum` counts the calls, a `Stack` has one number a step of a scan.
    """

    made_here: Channel
    exact = True

    def backward(self, call, y_bar):
        """Emits 1 or 0."""
        bar = call.pullback(y_bar)
        here = _all_finite(y_bar) & ~_all_finite(bar)
        return bar.with_fields(made_here=self.made_here.emit(here.astype(float)))


class KroneckerFactors(Rule):
    r"""Tells the two factors of a dense layer's block of the Fisher matrix, as K-FAC has it.

        A = mean over rows of a a^T,   G = mean over rows of c c^T,   block = A kron G

    with a = a row of the input, with a 1 after it if the layer has a bias, and c = that row of `y_bar`. The
    loss is to be a sum over the examples: a mean makes G smaller by the square of their number. The gradients
    are the module's own.

    Args:
        inputs: a channel of shape (in + 1, in + 1), or (in, in) without a bias.
        outputs: a channel of shape (out, out).

    Raises:
        ArgumentError: the call is not that of one dense layer.

    Reference:
        Martens, Grosse (2015), arXiv:1503.05671.
    """

    inputs: Sum
    outputs: Sum
    exact = True
    needs_variables = True

    def backward(self, call, y_bar):
        """Emits both factors."""
        layer = dense_layer(call, y_bar)
        if layer is None:
            raise ArgumentError(f"{type(self).__name__} must be put on a dense layer, x @ kernel + bias, alone.")
        x, has_bias = layer
        a = jnp.concatenate([x, jnp.ones((*x.shape[:-1], int(has_bias)), x.dtype)], axis=-1)
        return call.pullback(y_bar).with_fields(
            inputs=self.inputs.emit(_second_moment(a)), outputs=self.outputs.emit(_second_moment(y_bar))
        )


@dataclasses.dataclass(frozen=True)
class Histogram:
    """A statistic: how many entries of all arrays lie between each edge and the next, as `numpy.histogram` counts.

    Args:
        edges: increasing numbers, one more than there are counts.

    Example:
        >>> Histogram((-1.0, 0.0, 1.0))(jnp.array([-0.5, 0.5, 0.75, 3.0])).tolist()
        [1.0, 2.0]
    """

    edges: tuple[float, ...]

    def __call__(self, tree: PyTree) -> Float[Array, " counts"]:
        """Counts."""
        edges = jnp.array(self.edges)
        counts = [jnp.histogram(leaf, edges)[0] for leaf in jax.tree.leaves(tree)]
        return sum(counts, jnp.zeros(len(self.edges) - 1))


def max_abs(tree: PyTree) -> Float[Array, ""]:
    """Gives the largest absolute value of all arrays: a statistic for `Probe`."""
    leaves = [jnp.max(jnp.abs(leaf), initial=0) for leaf in jax.tree.leaves(tree)]
    return jnp.max(jnp.stack([leaf.astype(wide(leaf.dtype)) for leaf in leaves])) if leaves else jnp.zeros(())


def _all_finite(tree: PyTree) -> Any:
    return jnp.all(jnp.array([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def _second_moment(rows: Float[Array, "*batch n"]) -> Float[Array, "n n"]:
    flat = rows.reshape(-1, rows.shape[-1]).astype(wide(rows.dtype))
    return flat.T @ flat / len(flat)
