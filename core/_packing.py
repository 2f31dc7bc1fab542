"""Residuals as JAX takes them: one list of arrays, of the same length whatever is differentiated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from ._errors import ArgumentError


class Packing:
    """Turns the residuals of one call into a list, and back.

    A program that JAX keeps, of a function under `jax.jit` that is used twice, has a call once and runs its
    forward pass for each use. Where other arguments are differentiated, other residuals are kept, but JAX remembers
    one structure for all uses, that of the last. So the list has one structure. What differs is noted here, and
    found again by the shape of a first array without elements, since a shape is all that is known of a residual
    when the backward pass is traced.
    """

    def __init__(self) -> None:
        self._seen: list[tuple[Any, list[bool]]] = []
        self._length: int | None = None

    def pack(self, residuals: Any, spare: int | None) -> list[Any]:
        """Lists the arrays of a pytree in which `None` stands for what is left out.

        Args:
            residuals: the pytree.
            spare: how many more arrays other uses may have; `None` if there are no other uses.
        """
        leaves, treedef = jax.tree.flatten(residuals, is_leaf=lambda leaf: leaf is None)
        kept = [leaf is not None for leaf in leaves]
        arrays = [leaf for leaf in leaves if leaf is not None]
        marker = np.zeros((0, len(self._seen)), np.int8)
        self._seen.append((treedef, kept))
        if spare is None:
            return [marker, *arrays]
        if self._length is None:
            self._length = len(leaves) + spare
        if len(arrays) > self._length:
            raise ArgumentError(
                f"A function is used several times in a program, and its backward pass needs {len(arrays)} residuals "
                f"in one of them and at most {self._length} in another, since other arguments are differentiated. "
                "Return the same residuals whatever is perturbed."
            )
        return [marker, *arrays, *[np.zeros(0, np.int8)] * (self._length - len(arrays))]

    def unpack(self, packed: Sequence[Any]) -> Any:
        """Gives the pytree back."""
        treedef, kept = self._seen[packed[0].shape[-1]]
        arrays = iter(packed[1:])
        return jax.tree.unflatten(treedef, [next(arrays) if able else None for able in kept])
