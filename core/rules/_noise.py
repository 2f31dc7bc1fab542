"""Rules that draw: noise on the gradient, and rounding and dropping without bias."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .._checks import non_negative, positive, probability, scalar
from .._errors import ArgumentError
from .._rule import Rule, static
from ._trees import scale


class GradientNoise(Rule):
    r"""Adds normal noise, which decays over training, to the variables' cotangent.

        variables_bar = g + N(0, sigma_t^2),   sigma_t^2 = eta / (1 + step)^gamma,   g = the module's own cotangent.

    Needs a key, `rule(mdl, key=key)`; the key is split once for each leaf. Under `vmap` the lanes of one key get the
    same noise. Not linear in `y_bar`.

    Args:
        eta: >= 0, a variance, in squared units of the gradient; the paper chooses among 0.01, 0.3 and 1.
        step: >= 0, the number of steps that are done; may be traced.
        gamma: >= 0, dimensionless.

    Reference:
        Neelakantan et al. (2015), arXiv:1511.06807, equation 1.
    """

    linear = False
    needs_variables = True
    eta: Float[Array, ""] | float = 0.01
    step: Int[Array, ""] | Float[Array, ""] | float = 0.0
    gamma: Float[Array, ""] | float = 0.55

    def __post_init__(self):
        """Checks the numbers."""
        for name in ("eta", "step", "gamma"):
            non_negative(self, name)

    def backward(self, call, y_bar):
        """Adds the noise."""
        bar = call.pullback(y_bar)
        eta, step, gamma = (jnp.asarray(number).astype(float) for number in (self.eta, self.step, self.gamma))
        sigma = jnp.sqrt(eta / (1.0 + step) ** gamma)
        return bar.replace(variables=_with_keys(call.key, lambda key, leaf: _noisy(key, leaf, sigma), bar.variables))


def _noisy(key: Any, leaf: Any, sigma: Any) -> Any:
    return leaf + scale(jax.random.normal(key, leaf.shape, leaf.dtype), sigma)


class KeepWithProbability(Rule):
    r"""Keeps each element of the cotangent that flows in with a probability, and makes up for the others.

        y_bar' = y_bar * b / probability,   b ~ Bernoulli(probability) for each element;   then the module's pullback.

    The mean over keys is the module's own gradient. Needs a key, `rule(mdl, key=key)`; the key is
    split once for each leaf. Linear in `y_bar` for one key.

    Args:
        probability: in (0, 1], dimensionless; may be traced.

    Raises:
        ArgumentError: `probability` is outside.
    """

    probability: Float[Array, ""] | float = 0.5

    def __post_init__(self):
        """Checks the probability."""
        probability(self, "probability")
        positive(self, "probability")

    def backward(self, call, y_bar):
        """Drops, and pulls back."""
        scalar(self, "probability")
        return call.pullback(_with_keys(call.key, self._kept, y_bar))

    def _kept(self, key: Any, leaf: Any) -> Any:
        kept = jax.random.bernoulli(key, self.probability, leaf.shape)
        return jnp.where(kept, scale(leaf, 1.0 / self.probability), jnp.zeros_like(leaf))


class StochasticRounding(Rule):
    r"""Rounds the cotangent that flows in to fewer bits, up or down by chance, so that its mean stays.

        y_bar' = y_bar rounded to `mantissa_bits`, up with probability (y_bar - below) / (above - below)

    where `below` and `above` are the neighbours with that many bits, and then the module's own
    pullback. The exponent keeps float32's range, which is that of bfloat16. Values that are not
    finite stay. Needs a key, `rule(mdl, key=key)`; the key is split once for each leaf. Not linear in `y_bar`.

    Args:
        mantissa_bits: 0 to 22, without the leading one: 7 for bfloat16, 10 for TF32 and float16.

    Raises:
        ArgumentError: `mantissa_bits` is outside.

    Reference:
        Gupta, Agrawal, Gopalakrishnan, Narayanan (2015), arXiv:1502.02551, who round to fixed point.
    """

    linear = False
    mantissa_bits: int = static(default=7)

    def __post_init__(self):
        """Checks the number of bits."""
        if not 0 <= self.mantissa_bits <= 22:
            raise ArgumentError(f"StochasticRounding: `mantissa_bits` must be 0 to 22, but is {self.mantissa_bits!r}.")

    def backward(self, call, y_bar):
        """Rounds, and pulls back."""
        return call.pullback(_with_keys(call.key, self._rounded, y_bar))

    def _rounded(self, key: Any, leaf: Any) -> Any:
        if jnp.iscomplexobj(leaf):
            keys = jax.random.split(key)
            return jax.lax.complex(self._rounded(keys[0], leaf.real), self._rounded(keys[1], leaf.imag))
        dropped = 23 - self.mantissa_bits
        value = leaf.astype(jnp.float32)
        bits = jax.lax.bitcast_convert_type(value, jnp.uint32)
        chance = jax.random.bits(key, leaf.shape, jnp.uint32) >> jnp.uint32(32 - dropped)
        # Added below the last bit that stays, the chance carries into it with the right probability.
        rounded = (bits + chance) >> jnp.uint32(dropped) << jnp.uint32(dropped)
        result = jax.lax.bitcast_convert_type(rounded, jnp.float32)
        return jnp.where(jnp.isfinite(value), result, value).astype(leaf.dtype)


def _with_keys(key: Any, fn: Any, tree: Any) -> Any:
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(key, max(1, len(leaves)))
    return jax.tree.unflatten(treedef, [fn(keys[index], leaf) for index, leaf in enumerate(leaves)])
