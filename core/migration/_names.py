"""What the axes of an array are called or sharded over, and where the names go when the axes do."""

from __future__ import annotations

import math
from typing import Any, TypeAlias

Names: TypeAlias = tuple[Any, ...] | None
"""What the axes of one array are called or sharded over, one entry an axis; `None` where nothing is said."""


def agreed_names(parts: tuple[Names, ...]) -> Names:
    """Gives the names that all of the arrays have, axis by axis."""
    if any(part is None for part in parts):
        return None
    return tuple(axis[0] if all(name == axis[0] for name in axis) else None for axis in zip(*parts, strict=True))


def renamed_axes(names: tuple[Any, ...], before: tuple[int, ...], after: tuple[int, ...]) -> tuple[Any, ...]:
    """Names the axes after a reshape, group by group of axes that have one product on both sides."""
    renamed: list[Any] = [None] * len(after)
    if 0 in before:
        return tuple(renamed)
    old = [axis for axis, size in enumerate(before) if size != 1]
    new = [axis for axis, size in enumerate(after) if size != 1]
    while old and new:
        group_old, group_new = [old.pop(0)], [new.pop(0)]
        while (had := math.prod(before[a] for a in group_old)) != (got := math.prod(after[a] for a in group_new)):
            (group_old if had < got else group_new).append((old if had < got else new).pop(0))
        known = [part for axis in group_old for part in _parts(names[axis])]
        if len(group_old) == 1 and len(group_new) == 1:
            renamed[group_new[0]] = names[group_old[0]]
        elif known and names[group_old[0]] is not None:
            # One name an axis as far as they go; the last axis, or the only one, takes the rest.
            *firsts, last = group_new
            for axis, part in zip(firsts, known, strict=False):
                renamed[axis] = part
            rest = tuple(known[len(firsts) :])
            renamed[last] = rest[0] if len(rest) == 1 else rest or None
    return tuple(renamed)


def _parts(name: Any) -> tuple[Any, ...]:
    return () if name is None else name if isinstance(name, tuple) else (name,)
