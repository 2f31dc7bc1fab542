"""What a conversion loses, kept beside what it gives.

Some conversions lose: 1 added to a small number and taken off again leaves another number, and Haiku's running
statistics have counters that Linen has no place for. A conversion therefore also gives a *remainder*: the values before
the loss, beside the converted values that they belong to. A later conversion that starts from these converted values
goes on from the values before the loss; one that starts from others, because the model was trained on, ignores them.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from ._layer import Arrays, Canonical
from ._pieces import numpy_of


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["before", "constant", "merged", "after", "added"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Exact:
    """An array of which bits were lost in a sum.

    Attributes:
        before: the array as it was in its first layout, entries in the canonical order.
        constant: what that layout adds to it to make it canonical.
        merged: canonical arrays that were added to it, by their names.
        after: the array in the layout that it was converted into last, entries in the canonical order.
        added: what that layout adds to it.
    """

    before: Any
    constant: Any
    merged: Canonical
    after: Any
    added: Any


@functools.partial(jax.tree_util.register_dataclass, data_fields=["params", "state", "converted_state"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Remainder:
    """What the target of a conversion has no place for. A pytree.

    Attributes:
        params: arrays that lost bits, by their canonical names.
        state: the whole canonical state.
        converted_state: the state that it was converted into, by the target's own paths.
    """

    params: dict[str, Exact]
    state: Canonical
    converted_state: Arrays


def recall_params(params: dict[str, Exact], arrays: Canonical, constants: Canonical) -> None:
    """Puts the values before the loss into canonical arrays, entry by entry where they are as converted.

    So training some entries keeps the others exact.
    """
    for name, earlier in params.items():
        array, constant = arrays.get(name), constants.get(name, 0.0)
        if array is None or np.shape(array) != np.shape(earlier.after) or array.dtype != earlier.after.dtype:
            continue
        same = (array == earlier.after) & (constant == earlier.added)
        arrays[name], constants[name] = where(same, earlier.before, array), where(same, earlier.constant, constant)
        for part, merged in earlier.merged.items():
            arrays.setdefault(part, where(same, merged, numpy_of(merged).zeros_like(merged)))


def recall_state(remainder: Remainder, state: Arrays) -> Canonical | None:
    """Gives the canonical state before the loss if this is what it was converted into.

    Traced state is not known to be.
    """
    return remainder.state if remainder.state and _same_bits(state, remainder.converted_state) else None


def copied(arrays: Any) -> Any:
    """Copies the arrays of a dict or a tuple: a training step may donate the buffers of the originals."""
    return jax.tree.map(lambda array: numpy_of(array).array(array, copy=True), arrays)


def where(condition: Any, yes: Any, no: Any) -> Any:
    """Chooses by entry, in NumPy where all are NumPy's."""
    return numpy_of(condition, yes, no).where(condition, yes, no)


def _same_bits(arrays: Arrays, others: Arrays) -> bool:
    if arrays.keys() != others.keys():
        return False
    pairs = [(arrays[path], others[path]) for path in arrays]
    if any(isinstance(array, Tracer) for pair in pairs for array in pair):
        return False
    return all(_bits(array) == _bits(other) for array, other in pairs)


def _bits(array: Any) -> tuple[Any, ...]:
    as_numpy = np.asarray(array)
    return as_numpy.dtype, as_numpy.shape, as_numpy.tobytes()
