"""Rules that multiply, round or guard cotangents, leaf by leaf."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._channels import Sum
from .._checks import positive
from .._errors import ArgumentError
from .._rule import Rule, static
from ._trees import map_chosen, scale


class SignGradient(Rule):
    r"""Keeps only the sign of the variables' cotangent.

        variables_bar = sign(g),   g = the module's own cotangent of its variables, leaf by leaf.

    Not linear in `y_bar`.

    Reference:
        Bernstein, Wang, Azizzadenesheli, Anandkumar (2018), arXiv:1802.04434.
    """

    linear = False
    reads_names = False
    needs_variables = True

    def backward(self, call, y_bar):
        """Signs the variables' cotangent."""
        bar = call.pullback(y_bar)
        return bar.replace(variables=jax.tree.map(jnp.sign, bar.variables))


class ScaleGradient(Rule):
    """Multiplies the variables' cotangent, as a whole or path by path, and that of the inputs.

        variables_bar = factor * g,   inputs_bar = inputs * x_bar,   g, x_bar = the module's own cotangents.

    Args:
        factor: any real number, dimensionless; may be traced. Or a dict from choices of paths to
            numbers, such as `{"bias": 2.0, "encoder/*": 0.1}`: a name, which chooses the leaf or the
            branch of that name, or a path glob, which may start at any name of the path. A leaf that
            several choose gets the product, one that none chooses stays as it is.
        inputs: any real number, for the cotangents of all inputs; 0 stops the gradient there.

    Raises:
        ArgumentError: a choice names no variable of the module; in the backward pass.
    """

    factor: Any = 1.0
    inputs: Float[Array, ""] | float = 1.0

    def backward(self, call, y_bar):
        """Scales all of the module's own cotangents."""
        bar = call.pullback(y_bar)
        if isinstance(self.factor, Mapping):
            variables = self._by_path(bar.variables)
        else:
            variables = scale(bar.variables, self.factor)
        others = scale((bar.inputs, bar.keywords), self.inputs)
        return bar.replace(variables=variables, inputs=others[0], keywords=others[1])

    def _by_path(self, variables: Any) -> Any:
        for choice, factor in self.factor.items():
            scaled = functools.partial(scale, factor=factor)
            variables = map_chosen(choice, scaled, variables, self)
        return variables


class Freeze(Rule):
    """Gives no cotangent to the variables that are chosen, and leaves the others' and the inputs' as they are.

        variables_bar = 0 at the chosen paths.

    Args:
        where: a name, which chooses the leaf or the branch of that name; a path glob, which may start at
            any name of the path; a compiled regex; a predicate `(path, leaf) -> bool`; a list of
            these; or `True` for all.

    Raises:
        ArgumentError: no variable of the module is chosen; in the backward pass.
    """

    needs_variables = True
    where: Any = static()

    def backward(self, call, y_bar):
        """Drops the chosen cotangents."""
        bar = call.pullback(y_bar)
        return bar.replace(variables=map_chosen(self.where, lambda leaf: None, bar.variables, self))


class GradientReversal(Rule):
    r"""Reverses the gradient that leaves the module through its inputs; the module itself trains as it would.

        inputs_bar = -strength * x_bar,   x_bar = the module's own cotangent of its inputs.

    On a domain classifier, the features in front of it learn to confuse it.

    Args:
        strength: the paper's lambda, usually in [0, 1], dimensionless; may be traced. See `reversal_strength`.

    Reference:
        Ganin, Lempitsky (2015), arXiv:1409.7495; Ganin et al. (2016), arXiv:1505.07818.
    """

    reads_names = False
    strength: Float[Array, ""] | float = 1.0

    def backward(self, call, y_bar):
        """Reverses the inputs' cotangents."""
        bar = call.pullback(y_bar)
        inputs, keywords = scale((bar.inputs, bar.keywords), -self.strength)
        return bar.replace(inputs=inputs, keywords=keywords)


