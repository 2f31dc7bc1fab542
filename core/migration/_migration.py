"""What `migrate` gives back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from jaxtyping import PyTree

from .._errors import MigrationError
from ._moving import Moving, Remainders
from ._opened import Call
from ._optimizer import Moment, converted_optimizer_state
from ._report import Report


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Migration:
    """A model that was moved.

    Attributes:
        model: in the form in which the target was given. An NNX or Equinox model, or (model, state), has the values in
            it.
        variables: what a Linen module or a transformed Haiku function is applied with: `{"params": ..., ...}`;
            `params`, or `(params, state)`. `None` for the others.
        handle: both together, in the form in which a source is given.
        report: which layer went where, and the proof.
        remainders: what the target has no place for, by layer. As the source of another `migrate`, a Migration brings
            it along, so that a chain of moves that leads back comes back bit for bit.
        calls: how the target was called, for outputs and in training.
        moving: the conversion.
    """

    model: Any
    variables: Any
    handle: Any
    report: Report
    remainders: Remainders
    calls: tuple[Call | None, Call | None]
    moving: Moving

    def cotangents(self, tree: PyTree) -> PyTree:
        """Converts gradients of the source's parameters, by the linear part of the conversion.

        Args:
            tree: gradients as the source's framework has them, for all parameters.

        Raises:
            MigrationError: the tree has not the structure of the source's parameters.
        """
        source = self.moving.source
        flat = source.flat(tree)
        if flat is None or flat.keys() != source.params.keys():
            missing = [] if flat is None else ["/".join(path) for path in source.params.keys() ^ flat.keys()]
            raise MigrationError(
                f"The tree must have the structure of the parameters of the {source.framework} model, "
                f"{jax.tree.structure(source.tree(source.params))}, but is {jax.tree.structure(tree)}"
                + (f"; only one of the two has {', '.join(sorted(missing)[:5])}." if missing else ".")
            )
        return self.moving.target.tree(self.moving.cotangents(flat))

    def optimizer_state(self, state: PyTree, moments: Mapping[str, Mapping[str, Moment]] | None = None) -> PyTree:
        """Converts an optax state that belongs to the source's parameters.

        First moments go by the linear part of the conversion, second ones by its absolute value; counts and scalars
        stay as they are.

        Args:
            state: the state.
            moments: what states that are not optax's own hold, `{class: {field: "first", "second" or "parameters"}}`.

        Returns:
            The state for the target's parameters, as optax would initialise it there.

        Raises:
            MigrationError: it is not known what an array in it is.
        """
        return converted_optimizer_state(self.moving, state, moments or {})

    def __repr__(self) -> str:
        """Gives the report."""
        return str(self.report)
