"""Surrogate gradients of spiking neurons: slopes in place of the derivative of a step at zero."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._checks import positive
from ._straight_through import AbstractSurrogate


class SuperSpike(AbstractSurrogate):
    r"""Gives a spike the slope of a fast sigmoid.

        u_bar = y_bar / (beta |u| + 1)^2

    Linear in `y_bar`. The function is a step at zero; `u` is the distance from the threshold.

    Args:
        beta: > 0, steepness, in inverse units of `u`.

    Raises:
        ArgumentError: `beta` is not positive.

    Example:
        >>> heaviside = lambda u: (u > 0).astype(u.dtype)
        >>> float(jax.grad(SuperSpike(10.0)(heaviside))(0.1))
        0.25

    Reference:
        Zenke, Ganguli (2018), arXiv:1705.11146.
    """

    beta: Float[Array, ""] | float = 10.0

    def __post_init__(self):
        positive(self, "beta")

    def slope(self, x):
        """Gives the fast sigmoid's slope, 1 at the threshold."""
        return (self.beta * jnp.abs(x) + 1) ** -2


class SigmoidDerivative(AbstractSurrogate):
    r"""Gives a spike the slope of a sigmoid.

        u_bar = y_bar beta s (1 - s),   s = 1 / (1 + exp(-beta u))

    Linear in `y_bar`. The function is a step at zero, `u` being the distance from the threshold, or a draw with
    probability s, for which this is the derivative of the mean.

    Args:
        beta: > 0, steepness, in inverse units of `u`.

    Raises:
        ArgumentError: `beta` is not positive.

    Reference:
        Neftci, Mostafa, Zenke (2019), arXiv:1901.09948, a review of surrogate gradients.
    """

    beta: Float[Array, ""] | float = 10.0

    def __post_init__(self):
        positive(self, "beta")

    def slope(self, x):
        """Gives the sigmoid's slope, beta / 4 at the threshold."""
        s = jax.nn.sigmoid(self.beta * x)
        return self.beta * s * (1 - s)


class ArcTan(AbstractSurrogate):
    r"""Gives a spike the slope of an arc tangent, arctan(pi alpha u / 2) / pi.

        u_bar = y_bar (alpha / 2) / (1 + (pi alpha u / 2)^2)

    Linear in `y_bar`. The function is a step at zero; `u` is the distance from the threshold.

    Args:
        alpha: > 0, steepness, in inverse units of `u`.

    Raises:
        ArgumentError: `alpha` is not positive.

    Reference:
        Fang, Yu, Chen, Masquelier, Huang, Tian (2021), arXiv:2007.05785.
    """

    alpha: Float[Array, ""] | float = 2.0

    def __post_init__(self):
        positive(self, "alpha")

    def slope(self, x):
        """Gives the arc tangent's slope, alpha / 2 at the threshold."""
        return self.alpha / 2 / (1 + (jnp.pi / 2 * self.alpha * x) ** 2)


class Triangle(AbstractSurrogate):
    r"""Gives a spike a slope that falls linearly to zero on both sides of the threshold.

        u_bar = y_bar gamma max(0, 1 - |u| / width)

    Linear in `y_bar`. The function is a step at zero; `u` is the distance from the threshold.

    Args:
        gamma: > 0, the slope at the threshold, in inverse units of `u`; small values dampen the gradient
            over many steps.
        width: > 0, in units of `u`; the paper's threshold.

    Raises:
        ArgumentError: `gamma` or `width` is not positive.

    Reference:
        Bellec, Salaj, Subramoney, Legenstein, Maass (2018), arXiv:1803.09574.
    """

    gamma: Float[Array, ""] | float = 0.3
    width: Float[Array, ""] | float = 1.0

    def __post_init__(self):
        positive(self, "gamma")
        positive(self, "width")

    def slope(self, x):
        """Gives the triangle."""
        return self.gamma * jnp.maximum(0, 1 - jnp.abs(x) / self.width)
