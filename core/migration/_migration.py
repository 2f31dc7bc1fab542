"""What `migrate` gives back."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jaxtyping import PyTree

from .._errors import MigrationError
from .._paths import Path
from ._moving import Moving, Remainders
from ._names import Names
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

    def axis_names(self, names: Mapping[str, Sequence[Any]]) -> dict[str, tuple[Any, ...]]:
        """Converts what the axes of the source's parameters are called or sharded over, along with the axes.

        Boxes and metadata of the target stay its own; this is for making them, or shardings of its arrays.

        Args:
            names: by the paths of the source's parameters, `{"mlp/linear_0/w": (None, "model")}`, one name an axis.

        Returns:
            The same by the paths of the target's parameters.

        Raises:
            MigrationError: the source has no such parameter, or it has another number of axes.
        """
        params = {"/".join(path): (path, array) for path, array in self.moving.source.params.items()}
        given: dict[Path, Names] = {}
        for name, axes in names.items():
            if name not in params:
                near = difflib.get_close_matches(name, params, 3, 0.4) or list(params)[:5]
                raise MigrationError(f"The source has no parameter {name!r}; it has {', '.join(map(repr, near))}.")
            path, array = params[name]
            if len(axes) != array.ndim:
                raise MigrationError(
                    f"The source's parameter {name!r} has {array.ndim} axes, but {tuple(axes)} names {len(axes)}."
                )
            given[path] = tuple(axes)
        return {"/".join(path): axes for path, axes in self.moving.axis_names(given).items() if axes}

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
