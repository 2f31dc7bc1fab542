"""What a migration says of itself: which layer went where, how far the two models are apart, and why."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from ._settings import Difference


@dataclasses.dataclass(frozen=True)
class Moved:
    """A layer that went from one model to the other.

    Attributes:
        source: its path in the source.
        source_class: its class there.
        target: its path in the target.
        target_class: its class there.
        shapes: of its canonical arrays, by name.
        pieces: what happened to its arrays on the way.
    """

    source: str
    source_class: str
    target: str
    target_class: str
    shapes: str
    pieces: str


@dataclasses.dataclass(frozen=True)
class Check:
    """One figure of the proof.

    Attributes:
        what: what was compared.
        arrays: how many arrays.
        difference: the largest difference, in units of the largest entry of its array; of the largest entry of all
            arrays times 0.01 where the array's own is smaller than that.
        absolute: the same difference as it is.
        where: the array and the index of the largest difference.
        tolerance: what `difference` may be.
    """

    what: str
    arrays: int
    difference: float
    absolute: float
    where: str
    tolerance: float

    @property
    def holds(self) -> bool:
        """Whether the difference is within the tolerance; that of a NaN is not."""
        return self.difference <= self.tolerance


@dataclasses.dataclass(frozen=True)
class Report:
    """What is known of a migration. It prints as tables.

    Attributes:
        layers: which layer went where.
        checks: the figures of the proof.
        settings: what the layers' functions depend on, where the sides differ.
        frameworks: of the source and of the target.
        kept: what the target has no place for, such as a counter, by layers; it is among the remainders.
    """

    layers: Sequence[Moved]
    checks: Sequence[Check]
    settings: Sequence[Difference]
    frameworks: tuple[str, str]
    kept: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)

    @property
    def proved(self) -> bool:
        """Whether something was compared, and all of it is within the tolerance."""
        return bool(self.checks) and all(check.holds for check in self.checks)

    def __str__(self) -> str:
        """Gives the tables."""
        one, other = self.frameworks
        parts = [
            table(
                (f"source ({one})", "", f"target ({other})", "", "arrays", "by"),
                [dataclasses.astuple(moved) for moved in self.layers],
            ),
            self.proof(),
        ]
        return "\n\n".join(part for part in parts if part)

    __repr__ = __str__

    def proof(self) -> str:
        """Tables the figures, the part that says whether the two models are the same, and what keeps them from it."""
        rows = [
            (
                check.what,
                "bit for bit" if check.absolute == 0 else f"{check.difference:.1e}",
                "" if check.absolute == 0 else f"{check.absolute:.1e}",
                "holds" if check.holds else f"FAILS ({check.tolerance:.0e})",
                "" if check.absolute == 0 else check.where,
            )
            for check in self.checks
        ]
        parts = [table(("compared", "difference", "absolute", "", "largest at"), rows)] if rows else []
        if self.settings:
            head = "Settings that differ:" if self.proved or not rows else "Settings that differ, the likely cause:"
            parts.append("\n".join([head, *(f"  {difference.text}" for difference in self.settings)]))
        if self.kept:
            together: dict[str, list[str]] = {}
            for path, names in self.kept.items():
                together.setdefault(", ".join(names), []).append(path)
            lines = [f"  {names} of {_listed(paths)}" for names, paths in together.items()]
            parts.append("\n".join(["State that the target has no place for, kept among the remainders:", *lines]))
        return "\n\n".join(parts)


def _listed(paths: Sequence[str]) -> str:
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return ", ".join(paths[:3]) + more


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lines columns up."""
    lines = [tuple(head), *map(tuple, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
