"""Checks of a rule's fields: what is known is checked, what is traced or no number is left alone."""

from __future__ import annotations

from typing import Any

import numpy as np
from jax.core import Tracer

from ._arrays import is_array
from ._errors import ArgumentError


def positive(the_rule: Any, name: str) -> None:
    """Refuses a field that is not greater than zero.

    Raises:
        ArgumentError: it is known and not.
    """
    _check(the_rule, name, "> 0", lambda value: value > 0)


def non_negative(the_rule: Any, name: str) -> None:
    """Refuses a field below zero.

    Raises:
        ArgumentError: it is known and below.
    """
    _check(the_rule, name, ">= 0", lambda value: value >= 0)


def at_least(the_rule: Any, name: str, low: float) -> None:
    """Refuses a field below a bound.

    Raises:
        ArgumentError: it is known and below.
    """
    _check(the_rule, name, f">= {low}", lambda value: value >= low)


def probability(the_rule: Any, name: str) -> None:
    """Refuses a field outside of 0 to 1.

    Raises:
        ArgumentError: it is known and outside.
    """
    _check(the_rule, name, "from 0 to 1", lambda value: (value >= 0) & (value <= 1))


def scalar(the_rule: Any, name: str) -> None:
    """Refuses a field that is an array with axes; its type is known under a trace too.

    Raises:
        ArgumentError: it has axes.
    """
    shape = np.shape(getattr(the_rule, name))
    if shape:
        raise ArgumentError(f"`{name}` of {type(the_rule).__name__} must be a scalar, but has the shape {list(shape)}.")


def _check(the_rule: Any, name: str, words: str, holds: Any) -> None:
    value = getattr(the_rule, name)
    if isinstance(value, Tracer) or not (is_array(value) or isinstance(value, bool | int | float)):
        return
    if not np.all(holds(np.asarray(value))):
        raise ArgumentError(f"`{name}` of {type(the_rule).__name__} must be {words}, but is {value!r}.")
