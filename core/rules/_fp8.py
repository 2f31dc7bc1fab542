"""Eight-bit floats: layers that calculate with fp8 numbers, scaled by what the last steps have seen."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from .._channels import Overwrite
from .._errors import ArgumentError
from .._residuals import Residuals
from .._rule import Rule


class DelayedScale(NamedTuple):
    """The range of one tensor, as the last steps have seen it."""

    scale: Overwrite
    """What the tensor was divided by, a scalar > 0."""

    amax_history: Overwrite
    """Its largest absolute values, a vector as long as what is remembered; zeros were not seen yet."""

    @classmethod
    def start(cls, length: int = 1024) -> DelayedScale:
        """Makes one that has seen nothing, of scale 1.

        Args:
            length: how many steps are remembered, >= 1.
        """
        return cls(Overwrite(jnp.ones(())), Overwrite(jnp.zeros(length)))


class Fp8DelayedScaling(Rule):
    r"""Runs a dense layer, or any other product with one kernel, on fp8 numbers with delayed scaling.

        q(a) = s round(clip(a / s, -m, m)),   s = max(amax_history) / m
        y = f(q(w), q(x)),   w_bar, x_bar = the pullback of f, linearised at (q(w), q(x)), of q(y_bar)
        amax_history: the oldest entry leaves, and max |a| is put in front

    with m and the rounding of E4M3 for the kernel and the input, of E5M2 for `y_bar`. So the scale of a step
    follows from the steps before it, and the old one stays while nothing was seen or something infinite. What
    is not rounded, a bias, gets the cotangent of `y_bar` itself. Not linear in `y_bar`.

    The scales and histories leave through channels: `rule, _ = cv.settle(rule, grads)` once a step. A layer
    that a step does not use keeps them, and one that it uses several times gets the mean over the uses.

    The input is kept for the backward pass in fp8, one byte an entry.

    Args:
        input: of the first input.
        kernel: of the one array with two axes or more among the variables and the other inputs.
        output_grad: of `y_bar`.

    Raises:
        ArgumentError: there are several kernels, or none.

    Reference:
        Micikevicius et al. (2022), arXiv:2209.05433. Delayed scaling is that of Transformer Engine; the
        numbers are those of `flax.linen.fp8_ops`.
    """

    input: DelayedScale = dataclasses.field(default_factory=DelayedScale.start)
    kernel: DelayedScale = dataclasses.field(default_factory=DelayedScale.start)
    output_grad: DelayedScale = dataclasses.field(default_factory=DelayedScale.start)
    linear = False

    def forward(self, call: Any) -> Any:
        """Runs the layer on the rounded kernel and input."""
        x = call.inputs[0]
        kept = _round(x, _scale(self.input, jnp.float8_e4m3fn), jnp.float8_e4m3fn)
        variables, inputs = self._primals(call, kept, x.dtype)
        return call(variables, *inputs, **call.keywords), Residuals(x=kept, amax=_amax(x), dtype=x.dtype)

    def backward(self, call: Any, y_bar: Any) -> Any:
        """Pulls the rounded cotangent back, and tells what was seen."""
        kept = call.residuals
        variables, inputs = self._primals(call, kept.x, kept.dtype)
        _, pull = call.vjp_at(variables, *inputs, **call.keywords)
        bar, unrounded = pull(_rounded(y_bar, self.output_grad, jnp.float8_e5m2)), pull(y_bar)
        bar = bar.replace(variables=jax.tree.map(_of_kernel, bar.variables, unrounded.variables))
        return bar.with_fields(
            input=_seen(self.input, jnp.float8_e4m3fn, kept.amax),
            kernel=_seen(self.kernel, jnp.float8_e4m3fn, _amax(_kernel(call))),
            output_grad=_seen(self.output_grad, jnp.float8_e5m2, _amax(y_bar)),
        )

    def _primals(self, call: Any, x: Any, dtype: Any) -> tuple[PyTree, tuple[Any, ...]]:
        """Gives the variables and the inputs with the kernel rounded, and the first input as it was kept."""
        kernel = _rounded(_kernel(call), self.kernel, jnp.float8_e4m3fn)
        variables, others = jax.tree.map(
            lambda leaf: kernel if jnp.ndim(leaf) > 1 else leaf, (call.variables, call.inputs[1:])
        )
        return variables, (_value(x, _scale(self.input, jnp.float8_e4m3fn), dtype), *others)


def _kernel(call: Any) -> Float[Array, ...]:
    kernels = [leaf for leaf in jax.tree.leaves((call.variables, call.inputs[1:])) if jnp.ndim(leaf) > 1]
    if len(kernels) != 1:
        raise ArgumentError(
            "Fp8DelayedScaling rounds one kernel, an array with two axes or more among the variables and the inputs "
            f"after the first, but there are {len(kernels)}. Put it on each layer, with scales of its own."
        )
    return kernels[0]


def _scale(of: DelayedScale, dtype: Any) -> Float[Array, ""]:
    """Gives the scale of this step; in the order of operations of flax, to the last bit."""
    amax, top = jnp.max(of.amax_history.value), jnp.finfo(dtype).max.astype(of.scale.value.dtype)
    return 1 / jnp.where((amax > 0) & jnp.isfinite(amax), top / amax, 1 / of.scale.value)


def _round(a: Any, scale: Any, dtype: Any) -> Any:
    top = jnp.finfo(dtype).max.astype(a.dtype)
    return jnp.clip(a / scale.astype(a.dtype), -top, top).astype(dtype)


def _value(rounded: Any, scale: Any, dtype: Any) -> Any:
    return rounded.astype(dtype) * scale.astype(dtype)


def _rounded(a: Any, of: DelayedScale, dtype: Any) -> Any:
    scale = _scale(of, dtype)
    return _value(_round(a, scale, dtype), scale, a.dtype)


def _of_kernel(bar: Any, unrounded: Any) -> Any:
    return bar if bar.ndim > 1 else unrounded


def _amax(a: Any) -> Float[Array, ""]:
    return jnp.max(jnp.abs(a))


def _seen(of: DelayedScale, dtype: Any, amax: Any) -> DelayedScale:
    history = of.amax_history.value
    history = jnp.roll(history, -1).at[0].set(amax.astype(history.dtype))
    return DelayedScale(of.scale.emit(_scale(of, dtype)), of.amax_history.emit(history))
