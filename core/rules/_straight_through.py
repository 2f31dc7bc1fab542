"""Straight-through estimators: a slope in place of the derivative of a step, and binary weights."""

from __future__ import annotations

import abc
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from .._checks import positive
from .._cotangents import Cotangents
from .._residuals import Residuals
from .._rule import Rule, static
from ._primals import on_kernels, only_input
from ._trees import unit_axes


class AbstractSurrogate(Rule):
    """Gives an elementwise function of one array another slope in the backward pass.

        x_bar = y_bar * slope(x);   the forward pass is the function's own, bit for bit.

    Put it on a function of its input alone; a module with variables is refused.
    """

    @abc.abstractmethod
    def slope(self, x: Float[Array, "*dims"]) -> Float[Array, "*dims"]:
        """Gives what stands for the derivative, shaped like `x`."""

    def backward(self, call, y_bar):
        """Multiplies by the slope."""
        x = only_input(call, self)
        return Cotangents(((y_bar * self.slope(x)).astype(x.dtype),), None)


class RoundSTE(AbstractSurrogate):
    r"""Passes the cotangent straight through a rounding function.

        x_bar = y_bar

    Linear in `y_bar`. The forward pass is the function's own: `jnp.round`, `jnp.floor` or another; unlike
    `x + stop_gradient(round(x) - x)` it rounds exactly.

    Example:
        >>> import jax
        >>> float(jax.grad(RoundSTE()(jnp.round))(2.6))
        1.0

    Reference:
        Bengio, Léonard, Courville (2013), arXiv:1308.3432.
    """

    def slope(self, x):
        """Gives 1."""
        return jnp.ones_like(x)


class SignSTE(AbstractSurrogate):
    r"""Passes the cotangent straight through a sign function, where its input has not saturated.

        x_bar = y_bar * 1[|x| <= limit]

    Linear in `y_bar`. The forward pass is the function's own: `jnp.sign`, or one that makes +1 of 0.

    Args:
        limit: > 0, in units of the input; `jnp.inf` for no saturation.

    Raises:
        ArgumentError: `limit` is not positive.

    Example:
        >>> import jax
        >>> jax.grad(lambda x: SignSTE()(jnp.sign)(x).sum())(jnp.array([-0.5, 2.0])).tolist()
        [1.0, 0.0]

    Reference:
        Courbariaux, Hubara, Soudry, El-Yaniv, Bengio (2016), arXiv:1602.02830.
    """

    limit: Float[Array, ""] | float = 1.0

    def __post_init__(self):
        positive(self, "limit")

    def slope(self, x):
        """Gives 1 up to the limit."""
        return (jnp.abs(x) <= self.limit).astype(x.dtype)


class HardSigmoidSTE(AbstractSurrogate):
    r"""Gives a binary neuron the slope of its firing probability, the hard sigmoid clip((x + 1) / 2, 0, 1).

        x_bar = y_bar * 1[|x| <= 1] / 2

    Linear in `y_bar`. The forward pass is the function's own, with values 0 and 1: a draw with that probability, for
    which this is the derivative of the mean, or a step.

    Example:
        >>> import jax
        >>> neuron = lambda x: jax.random.bernoulli(jax.random.key(0), jnp.clip((x + 1) / 2, 0, 1)).astype(x.dtype)
        >>> float(jax.grad(HardSigmoidSTE()(neuron))(0.3))
        0.5

    Reference:
        Bengio, Léonard, Courville (2013), arXiv:1308.3432; Courbariaux et al. (2016), arXiv:1602.02830.
    """

    def slope(self, x):
        """Gives the hard sigmoid's derivative."""
        return (jnp.abs(x) <= 1).astype(x.dtype) / 2


class XNORWeights(Rule):
    r"""Runs a module with binary kernels, each filter a sign times one scale.

        forward:  W_binary = alpha sign(W),   alpha = mean |W| over the filter,   sign(0) = 1
        backward: W_bar = g (1/n + alpha 1[|W| <= 1]),   g = the module's own cotangent of W_binary, n weights a filter

    Linear in `y_bar`. Kernels are the variables with two axes or more; the others stay as they are.

    Args:
        unit_axis: the axis of the filters: -1 for kernels of Linen, NNX and Haiku, which end in the
            output channels; 0 for those of Equinox, which start with them.

    Raises:
        ArgumentError: the module has no kernel.

    Reference:
        Rastegari, Ordonez, Redmon, Farhadi (2016), arXiv:1603.05279.
    """

    needs_variables = True
    unit_axis: int = static(default=-1)

    def forward(self, call):
        """Runs the module with binary kernels."""
        binary = on_kernels(lambda w: self._alpha(w) * jnp.where(w >= 0, 1, -1).astype(w.dtype), self, call.variables)
        y, pullback = call.vjp_at(binary, *call.inputs, **call.keywords)
        return y, Residuals(pullback=pullback)

    def backward(self, call, y_bar):
        """Pulls back there, and straight through the sign."""
        bar = call.residuals.pullback(y_bar)
        return bar.replace(variables=on_kernels(self._through, self, bar.variables, call.variables))

    def _alpha(self, w: Any) -> Any:
        return jnp.mean(jnp.abs(w), axis=unit_axes(w.ndim, self.unit_axis), keepdims=True)

    def _through(self, g: Any, w: Any) -> Any:
        alpha = self._alpha(w)
        return g * (alpha.size / w.size + alpha * (jnp.abs(w) <= 1).astype(w.dtype))
