"""Rules for calls that draw: relaxed and second-order straight-through samples, REINFORCE, shaken branches."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._checks import positive
from .._errors import ArgumentError
from .._residuals import Residuals
from .._rule import Rule


class StraightThroughGumbelSoftmax(Rule):
    r"""Draws a category from a module's logits, and differentiates the softmax of the perturbed logits instead.

        forward:  z = logits + Gumbel noise,   y = onehot(argmax z)
        backward: logits_bar = p (y_bar - sum(p y_bar)) / tau,   p = softmax(z / tau), pulled back by the module
                  tau_bar = -sum(logits_bar z) / tau

    Linear in `y_bar`. Categories are on the last axis. Needs a key, `rule(mdl, key=key)`. The module returns one array.

    Args:
        temperature: > 0, the paper's tau, in units of the logits; may be a parameter, or annealed.

    Raises:
        ArgumentError: `temperature` is not positive.

    Example:
        >>> draw = StraightThroughGumbelSoftmax(0.5)(lambda logits: logits, key=jax.random.key(0))
        >>> float(draw(jnp.zeros(3)).sum())
        1.0

    Reference:
        Jang, Gu, Poole (2017), arXiv:1611.01144.
    """

    temperature: Float[Array, ""] | float = 1.0

    def __post_init__(self):
        positive(self, "temperature")

    def forward(self, call):
        """Draws."""
        logits = call(call.variables, *call.inputs, **call.keywords)
        z = logits + jax.random.gumbel(call.key, logits.shape, logits.dtype)
        return _onehot(jnp.argmax(z, -1), logits), Residuals(z=z)

    def backward(self, call, y_bar):
        """Pulls back through the softmax."""
        z = call.residuals.z
        tau = jnp.asarray(self.temperature, z.dtype)
        z_bar = _through_softmax(jax.nn.softmax(z / tau), y_bar) / tau
        tau_bar = -jnp.sum(z_bar * z / tau, dtype=jnp.result_type(self.temperature))
        return call.pullback(z_bar).with_fields(temperature=tau_bar)


class ReinMax(Rule):
    r"""Draws a category from a module's logits, with a gradient of second order.

        forward:  y = onehot(k),   k ~ p = softmax(logits)
        backward: logits_bar = 2 J(q) y_bar - J(p) y_bar / 2,   q = (p + y) / 2,   J(p) = diag(p) - p p^T,
                  pulled back by the module

    The mean over draws is the gradient of the expected loss for any quadratic function of y; of plain straight-through
    it is so for linear ones. Linear in `y_bar`. Categories are on the last axis. Needs a key, `rule(mdl, key=key)`. The
    module returns one array. The paper's temperature is 1 here.

    Reference:
        Liu, Dong, Liu, Yu, Gao (2023), arXiv:2304.08612.
    """

    def forward(self, call):
        """Draws."""
        logits = call(call.variables, *call.inputs, **call.keywords)
        return _onehot(jax.random.categorical(call.key, logits), logits), Residuals(p=jax.nn.softmax(logits))

    def backward(self, call, y_bar):
        """Pulls back by Heun's rule."""
        p = call.residuals.p
        q = (p + call.output) / 2
        return call.pullback(2 * _through_softmax(q, y_bar) - _through_softmax(p, y_bar) / 2)


def _onehot(k: Any, logits: Any) -> Any:
    return jax.nn.one_hot(k, logits.shape[-1], dtype=logits.dtype)


def _through_softmax(p: Any, c: Any) -> Any:
    return p * (c - jnp.sum(p * c, -1, keepdims=True))


