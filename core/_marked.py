"""Functions of attached models: they know what they are without rules."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ._ambient import ambient, entered

if TYPE_CHECKING:
    from ._attachment import Attachment

_MARK = "__crossvjp__"


def marked(run: Callable[..., Any], plain: Callable[..., Any], attachment: Attachment) -> Callable[..., Any]:
    """Notes on a function that runs another one under an attachment what it is."""
    setattr(run, _MARK, (run, plain, attachment))
    return run


def attachment_of(function: Callable[..., Any]) -> Attachment | None:
    """Gives what is attached to a function, or to the one that it wraps, by `functools.wraps` or `jax.jit`."""
    return getattr(function, _MARK, (None, None, None))[2]


def without(function: Callable[..., Any], attachment: Attachment | None) -> Callable[..., Any]:
    """Gives the function without an attachment; of a function around an attached one, what it does without rules."""
    if attachment is None:
        return function
    run, plain, _ = getattr(function, _MARK, (None, function, None))
    if run is function:
        return plain

    @functools.wraps(function)
    def unattached(*args: Any, **kwargs: Any) -> Any:
        around = ambient()
        with entered(dataclasses.replace(around, detached=around.detached | {attachment.token})):
            return function(*args, **kwargs)

    vars(unattached).pop(_MARK, None)  # which `wraps` took along
    return unattached
