"""Which layer of one model is which of the other: by kinds, shapes, order of calls and names, or as it is said."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from .._errors import MigrationError
from .._paths import Path
from ._registry import refusal_of
from ._report import table
from ._tracing import Place

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True, eq=False)
class Candidate:
    """A layer with what it is compared by.

    Attributes:
        place: the layer.
        shapes: of its canonical arrays, by their names.
        optional: names that layers of its kind may lack.
    """

    place: Place
    shapes: Shapes
    optional: frozenset[str] = frozenset()

    @property
    def signature(self) -> Any:
        """What two layers must have in common."""
        needed = sorted((name, shape) for name, shape in self.shapes.items() if name not in self.optional)
        return self.place.kind, self.place.stacked, tuple(needed)

    @property
    def name(self) -> str:
        """Its path, as it is printed."""
        return "/".join(self.place.path) or "(model)"

    def described(self) -> str:
        """Says what it is and which arrays it has."""
        shapes = " ".join(f"{name}[{','.join(map(str, shape))}]" for name, shape in self.shapes.items())
        stacked = "".join(f"{size} x " for size in self.place.stacked)
        called = "" if self.place.is_called else " (not called)"
        return f"{stacked}{self.place.class_name} {shapes}{called}".strip()


Pair: TypeAlias = tuple[Candidate, Candidate]


def paired(source: Sequence[Candidate], target: Sequence[Candidate], mapping: Mapping[str, str | None]) -> list[Pair]:
    """Pairs the layers of two models.

    Args:
        source: the layers of the one, in the order of their calls.
        target: the layers of the other.
        mapping: pairs that are said, by paths; a source layer with `None` is left behind.

    Returns:
        The pairs, in the source's order.

    Raises:
        MigrationError: a layer is left over on either side, shapes differ, there are several candidates, or `mapping`
            names what there is not.
    """
    pairs, problems = _as_said(source, target, mapping)
    behind = {name for name, to in mapping.items() if to is None}
    left = [one for one in source if one.name not in behind and all(one is not a for a, _ in pairs)]
    other = [one for one in target if all(one is not b for _, b in pairs)]
    for is_layer in (True, False):
        mine = [one for one in left if (one.place.layout is not None) is is_layer]
        theirs = [one for one in other if (one.place.layout is not None) is is_layer]
        found, doubts = _in_order(mine, theirs) if is_layer else _by_groups(mine, theirs)
        pairs, problems = [*pairs, *found], [*problems, *doubts]
    lonely = [one for one in left if all(one is not a for a, _ in pairs)]
    unfilled = [one for one in other if all(one is not b for _, b in pairs)]
    if not problems and not lonely and not unfilled:
        order = {id(one): index for index, one in enumerate(source)}
        return sorted(pairs, key=lambda pair: order[id(pair[0])])
    rows, notes = _side_by_side([one for one in source if one.name not in behind], target, pairs)
    doubtful = bool(problems)
    problems += notes
    if not problems:
        problems = ["The layers don't pair up."]
    advice = (
        "Say which belongs to which, `mapping={'path in the source': 'path in the target'}`."
        if doubtful
        else "Change one of the models, or say which layers belong together, `mapping={'source/path': 'target/path'}`; "
        "what is to be left behind, `mapping={'source/path': None}`."
    )
    raise MigrationError("\n".join([*problems, advice, "", table(("source", "", "target", ""), rows)]))


def _as_said(
    source: Sequence[Candidate], target: Sequence[Candidate], mapping: Mapping[str, str | None]
) -> tuple[list[Pair], list[str]]:
    mine, theirs = {one.name: one for one in source}, {one.name: one for one in target}
    pairs: list[Pair] = []
    problems: list[str] = []
    taken: dict[str, str] = {}
    for name, to in mapping.items():
        for side, known, asked in (("source", mine, name), ("target", theirs, to)):
            if asked is not None and asked not in known:
                near = difflib.get_close_matches(asked, known, 3, 0.4) or list(known)[:5]
                raise MigrationError(
                    f"`mapping` names {asked!r}, but the {side} has no such layer. It has {', '.join(map(repr, near))}."
                )
        if to is None:
            continue
        if to in taken:
            raise MigrationError(f"`mapping` sends both {taken[to]!r} and {name!r} to {to!r}.")
        taken[to] = name
        if mine[name].signature != theirs[to].signature:
            raise MigrationError(_no_pair(mine[name], theirs[to]) + " `mapping` pairs them.")
        pairs.append((mine[name], theirs[to]))
    return pairs, problems


def _in_order(mine: Sequence[Candidate], theirs: Sequence[Candidate]) -> tuple[list[Pair], list[str]]:
    """Pairs layers by the order of calls, if that is the same on both sides and no names speak against it."""
    if [one.signature for one in mine] != [one.signature for one in theirs]:
        return _by_groups(mine, theirs)
    pairs = list(zip(mine, theirs, strict=True))
    problems = []
    for group, others in _groups(mine, theirs):
        named = _by_names(group, others)
        against = [(a, b) for a, b in named or () if (a, b) not in pairs]
        if against:
            called = dict(pairs)
            a, b = against[0]
            problems.append(
                f"{a.name!r} has two candidates: {called[a].name!r} by the order of calls, {b.name!r} by its name."
            )
    return ([] if problems else pairs), problems


def _by_groups(mine: Sequence[Candidate], theirs: Sequence[Candidate]) -> tuple[list[Pair], list[str]]:
    """Pairs what is alike on both sides once, and by names where it is there several times."""
    pairs: list[Pair] = []
    problems: list[str] = []
    for group, others in _groups(mine, theirs):
        if len(group) == len(others) == 1:
            pairs.append((group[0], others[0]))
        elif named := _by_names(group, others):
            pairs += named
        elif len(group) == len(others):
            names = ", ".join(repr(one.name) for one in others)
            problems.append(
                f"{group[0].name!r} has {len(others)} candidates that are alike, {names}, and neither the order of "
                "calls nor the names tell which it is."
            )
    return pairs, problems


def _groups(mine: Sequence[Candidate], theirs: Sequence[Candidate]) -> list[tuple[list[Candidate], list[Candidate]]]:
    signatures = list(dict.fromkeys(one.signature for one in mine))
    both = [
        ([one for one in mine if one.signature == this], [one for one in theirs if one.signature == this])
        for this in signatures
    ]
    return [(group, others) for group, others in both if others]


def _by_names(group: Sequence[Candidate], others: Sequence[Candidate]) -> list[Pair]:
    """Pairs layers whose paths end alike, if as many of their names as it takes tell all of them apart."""
    longest = max(len(_names(one)) for one in [*group, *others])
    for count in range(1, longest + 1):
        ends = [{_names(one)[-count:]: one for one in side} for side in (group, others)]
        if len(ends[0]) == len(group) == len(ends[1]) == len(others) and set(ends[0]) == set(ends[1]):
            return [(one, ends[1][end]) for end, one in ends[0].items()]
    return []


def _names(one: Candidate) -> Path:
    return tuple(name.lower() for name in one.place.path if name != "~")


def _side_by_side(
    source: Sequence[Candidate], target: Sequence[Candidate], pairs: Sequence[Pair]
) -> tuple[list[tuple[str, ...]], list[str]]:
    """Lists the layers of both sides beside each other, and says what does not fit."""
    known = {id(a): b for a, b in pairs}
    keys = {id(b): ("pair", id(a)) for a, b in pairs}
    one = [("pair", id(layer)) if id(layer) in known else layer.signature for layer in source]
    other = [keys.get(id(layer), layer.signature) for layer in target]
    rows: list[tuple[str, ...]] = []
    notes: list[str] = []
    for _, a, b, c, d in difflib.SequenceMatcher(None, one, other, autojunk=False).get_opcodes():
        for row in range(max(b - a, d - c)):
            mine = source[a + row] if a + row < b else None
            theirs = target[c + row] if c + row < d else None
            mine_known = mine is not None and id(mine) in known
            theirs_known = theirs is not None and id(theirs) in keys
            if mine and theirs and mine.signature != theirs.signature and not mine_known and not theirs_known:
                notes.append(_no_pair(mine, theirs))
            else:
                if mine and not theirs and not mine_known:
                    notes.append(f"The source's {mine.name!r} ({mine.described()}) has no counterpart in the target.")
                if theirs and not mine and not theirs_known:
                    notes.append(f"The target's {theirs.name!r} ({theirs.described()}) gets nothing from the source.")
            cells = [(side.name, side.described()) if side else ("", "") for side in (mine, theirs)]
            rows.append((*cells[0], *cells[1]))
    return rows, notes


def _no_pair(mine: Candidate, theirs: Candidate) -> str:
    what = f"{mine.name!r} of the source and {theirs.name!r} of the target"
    layouts = mine.place.layout, theirs.place.layout
    if layouts[0] and layouts[1] and (why := refusal_of(mine.place.layer, layouts[0], theirs.place.layer, layouts[1])):
        return f"{what} can't be converted into each other, because {why}."
    if mine.place.kind != theirs.place.kind:
        return (
            f"{what} stand in the same place and are of different kinds, {mine.place.class_name} and "
            f"{theirs.place.class_name}."
        )
    if mine.place.stacked != theirs.place.stacked:
        return f"{what} are stacked differently: {mine.described()}, and {theirs.described()}."
    names = [*dict.fromkeys([*mine.shapes, *theirs.shapes])]
    differ = [name for name in names if mine.shapes.get(name) != theirs.shapes.get(name)]
    shown = ", ".join(
        f"`{name}` {_shown(mine.shapes.get(name))} and {_shown(theirs.shapes.get(name))}" for name in differ
    )
    return f"{what} don't have the same arrays: {shown}."


def _shown(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else str(list(shape))