class ScoreFunction(Rule):
    r"""Differentiates the mean of a cost over what the function draws, by the score of the draw.

    The function draws by itself, and returns `(cost, log_prob)`: what it cost, and the log-probability of what it drew,
    of one shape. The cost may be a black box.

        (cost, log_prob)_bar' = (cost_bar, log_prob_bar + cost_bar (cost - baseline)),   pulled back by the function

    With a loss of `cost` alone, the mean over draws is the gradient of the mean cost, whatever the baseline. Linear in
    `y_bar`. The baseline gets no cotangent.

    Args:
        baseline: in units of the cost, of its shape or a scalar; any value that does not depend on the draw.

    Raises:
        ArgumentError: the function does not return two arrays of one shape.

    Example:
        >>> def coin(logit, heads):  # drawn outside
        ...     return jnp.where(heads, 3.0, 1.0), jax.nn.log_sigmoid(jnp.where(heads, logit, -logit))
        >>> cost = lambda logit, heads: ScoreFunction(2.0).lift(coin)(logit, heads)[0]
        >>> grads = [float(jax.grad(cost)(0.0, heads)) for heads in (False, True)]
        >>> sum(grads) / 2  # as of 1 + 2 sigmoid(logit)
        0.5

    Reference:
        Williams (1992), doi:10.1007/BF00992696.
    """

    baseline: Float[Array, "*dims"] | float = 0.0

    symbolic_zeros = False

    def backward(self, call, y_bar):
        """Weighs the score by the cost."""
        shapes = [leaf.shape for leaf in jax.tree.leaves(call.output)]
        if not isinstance(call.output, tuple) or len(shapes) != 2 or shapes[0] != shapes[1]:
            raise ArgumentError(
                f"{self.described()} expects a function that returns (cost, log_prob), two arrays of one shape, but "
                f"it returns {type(call.output).__name__} with arrays of shapes {shapes}."
            )
        (cost, _), (cost_bar, log_prob_bar) = call.output, y_bar
        return call.pullback((cost_bar, log_prob_bar + cost_bar * (cost - jnp.asarray(self.baseline, cost.dtype))))


class ShakeShake(Rule):
    r"""Mixes two branches at random, by other weights in the backward pass than in the forward pass.

    The function under it joins the branches as at test time: `lambda a, b: (a + b) / 2`. With that,

        forward:  y = alpha a + (1 - alpha) b,    alpha uniform on [0, 1) for each example
        backward: a_bar = beta y_bar,   b_bar = (1 - beta) y_bar,    beta likewise, drawn anew

    In general, the two inputs of the function are multiplied by 2 alpha and 2 (1 - alpha), and their cotangents, pulled
    back there, by 2 beta and 2 (1 - beta). Linear in `y_bar`. Examples are along axis 0. Needs a key.

    Raises:
        ArgumentError: the function does not have two arrays as inputs.

    Example:
        >>> join = ShakeShake()(lambda a, b: (a + b) / 2, key=jax.random.key(0))
        >>> y = join(jnp.ones((4, 2)), jnp.ones((4, 2)))
        >>> bool(jnp.allclose(y, 1))
        True

    Reference:
        Gastaldi (2017), arXiv:1705.07485: the variant "Shake-Shake-Image".
    """

    def forward(self, call):
        """Joins the shaken branches."""
        y, pullback = call.vjp_at(call.variables, *self._shaken(call, 0, call.inputs), **call.keywords)
        return y, Residuals(pullback=pullback)

    def backward(self, call, y_bar):
        """Pulls back there, and shakes again."""
        bar = call.residuals.pullback(y_bar)
        return bar.replace(inputs=self._shaken(call, 1, bar.inputs))

    def _shaken(self, call: Any, draw: int, branches: Any) -> tuple[Any, Any]:
        if len(branches) != 2 or any(jax.tree.structure(x) != jax.tree.structure(0) for x in branches):
            raise ArgumentError(
                f"{self.described()} expects a function of two arrays, its branches, but got {len(branches)}."
            )
        a, b = branches
        key = jax.random.fold_in(call.key, draw)
        alpha = jax.random.uniform(key, (*a.shape[:1], *(1,) * (a.ndim - 1)), a.dtype)
        return 2 * alpha * a, 2 * (1 - alpha) * b
