"""One tree as variables and context: what most adapters need to open a boundary."""

from __future__ import annotations

from typing import Any

import jax

from ._arrays import is_inexact, take_apart
from ._paths import path_of
from ._select import Predicate, check_selected


class Partition:
    """A tree cut in two: the variables, a tree of the same shape with `None` elsewhere, and the rest.

    Only floating and complex arrays become variables; arrays of other kinds have no gradient.

    Args:
        tree: any pytree.
        wanted: which of the tree's differentiable arrays are variables.
        grad_vars: the user's words for `wanted`, for errors.

    Raises:
        ArgumentError: a filter selects nothing.
    """

    def __init__(self, tree: Any, wanted: Predicate, grad_vars: Any):
        with_paths, self._treedef = jax.tree_util.tree_flatten_with_path(tree)
        paths = [path_of(path) for path, _ in with_paths]
        self._leaves = [leaf for _, leaf in with_paths]
        inexact = [is_inexact(leaf) for leaf in self._leaves]
        self._chosen = [
            able and wanted(path, leaf) for able, path, leaf in zip(inexact, paths, self._leaves, strict=True)
        ]
        check_selected(grad_vars, sum(self._chosen), [p for p, able in zip(paths, inexact, strict=True) if able])
        context, self._layout = take_apart(self._holed(chosen=False))
        self._halves = self._holed(chosen=True), context
        del self._leaves

    @property
    def static(self) -> Any:
        """The half of the tree that is no array."""
        return self._treedef, self._layout, self.chosen

    @property
    def chosen(self) -> tuple[bool, ...]:
        """Which of the tree's leaves are variables."""
        return tuple(self._chosen)

    def take(self) -> tuple[Any, list[Any]]:
        """Hands over the variables and the context, once: what late runs keep must hold no array."""
        halves = self._halves
        del self._halves
        return halves

    def combine(self, variables: Any, context: Any) -> Any:
        """Puts the tree together again around other arrays."""
        chosen = iter(jax.tree.leaves(variables))
        rest = iter(self._treedef.flatten_up_to(self._layout.fill(context)))
        leaves = [next(chosen) if is_chosen else other for is_chosen, other in zip(self._chosen, rest, strict=True)]
        return jax.tree.unflatten(self._treedef, leaves)

    def _holed(self, *, chosen: bool) -> Any:
        leaves = [
            leaf if is_chosen is chosen else None for leaf, is_chosen in zip(self._leaves, self._chosen, strict=True)
        ]
        return jax.tree.unflatten(self._treedef, leaves)
