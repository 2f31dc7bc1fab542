"""What a rule keeps of its forward pass: the arrays that its `backward` may touch, and the types of the others."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from jax.interpreters.ad import zeros_like_aval

from ._arrays import ArrayType, Layout, take_apart
from ._behaviour import Perturbed, Primals
from ._pullback import Pullback
from ._residuals import Residuals
from ._session import Outcome, without_refs

GROUPS: tuple[str, ...] = ("own", "variables", "context", "arrays", "output", "extra")


@dataclasses.dataclass(frozen=True)
class Facts:
    """The static half of what is kept.

    Args:
        types: of all arrays of a group, those that are not kept too; `None` for a mutable array.
        output: the layout of the output.
        extra: the layout of the rule's own residuals.
        updates: the types of what the call wrote into the state.
        updates_layout: its layout.
        perturbed: what is differentiated.
        pullback: the pullback's treedef and the types of its arrays, where it is kept.
    """

    types: dict[str, list[ArrayType | None]]
    output: Layout
    extra: Layout
    updates: tuple[ArrayType, ...]
    updates_layout: Layout
    perturbed: Perturbed
    pullback: tuple[Any, tuple[ArrayType, ...]] | None = None

    def __hash__(self) -> int:
        return hash((self.output, self.extra, self.perturbed))

    @property
    def outputs(self) -> list[ArrayType]:
        """The types of the output's arrays."""
        return [type_ for type_ in self.types["output"] if type_ is not None]


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass
class Kept:
    """The arrays, group by group, with `None` for those that nothing depends on."""

    groups: dict[str, list[Any]]
    pullback: list[Any]
    facts: Facts
    touched: set[str] = dataclasses.field(default_factory=set)
    """The groups that were looked at; `perturbed` and `pullback` count as such."""
    spare: int = 0
    """How many arrays a pullback would have that is not kept."""

    @staticmethod
    def everything(primals: Primals, outcome: Outcome, extra: Residuals, perturbed: Perturbed) -> Kept:
        """Keeps all that one forward pass has, but for the pullback."""
        extra_arrays, extra_layout = take_apart(extra)
        arguments = (without_refs(group) for group in (primals.variables, primals.context, primals.arrays))
        groups = dict(zip(GROUPS, [list(primals.own), *arguments, outcome.arrays, extra_arrays], strict=True))
        types = {name: [None if array is None else ArrayType.of(array) for array in groups[name]] for name in GROUPS}
        updates = tuple(map(ArrayType.of, outcome.updates))
        return Kept(groups, [], Facts(types, outcome.layout, extra_layout, updates, outcome.updates_layout, perturbed))

    def only(self, needed: dict[str, list[bool]]) -> Kept:
        """Leaves all out that is not needed."""
        groups = {
            name: [array if able else None for array, able in zip(group, needed[name], strict=True)]
            for name, group in self.groups.items()
        }
        return Kept(groups, self.pullback, self.facts)

    def without_pullback(self, pullback: Pullback | None) -> Kept:
        """Notes what a pullback would have added, were it kept."""
        return dataclasses.replace(self, spare=len(jax.tree.leaves(pullback)))

    def with_pullback(self, pullback: Pullback, needed: Sequence[bool] | None) -> Kept:
        """Adds the pullback, without what only cotangents depend on that nobody needs."""
        leaves, treedef = jax.tree.flatten(pullback)
        types = tuple(map(ArrayType.of, leaves))
        if needed is not None:
            used = pullback.used_residuals(needed)
            leaves = [leaf if able else None for leaf, able in zip(leaves, used, strict=True)]
        return Kept(self.groups, leaves, dataclasses.replace(self.facts, pullback=(treedef, types)))

    def group(self, name: str) -> list[Any]:
        """Lists a group's arrays, with zeros for those that nothing depends on."""
        self.touched.add(name)
        return list(map(_or_zeros, self.groups[name], self.facts.types[name]))

    def looked_at_perturbed(self) -> Perturbed:
        """Says what is differentiated."""
        self.touched.add("perturbed")
        return self.facts.perturbed

    def filled_pullback(self) -> Pullback | None:
        """Gives the pullback, if it was kept, with zeros for what nothing depends on."""
        if self.facts.pullback is None:
            return None
        treedef, types = self.facts.pullback
        return jax.tree.unflatten(treedef, list(map(_or_zeros, self.pullback, types)))

    def tree_flatten(self) -> tuple[Any, Any]:
        """Gives the arrays as children."""
        return (self.groups, self.pullback), self.facts

    @classmethod
    def tree_unflatten(cls, facts: Facts, children: Any) -> Kept:
        """Rebuilds it around other arrays."""
        groups, pullback = children
        return cls(groups, pullback, facts)


def _or_zeros(array: Any, type_: ArrayType | None) -> Any:
    return zeros_like_aval(type_.aval) if array is None and type_ is not None else array
