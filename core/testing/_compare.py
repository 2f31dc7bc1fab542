"""Comparing trees of arrays: bit for bit, or to the rounding of the largest entry."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def numbers(tree: Any) -> list[np.ndarray]:
    """Lists the arrays of a tree as NumPy arrays, keys by their data."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype") and leaf.dtype != jax.dtypes.float0]
    is_key = lambda leaf: jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return [np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf) for leaf in leaves]


def assert_same_bits(one: Any, other: Any) -> None:
    """Compares all arrays of two trees bit for bit.

    Raises:
        AssertionError: an array differs, in value, shape or dtype, or there is none to compare.
    """
    left, right = _pairs(one, other)
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(a, b, strict=True)


def assert_close(one: Any, other: Any, rtol: float = 1e-6) -> None:
    """Compares all arrays of two trees to `rtol` of the largest entry of the second tree.

    `rtol` is meant for float32, and grows with the spacing of numbers of a coarser dtype.

    One scale for the whole tree: the gradient of a bias in front of a batch norm is zero but for
    the rounding of its terms, which are as large as the other gradients.

    Raises:
        AssertionError: an array differs by more, or in shape or dtype, or there is none to compare.
    """
    left, right = _pairs(one, other)
    scale = max((np.abs(b).max(initial=0) for b in right if jnp.issubdtype(b.dtype, jnp.inexact)), default=0)
    for a, b in zip(left, right, strict=True):
        assert a.shape == b.shape, f"shapes {a.shape} and {b.shape}"
        assert a.dtype == b.dtype, f"dtypes {a.dtype} and {b.dtype}"
        if jnp.issubdtype(b.dtype, jnp.inexact):
            wide = np.result_type(a.dtype if a.dtype.kind in "fc" else np.float32, np.float32)  # NumPy's bfloat16
            coarser = max(1, float(jnp.finfo(b.dtype).eps / jnp.finfo(jnp.float32).eps))
            atol = rtol * coarser * float(scale)
            np.testing.assert_allclose(a.astype(wide), b.astype(wide), rtol=0, atol=atol)
        else:
            np.testing.assert_array_equal(a, b)


def _pairs(one: Any, other: Any) -> tuple[list[np.ndarray], list[np.ndarray]]:
    left, right = numbers(one), numbers(other)
    assert len(left) == len(right), f"{len(left)} arrays against {len(right)}"
    assert right, "no array to compare"
    return left, right
