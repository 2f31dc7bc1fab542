"""Rules for training with few bits: learned steps and clipping levels, and a quantised gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._checks import at_least, positive
from .._residuals import Residuals
from .._rule import Rule, static
from ._primals import on_kernels
from ._trees import wide


class LSQ(Rule):
    r"""Quantises what a module returns, by a step that is learned.

        forward:  v = the module's output,   y = step round(clip(v / step, -Q_N, Q_P))
        backward: v_bar = y_bar 1[-Q_N < v/step < Q_P], pulled back by the module
                  step_bar = sum_i y_bar_i d_i / sqrt(N Q_P),
                  d = round(v/step) - v/step inside, -Q_N below and Q_P above

    For weights, `Q_N = 2**(bits-1)`, `Q_P = 2**(bits-1) - 1` and N is their number; for activations, `Q_N = 0`,
    `Q_P = 2**bits - 1` and N is the number of features, without axis 0, the batch: put it on the batch, not inside of a
    `vmap` over examples. Linear in `y_bar`. A module's
    kernels are quantised by `OnKernels(LSQ(step))(mdl)`. The module returns one array.

    Args:
        step: > 0, in units of the module's output; may be a parameter. The paper starts from 2 mean|v| / sqrt(Q_P).
        bits: >= 2, or >= 1 for activations.
        activation: whether it is for activations, >= 0.

    Raises:
        ArgumentError: `step` is not positive, or `bits` too low.

    Example:
        >>> quantise = lambda step, h: LSQ(step, bits=2, activation=True)(lambda h: h)(h)
        >>> quantise(jnp.array(0.5), jnp.array([-1.0, 0.6, 9.0])).tolist()
        [0.0, 0.5, 1.5]
        >>> jax.grad(lambda h: quantise(0.5, h).sum())(jnp.array([-1.0, 0.6, 9.0])).tolist()
        [0.0, 1.0, 0.0]

    Reference:
        Esser, McKinstry, Bablani, Appuswamy, Modha (2020), arXiv:1902.08153, equations 3 and 5.
    """

    step: Float[Array, ""] | float
    bits: int = static(default=8)
    activation: bool = static(default=False)

    def __post_init__(self):
        positive(self, "step")
        at_least(self, "bits", 1 if self.activation else 2)

    def forward(self, call):
        """Quantises the module's output."""
        v = call(call.variables, *call.inputs, **call.keywords)
        return (jnp.round(jnp.clip(v / self.step, *self._levels())) * self.step).astype(v.dtype), Residuals(v=v)

    def backward(self, call, y_bar):
        """Pulls back between the levels, and gives the step its part."""
        v, (low, high) = call.residuals.v, self._levels()
        ratio = v / self.step
        inside = (low < ratio) & (ratio < high)
        slope = jnp.where(inside, jnp.round(ratio) - ratio, jnp.clip(ratio, low, high))
        size = math.prod(v.shape[1:]) if self.activation else v.size
        bar = call.pullback(jnp.where(inside, y_bar, 0))
        return bar.with_fields(step=jnp.sum(y_bar * slope) / math.sqrt(size * high))

    def _levels(self) -> tuple[int, int]:
        return (0, 2**self.bits - 1) if self.activation else (-(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1)


def _itself(kernel: Any) -> Any:
    return kernel


class OnKernels(Rule):
    r"""Runs a module with each of its kernels under a rule for functions of one array, a quantiser.

        forward:  y = the module's output at W_hat,   W_hat = rule(function)(W) for each kernel W
        backward: W_bar and the fields' cotangents = the rule's own for g,   g = the module's own cotangent of W_hat

    Kernels are the variables with two axes or more; the others stay as they are. `grad_vars` chooses among them.
    Linear in `y_bar` if the rule is.

    Args:
        rule: any that draws nothing; its fields may be parameters, such as a learned step.
        function: of one array: what the rule is put on.

    Raises:
        ArgumentError: the module has no kernel.

    Example:
        >>> weights = {"w": jnp.array([[0.3, -2.0]]), "b": jnp.array([0.25])}
        >>> layer = OnKernels(LSQ(0.5, bits=2)).lift(lambda p: p["w"] + p["b"])
        >>> layer(weights).tolist()
        [[0.75, -0.75]]
        >>> jax.grad(lambda p: layer(p).sum())(weights)["w"].tolist()
        [[1.0, 0.0]]
    """

    needs_variables = True
    rule: Rule
    function: Callable[[Any], Any] = static(default=_itself)

    @property
    def linear(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]  read from instances alone
        """Whether the rule is."""
        return self.rule.linear

    def forward(self, call):
        """Runs the module with its kernels under the rule."""
        y, pullback = call.vjp_at(self._changed(self.rule, call.variables), *call.inputs, **call.keywords)
        return y, Residuals(pullback=pullback)

    def backward(self, call, y_bar):
        """Pulls back there, and then by the rule."""
        bar = call.residuals.pullback(y_bar)
        _, pullback = jax.vjp(self._changed, self.rule, call.variables)
        rule_bar, variables_bar = pullback(bar.variables)
        return bar.replace(variables=variables_bar).with_fields(rule=rule_bar)

    def _changed(self, rule: Rule, variables: Any) -> Any:
        return on_kernels(rule(self.function), self, variables)


class PACT(Rule):
    r"""Clips and quantises what a module returns, with a clipping level that is learned.

        forward:  h = the module's output,   y = unit round(clip(h, 0, alpha) / unit),   unit = alpha / (2**bits - 1)
        backward: h_bar = y_bar 1[0 <= h < alpha], pulled back by the module;   alpha_bar = sum y_bar 1[h >= alpha]

    Linear in `y_bar`. It takes the place of a ReLU behind the module, or is put on the identity. The module returns
    one array.

    Args:
        alpha: > 0, in units of the module's output; may be a parameter.
        bits: >= 1.

    Raises:
        ArgumentError: `alpha` is not positive, or `bits` is below 1.

    Example:
        >>> pact = lambda alpha, h: PACT(alpha, bits=2)(lambda h: h)(h)
        >>> pact(jnp.array(3.0), jnp.array([-1.0, 1.2, 5.0])).tolist()
        [0.0, 1.0, 3.0]
        >>> float(jax.grad(lambda alpha: pact(alpha, jnp.array([1.2, 5.0])).sum())(3.0))
        1.0

    Reference:
        Choi, Wang, Venkataramani, Chuang, Srinivasan, Gopalakrishnan (2018), arXiv:1805.06085.
    """

    alpha: Float[Array, ""] | float
    bits: int = static(default=4)

    def __post_init__(self):
        positive(self, "alpha")
        at_least(self, "bits", 1)

    def forward(self, call):
        """Clips and quantises the module's output."""
        h = call(call.variables, *call.inputs, **call.keywords)
        unit = self.alpha / (2**self.bits - 1)
        return (jnp.round(jnp.clip(h, 0, self.alpha) / unit) * unit).astype(h.dtype), Residuals(h=h)

    def backward(self, call, y_bar):
        """Pulls back between the levels, and gives the rest to the upper one."""
        h = call.residuals.h
        bar = call.pullback(jnp.where((h >= 0) & (h < self.alpha), y_bar, 0))
        clipped = jnp.where(h >= self.alpha, y_bar, 0)
        return bar.with_fields(alpha=jnp.sum(clipped, dtype=jnp.result_type(self.alpha)))


class DoReFa(Rule):
    r"""Quantises the cotangent that flows in to a few bits, without bias, before the module's own pullback.

        y_bar' = 2 m (q(y_bar / 2m + 1/2 + noise) - 1/2),   q(z) = round((2**bits - 1) z) / (2**bits - 1)

    with m the largest |y_bar| of each example, examples along axis 0, and noise uniform on (-1/2, 1/2) / (2**bits - 1).
    Needs a key, `rule(mdl, key=key)`. Not linear in `y_bar`. The quantisers of the paper's weights and
    activations are straight-through: `RoundSTE`.

    Args:
        bits: >= 1; the paper has 2 to 6 for gradients.

    Raises:
        ArgumentError: `bits` is below 1.

    Reference:
        Zhou, Wu, Ni, Zhou, Wen, Zou (2016), arXiv:1606.06160.
    """

    linear = False
    bits: int = static(default=4)

    def __post_init__(self):
        at_least(self, "bits", 1)

    def backward(self, call, y_bar):
        """Quantises what flows in."""
        leaves, treedef = jax.tree.flatten(y_bar)
        keys = jax.random.split(call.key, len(leaves))
        return call.pullback(treedef.unflatten(map(self._quantised, keys, leaves)))

    def _quantised(self, key: Any, c: Any) -> Any:
        steps = 2**self.bits - 1
        exact = c.astype(wide(c.dtype))  # in half precision the rounding of z would be a bias
        m = jnp.max(jnp.abs(exact), axis=range(1, c.ndim), keepdims=True)
        noise = jax.random.uniform(key, c.shape, exact.dtype, -0.5, 0.5)
        z = jnp.round(steps * (exact / jnp.where(m > 0, 2 * m, 1) + 0.5) + noise) / steps
        return (2 * m * (z - 0.5)).astype(c.dtype)