def reversal_strength(progress: Float[Array, ""] | float, gamma: float = 10.0) -> Float[Array, ""]:
    r"""Gives the strength of `GradientReversal` over training, from 0 to almost 1.

        lambda_p = 2 / (1 + exp(-gamma * progress)) - 1

    Args:
        progress: in [0, 1], the part of training that is done; may be traced.
        gamma: > 0, dimensionless.

    Example:
        >>> [round(float(reversal_strength(progress)), 3) for progress in (0.0, 0.1, 1.0)]
        [0.0, 0.462, 1.0]

    Reference:
        Ganin, Lempitsky (2015), arXiv:1409.7495.
    """
    return 2.0 / (1.0 + jnp.exp(-gamma * jnp.asarray(progress))) - 1.0


class CastCotangents(Rule):
    """Rounds the cotangent that flows in to another dtype, as a backward pass of that precision does.

        y_bar' = y_bar rounded to `dtype`;   then the module's own pullback, each cotangent in its primal's dtype.

    What lies beyond the range of `dtype` becomes infinite, or NaN where `dtype` has no infinity. Not
    linear in `y_bar`: it rounds.

    Args:
        dtype: a real floating dtype, such as `jnp.bfloat16`.

    Raises:
        ArgumentError: `dtype` is not one.
    """

    linear = False
    reads_names = False
    dtype: Any = static(default=jnp.bfloat16)

    def __post_init__(self):
        """Checks the dtype."""
        if not jnp.issubdtype(self.dtype, jnp.floating):
            raise ArgumentError(f"CastCotangents: `dtype` must be a real floating dtype, but is {self.dtype!r}.")

    def backward(self, call, y_bar):
        """Rounds, and pulls back."""
        return call.pullback(jax.tree.map(lambda leaf: leaf.astype(self.dtype).astype(leaf.dtype), y_bar))


class LossScaling(Rule):
    """Makes the cotangents inside the module larger by a factor, so that none is lost below a small dtype's range.

        variables_bar = pullback(scale * y_bar) / scale,   and so for the inputs.

    With a power of two, and nothing out of range, the result is the module's own, bit for bit.

    Args:
        scale: > 0, dimensionless, best a power of two; may be traced.

    Reference:
        Micikevicius et al. (2018), arXiv:1710.03740.
    """

    reads_names = False
    exact = True
    scale: Float[Array, ""] | float = 2.0**10

    def __post_init__(self):
        """Checks the scale."""
        positive(self, "scale")

    def backward(self, call, y_bar):
        """Scales, pulls back, and scales back."""
        return scale(call.pullback(scale(y_bar, self.scale)), 1.0 / self.scale)


class ZeroNonFinite(Rule):
    """Puts zero for what is NaN or infinite, and counts it if asked.

        variables_bar = g where g is finite, else 0,   g = the module's own cotangent, element by element.

    Linear, and the module's own gradient, wherever all is finite.

    Args:
        on: "variables" for the cotangent of the variables, or "output" for the one that flows in.
        zeroed: a channel `Sum(())` that counts the elements that were put to zero, or `None`.

    Raises:
        ArgumentError: `on` is another word.
    """

    reads_names = False
    on: str = static(default="variables")
    zeroed: Sum | None = None

    def __post_init__(self):
        """Checks the word."""
        if self.on not in ("variables", "output"):
            raise ArgumentError(f"ZeroNonFinite: `on` must be 'variables' or 'output', but is {self.on!r}.")

    def backward(self, call, y_bar):
        """Guards the one or the other."""
        bar = call.pullback(_guarded(y_bar) if self.on == "output" else y_bar)
        seen = y_bar if self.on == "output" else bar.variables
        bar = bar if self.on == "output" else bar.replace(variables=_guarded(seen))
        return bar if self.zeroed is None else bar.with_fields(zeroed=self.zeroed.emit(_count_non_finite(seen)))


def _guarded(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.where(jnp.isfinite(leaf), leaf, jnp.zeros_like(leaf)), tree)


def _count_non_finite(tree: Any) -> Any:
    counts = (jnp.sum(~jnp.isfinite(leaf), dtype=jnp.float32) for leaf in jax.tree.leaves(tree))
    return sum(counts, jnp.float32(0.0))
