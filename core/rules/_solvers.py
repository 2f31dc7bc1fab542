"""Gradients past a combinatorial solver."""

from __future__ import annotations

from jaxtyping import Array, Float

from .._checks import positive
from .._cotangents import Cotangents
from .._rule import Rule
from ._primals import only_input


class BlackBoxSolver(Rule):
    r"""Differentiates a solver of a linear problem by running it once more, at costs that the loss has moved.

        y(w) = argmin over feasible y of w.y;    w_bar = (y(w + lambda_ y_bar) - y(w)) / lambda_

    It is the exact gradient of a piecewise linear function of w that interpolates the loss, linearised at y(w). Not
    linear in `y_bar`. The solver is a function of the costs alone, and returns an array of their shape; it may run on
    the host, by `jax.pure_callback`. A solver that maximises is one that minimises at -w.

    Args:
        lambda_: > 0, in units of the costs over those of `y_bar`: how far the costs are moved. Small
            values give zero nearly everywhere, large ones interpolate coarsely.

    Raises:
        ArgumentError: `lambda_` is not positive, or the function does not have one array as input and no variables.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> cheapest = lambda w: jax.nn.one_hot(jnp.argmin(w), w.size)
        >>> pay = lambda w: BlackBoxSolver(2.0)(cheapest)(w) @ jnp.array([5.0, 1.0])
        >>> jax.grad(pay)(jnp.array([1.0, 2.0])).tolist()  # to pay less, raise the first cost
        [-0.5, 0.5]

    Reference:
        Vlastelica, Paulus, Musil, Martius, Rolínek (2020), arXiv:1912.02175, algorithm 1.
    """

    linear = False
    lambda_: Float[Array, ""] | float

    def __post_init__(self):
        positive(self, "lambda_")

    def backward(self, call, y_bar):
        """Solves again."""
        w = only_input(call, self)
        moved = call(call.variables, (w + self.lambda_ * y_bar).astype(w.dtype), **call.keywords)
        return Cotangents((((moved - call.output) / self.lambda_).astype(w.dtype),), None)
