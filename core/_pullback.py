"""`Pullback`: a module's own pullback, a pytree that knows how the cotangents of its call look."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters.ad import zeros_like_aval

from ._arrays import ArrayType, Layout
from ._conform import Expected, Signature
from ._cotangents import Cotangents, Order
from ._inputs import Input
from ._used import used_arguments


@dataclasses.dataclass(frozen=True)
class Spec:
    """The static shape of a call's cotangents; hashable, so it can stand in the treedef of a pullback."""

    variables_def: Any
    variables_types: tuple[ArrayType, ...]
    inputs: tuple[Input, ...]
    keywords: Any  # a dict of `Input`; frozen dataclasses compare by value
    with_variables: bool = True  # no cotangent of theirs is expected where there is no module

    def __hash__(self) -> int:
        return hash((self.variables_def, self.variables_types, len(self.inputs), tuple(sorted(self.keywords))))

    def build(self, variables: Sequence[Any], arrays: Sequence[Any], order: Order) -> Cotangents:
        """Puts flat cotangents into the trees of the variables and the inputs."""
        return Cotangents(
            tuple(part.cotangent(arrays) for part in self.inputs),
            jax.tree.unflatten(self.variables_def, variables),
            keywords={name: part.cotangent(arrays) for name, part in self.keywords.items()},
            order=order,
        )

    def expected(self) -> Signature:
        """The same, in the form that checks what a rule returned."""
        layout = Layout(self.variables_def, (None,) * len(self.variables_types))
        return Signature(
            [part.expected() for part in self.inputs],
            {name: part.expected() for name, part in self.keywords.items()},
            Expected("`variables`", layout, self.variables_types) if self.with_variables else None,
        )


@jax.tree_util.register_pytree_node_class
class Pullback:
    """The linear map from the cotangent of a module call's output to those of its inputs and variables.

    It is a pytree of the arrays that the forward pass kept, so it may be a residual, and it may be
    called any number of times.
    """

    def __init__(
        self,
        pull: Any,
        spec: Spec,
        inexact: tuple[bool, ...],
        layout: Layout,
        types: tuple[ArrayType, ...],
        order: Order,
    ):
        self._pull = pull
        self._static = (spec, inexact, layout, types, order)

    def __call__(self, y_bar: Any) -> Cotangents:
        """Pulls `y_bar` back.

        Args:
            y_bar: shaped like the call's output; `None`, whole or in part, stands for zero.

        Returns:
            The cotangents of the inputs, in the order of the call, and of the variables. Inputs
            and leaves without a gradient (integers, keys, objects) get `None`.

        Raises:
            CotangentError: `y_bar` does not have the structure or shapes of the output.
        """
        spec, inexact, layout, types, order = self._static
        flat = Expected("the output", layout, types).conform(y_bar, "The argument of this pullback")
        seeds = [
            zero_of(type_) if bar is None else bar for bar, type_ in zip(flat, types, strict=True) if type_.is_inexact
        ]
        variables, chosen = self._pull(seeds)
        rest = iter(chosen)
        return spec.build(variables, [next(rest) if able else None for able in inexact], order)

    def used_residuals(self, needed: Sequence[bool]) -> list[bool]:
        """Says which of the residuals are used, where only some cotangents are.

        Args:
            needed: for each variable, and then for each array among the inputs, whether its cotangent is.
        """
        _, inexact, _, types, _ = self._static
        leaves, treedef = jax.tree.flatten(self._pull)
        able = [*needed[: len(needed) - len(inexact)], *pick(inexact, needed[len(needed) - len(inexact) :])]
        if all(able):
            return [True] * len(leaves)

        def pull(arrays: list[Any]) -> list[Any]:
            own = jax.tree.unflatten(treedef, arrays[: len(leaves)])
            variables, chosen = own(arrays[len(leaves) :])
            return pick(able, [*variables, *chosen])

        seeds = [type_ for type_ in types if type_.is_inexact]
        return used_arguments(pull, [*map(ArrayType.of, leaves), *seeds])[: len(leaves)]

    def tree_flatten(self) -> tuple[tuple[Any], Any]:
        """Gives the residuals as the child, all else as static data."""
        return (self._pull,), self._static

    @classmethod
    def tree_unflatten(cls, static: Any, children: tuple[Any]) -> Pullback:
        """Rebuilds the pullback around other residuals."""
        return cls(children[0], *static)


def pick(mask: Sequence[bool], values: Sequence[Any]) -> list[Any]:
    """Lists the values whose mask is set."""
    return [value for chosen, value in zip(mask, values, strict=True) if chosen]


def merge(mask: Sequence[bool], chosen: Sequence[Any], others: Sequence[Any], *, compact: bool = False) -> list[Any]:
    """Puts `chosen` where the mask is set, and `others` elsewhere.

    `others` is as long as the mask, or, if `compact`, has just the entries that are used.
    """
    first = iter(chosen)
    second = iter(others if compact else pick([not able for able in mask], others))
    return [next(first) if able else next(second) for able in mask]


def zero_of(like: Any) -> Any:
    """Makes the zero cotangent of an array, its `ArrayType` or a symbolic zero, sharded and varying as that is."""
    if like.dtype == jax.dtypes.float0 or not jnp.issubdtype(like.dtype, jnp.inexact):
        return np.zeros(like.shape, jax.dtypes.float0)
    aval = like.aval if hasattr(like, "aval") else jax.typeof(like)
    return zeros_like_aval(aval.strip_weak_type())
