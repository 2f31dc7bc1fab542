"""Sending less of a gradient to the other devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from .._channels import Overwrite
from .._checks import at_least
from .._errors import ArgumentError
from .._rule import Rule, static


class TopKErrorFeedback(Rule):
    r"""Keeps the k largest entries of the parameters' gradient, and what was left out for the next step.

        variables_bar = top_k(g + error),   error' = g + error - variables_bar,   g = the module's own gradient

    top_k sets all but the k entries of largest absolute value to zero, over all parameters of the module
    together. Nothing is lost: after any number of steps, what was sent and the error add up to the sum of all
    gradients. In data parallelism put it on each device's gradient, before the mean over devices. Not linear
    in `y_bar`.

    Args:
        error: an `Overwrite` channel, a vector with an entry for each parameter; zeros at first. Two uses of
            the module in one loss leave the mean of their errors.
        k: >= 1 and at most the number of parameters.

    Raises:
        ArgumentError: `k` or the channel's shape does not fit the module.

    Reference:
        Stich, Cordonnier, Jaggi (2018), arXiv:1809.07599; Lin et al. (2018), arXiv:1712.01887.
    """

    error: Overwrite
    k: int = static()
    linear = False
    needs_variables = True

    def __post_init__(self):
        at_least(self, "k", 1)

    def backward(self, call, y_bar):
        """Sends the largest, and keeps the rest."""
        bar = call.pullback(y_bar)
        gradient, unravel = ravel_pytree(bar.variables)
        error = self.error.to_arrays().value
        if error.shape != gradient.shape or self.k > gradient.size:
            raise ArgumentError(
                f"TopKErrorFeedback with k={self.k} and an error of shape {error.shape} does not fit a module with "
                f"{gradient.size} parameters."
            )
        total = gradient + error.astype(gradient.dtype)
        _, largest = jax.lax.top_k(jnp.abs(total), self.k)
        sent = jnp.zeros_like(total).at[largest].set(total[largest])
        return bar.replace(variables=unravel(sent)).with_fields(error=self.error.emit(total - sent))
