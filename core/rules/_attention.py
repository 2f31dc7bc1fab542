"""`BlockwiseAttention`: softmax attention without its matrix of probabilities."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from .._checks import at_least
from .._cotangents import Cotangents
from .._errors import ArgumentError
from .._residuals import Residuals
from .._rule import Rule, static
from ._trees import wide


class BlockwiseAttention(Rule):
    r"""Computes softmax attention for one block of keys after the other, forwards and backwards.

        S = scale q k^T,   P = softmax(S) over the keys,   y = P v;   kept: the inputs, y, and L = logsumexp(S)
        backward, block by block:   P = exp(S - L),   D = rowsum(y_bar * y),   S_bar = P * (y_bar v^T - D)
                                    v_bar = P^T y_bar,   q_bar = scale S_bar k,   k_bar = scale S_bar^T q

    Put it on a function that computes just this, without a bias or mask of its own, such as
    `jax.nn.dot_product_attention`: what the function itself would compute is not looked at. The largest
    temporary has `block` columns. Softmax and sums are at least in float32.

    Args:
        block: >= 1, divides the number of keys; a larger one counts as that number.
        causal: query i sees the keys up to i.
        scale: of the scores; 1 / sqrt(features) by default.

    Raises:
        ArgumentError: `block` is below 1 or does not divide the number of keys, or the inputs are not three
            arrays of shape (..., length, heads, features) with the same heads and features, v's features apart.

    Reference:
        Dao, Fu, Ermon, Rudra, Ré (2022), arXiv:2205.14135.
    """

    block: int = static(default=128)
    causal: bool = static(default=False)
    scale: float | None = static(default=None)

    exact = True

    def __post_init__(self) -> None:
        at_least(self, "block", 1)

    def forward(self, call: Any) -> Any:
        """Sums up blocks under a running maximum."""
        q, k, v = self._checked(call)

        def step(start: Any, carry: Any) -> Any:
            y, top, total = carry
            s = self._scores(q, k, start)  # (..., heads, queries, block)
            new = jnp.maximum(top, s.max(-1))
            p, shrink = jnp.exp(s - new[..., None]), jnp.exp(top - new)
            y = y * shrink[..., None] + _product("...hqk,...khd->...hqd", p, self._cut(v, start))
            return y, new, total * shrink + p.sum(-1)

        zeros = jnp.zeros_like(jax.eval_shape(lambda: _product("...qhd,...khe->...hqe", q, v)))
        least = jnp.full_like(zeros[..., 0], -jnp.inf)
        y, top, total = jax.lax.fori_loop(0, self._blocks(k), step, (zeros, least, zeros[..., 0]))
        y = jnp.swapaxes(y / total[..., None], -2, -3).astype(q.dtype)  # (..., queries, heads, features)
        return y, Residuals(logsumexp=top + jnp.log(total))

    def backward(self, call: Any, y_bar: Any) -> Any:
        """Computes each block's probabilities again."""
        (q, k, v), rowsum = call.inputs, _product("...qhd,...qhd->...hq", y_bar, call.output)

        def step(q_bar: Any, start: Any) -> Any:
            p = jnp.exp(self._scores(q, k, start) - call.residuals.logsumexp[..., None])
            p_bar = _product("...qhd,...khd->...hqk", y_bar, self._cut(v, start))
            s_bar = p * (p_bar - rowsum[..., None]) * self._factor(q)
            q_bar += _product("...hqk,...khd->...qhd", s_bar, self._cut(k, start))
            return q_bar, (_product("...hqk,...qhd->...khd", s_bar, q), _product("...hqk,...qhd->...khd", p, y_bar))

        zeros = jnp.zeros_like(q, wide(q.dtype))
        q_bar, blocks = jax.lax.scan(step, zeros, jnp.arange(self._blocks(k)))
        k_bar, v_bar = (jnp.moveaxis(bar, 0, -4).reshape(x.shape) for bar, x in zip(blocks, (k, v), strict=True))
        return Cotangents([bar.astype(x.dtype) for bar, x in zip((q_bar, k_bar, v_bar), (q, k, v), strict=True)], None)

    def _checked(self, call: Any) -> Any:
        shapes = [jnp.shape(x) for x in call.inputs]
        fits = len(shapes) == 3 and not call.keywords and not jax.tree.leaves(call.variables)
        fits = fits and all(len(shape) > 2 for shape in shapes) and len({shape[:-3] for shape in shapes}) == 1
        if not (fits and shapes[0][-2:] == shapes[1][-2:] and shapes[1][-3:-1] == shapes[2][-3:-1]):
            raise ArgumentError(
                f"{self!r} must be put on a function of three arrays q, k, v of shape (..., length, heads, features), "
                f"with as many heads in each, but this has inputs of shapes {shapes}, keywords "
                f"{sorted(call.keywords)} and {len(jax.tree.leaves(call.variables))} variables."
            )
        keys = shapes[1][-3]
        if keys % min(self.block, keys):
            raise ArgumentError(f"`block` of {self!r} must divide the number of keys, {keys}.")
        return call.inputs

    def _blocks(self, k: Any) -> int:
        return k.shape[-3] // min(self.block, k.shape[-3])

    def _cut(self, x: Any, number: Any) -> Any:
        size = min(self.block, x.shape[-3])
        return jax.lax.dynamic_slice_in_dim(x, number * size, size, -3)

    def _factor(self, q: Any) -> float:
        return q.shape[-1] ** -0.5 if self.scale is None else self.scale

    def _scores(self, q: Any, k: Any, number: Any) -> Any:
        block = self._cut(k, number)
        s = _product("...qhd,...khd->...hqk", q, block) * self._factor(q)
        if not self.causal:
            return s
        queries, keys = jnp.arange(s.shape[-2]), number * block.shape[-3] + jnp.arange(s.shape[-1])
        return jnp.where(queries[:, None] >= keys, s, -jnp.inf)


def _product(formula: str, a: Any, b: Any) -> Any:
    return jnp.einsum(formula, a, b, preferred_element_type=wide(b.dtype))
