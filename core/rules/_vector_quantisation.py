"""Gradients past a lookup of the nearest code."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from .._cotangents import Cotangents
from .._rule import Rule
from ._primals import only_input


class VQStraightThrough(Rule):
    r"""Passes the cotangent straight through vector quantisation.

        z_bar = y_bar;   the codebook gets none.

    The function maps vectors to codes of the same shape, `fn(codebook, z)`; a loss on the codes themselves, where the
    function is called without a rule, trains the codebook. Linear in `y_bar`.

    Raises:
        ArgumentError: the function does not have one array as input.

    Example:
        >>> import jax
        >>> nearest = lambda codes, z: codes[jnp.argmin(jnp.abs(codes - z))]
        >>> codes = jnp.array([0.0, 1.0])
        >>> float(jax.grad(lambda z: VQStraightThrough().lift(nearest)(codes, z) ** 2)(0.8))
        2.0

    Reference:
        van den Oord, Vinyals, Kavukcuoglu (2017), arXiv:1711.00937.
    """

    def backward(self, call, y_bar):
        """Passes the cotangent on."""
        only_input(call, self, with_variables=True)
        return Cotangents((y_bar,), None)


class RotationTrick(Rule):
    r"""Carries the cotangent past vector quantisation by the rotation and scaling that take the vector to its code.

        e_bar = lam R^T y_bar,   lam = |q|/|e|,   R = I - 2 r r^T + 2 q^ e^T,   r = (q^ + e^)/|q^ + e^|

    with e the vector, q its code, q^ and e^ their directions: q = lam R e, and lam and R count as constants. The
    codebook gets no cotangent. Vectors are along the last axis; the function maps them to codes of the same shape,
    `fn(codebook, e)`. At e = 0, where there is no direction, the cotangent passes as it is. Linear in `y_bar`.

    Raises:
        ArgumentError: the function does not have one array as input.

    Reference:
        Fifty, Junkins, Duan, Iger, Liu, Amid, Thrun, Ré (2024), arXiv:2410.06424.
    """

    def backward(self, call, y_bar):
        """Rotates the cotangent back."""
        e, q = only_input(call, self, with_variables=True), call.output
        e_length, q_length = _length(e), _length(q)
        to, start = _divided(q, q_length), _divided(e, e_length)
        r = _divided(to + start, _length(to + start))
        rotated = y_bar - 2 * r * _dot(r, y_bar) + 2 * start * _dot(to, y_bar)
        return Cotangents((jnp.where(e_length > 0, _divided(q_length * rotated, e_length), y_bar),), None)


def _dot(a: Any, b: Any) -> Any:
    return jnp.sum(a * b, -1, keepdims=True)


def _length(a: Any) -> Any:
    return jnp.sqrt(_dot(a, a))


def _divided(a: Any, length: Any) -> Any:
    return a / jnp.where(length > 0, length, 1)
