"""The module's own derivative of what a rule does not speak of, computed in the backward pass where it is needed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from ._arrays import ArrayType, is_inexact
from ._behaviour import Primals
from ._errors import ArgumentError
from ._pullback import merge, pick, zero_of
from ._session import Outcome


@dataclasses.dataclass
class Bars:
    """Flat cotangents of the arguments of one call; `None` stands for zero."""

    own: list[Any]
    variables: list[Any]
    context: list[Any]
    arrays: list[Any]

    @staticmethod
    def zero(own: int, variables: int, context: int, arrays: int) -> Bars:
        """Makes zeros for so many arrays."""
        return Bars([None] * own, [None] * variables, [None] * context, [None] * arrays)


def place(target: list[Any], indices: Iterable[int], bars: Iterable[Any]) -> None:
    """Adds cotangents at the given positions; `None` adds nothing."""
    for index, bar in zip(indices, bars, strict=True):
        if bar is not None:
            target[index] = bar if target[index] is None else target[index] + bar


def own_pullback(
    run: Callable[[Primals], Outcome],
    primals: Primals,
    perturbed_context: Sequence[bool],
    ref_type: ArrayType | None,
) -> Callable[[list[Any] | None, list[Any] | None], Bars]:
    """Linearises the call again at its own arguments.

    Args:
        run: the call.
        primals: its arguments.
        perturbed_context: which arrays of the context are differentiated.
        ref_type: the type of a mutable array among the arguments, if there is one.

    Returns:
        The pullback of the output and the updates together: `(y_bars, updates_bars) -> Bars`, with
        `None` for either that is zero.
    """
    variables, context, arrays = list(primals.variables), primals.context, primals.arrays
    _refuse_ref(ref_type)
    inexact = [is_inexact(array) for array in arrays]
    kinds: list[list[bool]] = []

    def primal(variables: Any, some_context: Any, some_arrays: Any) -> tuple[list[Any], list[Any]]:
        given = merge(perturbed_context, some_context, context), merge(inexact, some_arrays, arrays)
        outcome = run(Primals(primals.own, variables, *given))
        kinds[:] = [[is_inexact(array) for array in group] for group in (outcome.arrays, outcome.updates)]
        return pick(kinds[0], outcome.arrays), pick(kinds[1], outcome.updates)

    out, pull = jax.vjp(primal, variables, pick(perturbed_context, context), pick(inexact, arrays))

    def pullback(*bars: list[Any] | None) -> Bars:
        seeds = tuple(
            [zero_of(array) for array in group] if given is None else pick(kind, given)
            for group, given, kind in zip(out, bars, kinds, strict=True)
        )
        found = Bars.zero(0, len(variables), len(context), len(arrays))
        found.variables, some_context, some_arrays = pull(seeds)
        place(found.context, _where(perturbed_context), some_context)
        place(found.arrays, _where(inexact), some_arrays)
        return found

    return pullback


def _refuse_ref(type_: ArrayType | None) -> None:
    if type_ is not None:
        raise ArgumentError(
            f"The call has a {type_} among its arguments, and something is differentiated that the rule "
            "does not speak of: variables outside `grad_vars`, keyword inputs, or state that the call wrote. For that "
            "the function has to run again, which would write the mutable array a second time. Let the rule answer "
            "for it (`grad_vars=True`, a `Cotangents` with keywords, `updates_bar`), or take the Ref out of the call."
        )


def _where(mask: Sequence[bool]) -> list[int]:
    return [index for index, chosen in enumerate(mask) if chosen]
