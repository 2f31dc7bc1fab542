"""Which array of a file is which of a model. Names must agree on both sides, without a rest, up to spelling."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from crossvjp.adapters.files._errors import FileError
from crossvjp.adapters.files._trees import Names, kind, text

Spelling: TypeAlias = Callable[[Names], Names]

# How the model's names and the file's are made comparable: `mlp/~/linear` with the key `mlp/~/linear/w`, AlphaFold's
# `module//w`, and `layers.0.weight`.
_SPELLINGS: tuple[Spelling, ...] = (
    lambda path: path,
    lambda path: tuple("/".join(path).replace("//", "/").split("/")),
    lambda path: tuple("/".join(path).replace("//", "/").replace(".", "/").split("/")),
)


def _identity(path: Names) -> Names:
    return path


def _of_pair(path: Names) -> Names:
    """Names the parts of `(params, state)`."""
    return ({"0": "params", "1": "state"}.get(path[0], path[0]), *path[1:])


def _without_value(path: Names) -> Names:
    """Takes the last name from `kernel/value`, as older versions of Flax keep a Variable of NNX."""
    return path[:-1] if path[-1:] == ("value",) else path


# What a file may have left out, or put in, besides: the collection's name above parameters alone, and so on.
_SHAPES: tuple[Spelling, ...] = tuple(
    lambda path, outer=outer, inner=inner: outer(inner(path))
    for inner, outer in itertools.product(
        (_identity, _without_value), (_identity, lambda path: ("params", *path), _of_pair)
    )
)


def match(model: Collection[Names], file: Collection[Names]) -> tuple[dict[Names, Names], list[Names], list[Names]]:
    """Pairs the names of a model with those of a file.

    Returns:
        The file's path for each of the model's; then what is left over in the model, and in the file, under the
        spelling that leaves least.
    """
    best: tuple[dict[Names, Names], list[Names], list[Names]] | None = None
    for spelling, shape in itertools.product(_SPELLINGS, _SHAPES):
        ours = _spelt(model, spelling)
        theirs = _spelt(file, lambda path, spelling=spelling, shape=shape: spelling(shape(path)))
        if ours is None or theirs is None:
            continue
        pairs = {path: theirs[name] for name, path in ours.items() if name in theirs}
        missing = [path for name, path in ours.items() if name not in theirs]
        extra = [path for name, path in theirs.items() if name not in ours]
        if not missing and not extra:
            return pairs, [], []
        if best is None or len(pairs) > len(best[0]):
            best = pairs, missing, extra
    assert best is not None  # the first spelling changes nothing, so all names stay apart
    return best


def _spelt(paths: Collection[Names], spelling: Spelling) -> dict[Names, Names] | None:
    """Names paths by their spelling; `None` if two get the same."""
    made = {spelling(path): path for path in paths}
    return made if len(made) == len(paths) else None


def check(
    pairs: Mapping[Names, Names],
    missing: Sequence[Names],
    extra: Sequence[Names],
    expected: Mapping[Names, Any],
    found: Mapping[Names, Any],
) -> None:
    """Raises the error that lists all that does not fit.

    Args:
        pairs: as `match` gives them.
        missing: as `match` gives them.
        extra: as `match` gives them.
        expected: the model's arrays.
        found: the file's arrays.

    Raises:
        FileError: something is left over, or shapes or kinds of numbers differ.
    """
    lines = [f"missing in the file: {text(path)}, shape {np.shape(expected[path])}" for path in missing]
    lines += [f"not in the model: {text(path)}, shape {np.shape(found[path])}" for path in extra]
    for path, there in pairs.items():
        one, other = expected[path], found[there]
        if np.shape(one) != np.shape(other):
            shapes = f"the model has {np.shape(one)} at {text(path)}, the file {np.shape(other)} at {text(there)}"
            lines.append(f"shapes differ: {shapes}")
        elif kind(one) != kind(other) and not (isinstance(other, int) and kind(one) == "floats"):
            lines.append(f"the model has {kind(one)} at {text(path)}, the file {kind(other)} at {text(there)}")
    collections = sorted({path[0] for path in missing} - {path[0] for path in pairs}) if pairs else []
    if collections:
        lines.insert(0, f"the file has no {' and no '.join(map(repr, collections))}")
    if lines:
        shown = [*lines[:20], *([f"and {len(lines) - 20} more"] if len(lines) > 20 else [])]
        raise FileError("The file does not fit the model:\n" + "\n".join(f"  - {line}" for line in shown))
