"""Arithmetic on whole cotangents: trees of arrays in which `None` stands for zero."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from .._errors import ArgumentError
from .._paths import Path, path_of
from .._rule import Rule
from .._select import Predicate, predicate

_VALUE = jax.tree_util.GetAttrKey("value")


def wide(dtype: Any) -> Any:
    """Gives the real dtype to calculate in: at least float32, so that a sum of bfloat16 does not stall."""
    return jnp.float64 if jnp.finfo(dtype).bits > 32 else jnp.float32


def norm(tree: PyTree) -> Float[Array, ""]:
    """Gives the l2 norm of all leaves together; zero for a tree without any."""
    return jnp.sqrt(dot(tree, tree))


def dot(a: PyTree, b: PyTree) -> Float[Array, ""]:
    """Gives the sum of `conj(a) * b` over all leaves, its real part if they are complex."""
    pairs = [(x, y) for x, y in zip(_leaves(a), _leaves(b), strict=True) if x is not None and y is not None]
    dtype = jnp.float64 if any(wide(leaf.dtype) == jnp.float64 for pair in pairs for leaf in pair) else jnp.float32
    return sum((_dot(x, y).astype(dtype) for x, y in pairs), jnp.zeros((), dtype))


def _dot(x: Any, y: Any) -> Any:
    products = (a.astype(wide(x.dtype)) * b.astype(wide(x.dtype)) for a, b in zip(_parts(x), _parts(y), strict=True))
    return sum(jnp.sum(product) for product in products)


def _parts(leaf: Any) -> tuple[Any, ...]:
    return (leaf.real, leaf.imag) if jnp.iscomplexobj(leaf) else (leaf,)


def scale(tree: PyTree, factor: Any) -> PyTree:
    """Multiplies each leaf by a real number, in the leaf's dtype.

    Raises:
        ArgumentError: `factor` has axes, which would go along those of each leaf.
    """
    if jnp.ndim(factor):
        raise ArgumentError(
            f"Cotangents are multiplied by a scalar, but here by an array of shape {jnp.shape(factor)}."
        )
    return jax.tree.map(lambda leaf: times(leaf, factor), tree)


def times(leaf: Any, factor: Any) -> Any:
    """Multiplies one array by a real one; calculated at least in float32, then rounded to the array's dtype."""
    by = jnp.asarray(factor).astype(wide(leaf.dtype))
    parts = [part.astype(by.dtype) * by for part in _parts(leaf)]
    return (parts[0] if len(parts) == 1 else jax.lax.complex(*parts)).astype(leaf.dtype)


def add(a: PyTree, b: PyTree) -> PyTree:
    """Adds two cotangents of one shape; each sum has the dtype of `a`'s leaf."""
    return a if b is None else jax.tree.map(_plus, a, b, is_leaf=_is_none)


def _plus(x: Any, y: Any) -> Any:
    return x if y is None else y if x is None else x + y.astype(x.dtype)


def sub(a: PyTree, b: PyTree) -> PyTree:
    """Subtracts `b` from `a`."""
    return add(a, jax.tree.map(jnp.negative, b))


def unit_axes(ndim: int, unit_axis: int) -> tuple[int, ...]:
    """Lists the axes of one unit's weights: all but `unit_axis`, or all of an array with fewer than two axes."""
    return tuple(axis for axis in range(ndim) if ndim < 2 or axis != unit_axis % ndim)


def map_chosen(choose: Any, fn: Callable[[Any], Any], tree: PyTree, author: Rule) -> PyTree:
    """Applies `fn` to the leaves that a choice of paths names, and leaves the others as they are.

    Args:
        choose: as `chosen`.
        fn: from a leaf to its replacement.
        tree: any pytree of arrays.
        author: the rule that asks, for the error.
    """
    mask = chosen(choose, tree, author)
    leaves, treedef = jax.tree.flatten(tree)
    return jax.tree.unflatten(treedef, [fn(leaf) if hit else leaf for leaf, hit in zip(leaves, mask, strict=True)])


def chosen(choose: Any, tree: PyTree, author: Rule, kind: str = "variable") -> list[bool]:
    """Says of each leaf of a tree whether a choice names it.

    Args:
        choose: what `grad_vars` takes in every framework, a glob, a regex or a predicate among it;
            or a name, which chooses the leaf or the branch of that name. A glob may start at any
            name of the path, since frameworks put different ones in front.
        tree: any pytree of arrays.
        author: the rule that asks, for the error.
        kind: what the leaves are, for the error.

    Raises:
        ArgumentError: the choice names no leaf of the tree.
    """
    flat = [(path_of(_unboxed(path)), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]
    mask = [_is_chosen(choose, path, leaf) for path, leaf in flat]
    if any(mask):
        return mask
    listed = ", ".join(repr("/".join(path)) for path, _ in flat[:12]) + (", ..." if len(flat) > 12 else "")
    raise ArgumentError(
        f"{author.described()} chooses {choose!r}, but no {kind} of the module has such a path. "
        + (f"Its paths are {listed}." if flat else "It has none.")
    )


def _is_chosen(choose: Any, path: Path, leaf: Any) -> bool:
    if isinstance(choose, list | tuple | set | frozenset):
        return any(_is_chosen(choice, path, leaf) for choice in choose)
    if isinstance(choose, str):
        starts = ["/" + "/".join(path), *("/".join(path[start:]) for start in range(len(path)))]
        return choose in path or any(fnmatch.fnmatchcase(start, choose) for start in starts)
    return predicate(choose, _unknown)(path, leaf)


def _unknown(choose: Any) -> Predicate:
    raise ArgumentError(f"Variables are chosen by name, path glob, regex or predicate, but not by {choose!r}.")


def _unboxed(key_path: tuple[Any, ...]) -> tuple[Any, ...]:
    """Drops the key of a box around an array, such as an NNX Variable's or a Linen Partitioned's `value`."""
    boxed = len(key_path) > 1 and key_path[-1] == _VALUE and isinstance(key_path[-2], jax.tree_util.DictKey)
    return key_path[:-1] if boxed else key_path


def _leaves(tree: Any) -> list[Any]:
    return jax.tree.leaves(tree, is_leaf=_is_none)


def _is_none(leaf: Any) -> bool:
    return leaf is None
