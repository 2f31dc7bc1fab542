"""The cotangents of each example of a batch by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ._arrays import ArrayType, is_inexact, take_apart
from ._cotangents import Cotangents
from ._errors import ArgumentError
from ._paths import leaves_with_paths, show


def per_example(
    linearize: Callable[..., Any], variables: Any, inputs: Sequence[Any], keywords: Mapping[str, Any], y_bar: Any
) -> Cotangents:
    """Runs each example as a batch of one, and pulls its cotangent back."""
    size = _batch_size(y_bar, inputs, keywords)
    arrays, layout = take_apart((tuple(inputs), dict(keywords)))
    batched = [array.ndim > 0 for array in arrays]

    def one(chosen: list[Any], bar: Any) -> Cotangents:
        alone = [array[None] if able else array for array, able in zip(chosen, batched, strict=True)]
        args, kwargs = layout.fill(alone)
        _, pullback, outcome = linearize(variables, args, kwargs)
        if outcome.updates:
            raise ArgumentError(
                "The module writes state in the call (batch statistics, or counters of random keys), so its examples "
                "do not stand alone. Say per_example(y_bar, independent=False)."
            )
        found = pullback(jax.tree.map(lambda leaf: leaf[None], bar))
        own = jax.tree.map(lambda leaf: leaf[0] if leaf.ndim else leaf, (found.inputs, found.keywords))
        return found.replace(inputs=own[0], keywords=own[1])

    axes = [0 if able else None for able in batched]
    return jax.vmap(one, in_axes=(axes, 0), axis_size=size)(arrays, _inexact(y_bar))


def masked_examples(pullback: Callable[[Any], Cotangents], y_bar: Any) -> Cotangents:
    """Pulls the cotangent of the whole batch back once for each example, with zeros for the others."""
    size = _batch_size(y_bar, (), {})

    def one(index: Any) -> Cotangents:
        def masked(leaf: Any) -> Any:
            mine = (jnp.arange(size) == index).reshape(-1, *[1] * (leaf.ndim - 1))
            return jnp.where(mine, leaf, jnp.zeros_like(leaf))

        return pullback(jax.tree.map(masked, _inexact(y_bar)))

    return jax.vmap(one)(jnp.arange(size))


def _inexact(y_bar: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf if is_inexact(leaf) else None, y_bar)


def _batch_size(y_bar: Any, inputs: Sequence[Any], keywords: Mapping[str, Any]) -> int:
    bars = [(f"`y_bar` at {show(path)}", leaf) for path, leaf in leaves_with_paths(y_bar) if is_inexact(leaf)]
    given, _ = take_apart((tuple(inputs), dict(keywords)))
    size = next((leaf.shape[0] for _, leaf in bars if leaf.ndim), None)
    leaves = bars + [("an input", leaf) for leaf in given if leaf.ndim]
    for name, leaf in leaves:
        if leaf.ndim == 0 or leaf.shape[0] != size:
            raise ArgumentError(
                "Cotangents per example need the batch on axis 0 of every leaf of `y_bar` and of every array among the "
                f"inputs; it is {'not there' if size is None else size}, but {name} is {ArrayType.of(leaf)}."
            )
    if size is None:
        raise ArgumentError("Cotangents per example need an output with a batch on axis 0, but `y_bar` has no array.")
    return size
