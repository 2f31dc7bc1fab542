"""Whether what is measured holds to what is promised."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping

from rich.table import Table

from benchmarks.cases import OURS, TITLES, Layer, Variant
from benchmarks.growth import MARKED, exponent, fitted
from benchmarks.memory import Kept
from benchmarks.timing import Samples, ratio

TO_PLAIN, TO_OWN = 1.3, 0.7  # tracing
ATTACHED_TO_PLAIN = 1.6
EAGER_TO_OWN, EAGER_TO_HAND = 1.0, 1.5
EXPONENT = 1.1
IMPORT_MS = 50.0


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A number, and what it may be at most; or what it must be, if it is exact and depends on no clock."""

    claim: str
    measured: float
    limit: float
    exact: bool = False

    @property
    def passed(self) -> bool:
        """Whether the claim holds."""
        return self.measured == self.limit if self.exact else self.measured <= self.limit

    def __str__(self) -> str:
        return f"{self.claim}: {self.measured:.2f}, {'pass' if self.passed else 'fall short'}"


def compiled(framework: str, layer: Layer, farthest: float) -> list[Verdict]:
    """Flops, bytes and temporaries are those of the rule by hand; `farthest` is the ratio that is farthest from 1."""
    return [Verdict(f"{framework}, {TITLES[layer]}: compiled costs, to by hand", farthest, 1, exact=True)]


def collectives(framework: str, differing: int) -> list[Verdict]:
    """No program of ours has other collectives than the rule by hand."""
    return [Verdict(f"{framework}: programs with other collectives than by hand", differing, 0, exact=True)]


def tracing(framework: str, layer: Layer, samples: Samples) -> list[Verdict]:
    """Tracing costs little more than the plain model's, and, of Dense, less than the framework's own transform's."""
    what = f"{framework}, {TITLES[layer]}: tracing {MARKED} calls"
    found = [Verdict(f"{what}, {ours}, to plain", ratio(samples, ours, "plain"), TO_PLAIN) for ours in OURS]
    if "own" in samples and layer == "dense":
        found += [Verdict(f"{what}, {ours}, to own", ratio(samples, ours, "own"), TO_OWN) for ours in OURS]
    return found


def growth(
    framework: str, samples: Mapping[int, Samples], counted: Mapping[int, Mapping[Variant, int]]
) -> list[Verdict]:
    """Tracing of Dense is linear in the number of calls, in time and in function calls."""
    found = []
    for ours in OURS:
        what = f"{framework}, {TITLES['dense']}: exponent of tracing, {ours}"
        calls = exponent({depth: each[ours] for depth, each in counted.items()})
        found += [Verdict(f"{what}, time", fitted(samples, ours), EXPONENT)]
        found += [Verdict(f"{what}, function calls", calls, EXPONENT)]
    return found


def eager(framework: str, samples: Samples) -> list[Verdict]:
    """An eager call of Dense costs no more than by the framework's own transform, and little more than by hand."""
    what = f"{framework}, {TITLES['dense']}: eager call"
    found = [Verdict(f"{what}, {ours}, to by hand", ratio(samples, ours, "by hand"), EAGER_TO_HAND) for ours in OURS]
    if "own" in samples:
        found += [Verdict(f"{what}, {ours}, to own", ratio(samples, ours, "own"), EAGER_TO_OWN) for ours in OURS]
    return found


def attached(samples: Samples, flops: Mapping[Variant, float]) -> list[Verdict]:
    """A rule attached to a published model costs some tracing, and not a flop."""
    what = "Haiku, ResNet18, a rule at all convolutions"
    return [
        Verdict(f"{what}: tracing, to plain", ratio(samples, "rule", "plain"), ATTACHED_TO_PLAIN),
        Verdict(f"{what}: flops, to plain", flops["rule"] / flops["plain"], 1, exact=True),
    ]


def imports(added: list[float]) -> list[Verdict]:
    """The import is quick."""
    return [Verdict("import crossvjp after jax, ms", 1e3 * statistics.median(added), IMPORT_MS)]


def memory(title: str, measured: Mapping[str, Mapping[int, Kept]]) -> list[Verdict]:
    """At the largest size, each rule keeps and takes less than the plain function, the first one."""
    plain, *rules = ((name, sizes[max(sizes)]) for name, sizes in measured.items())
    return [
        Verdict(f"{title}, {name}: {measure}, to plain", getattr(kept, measure) / getattr(plain[1], measure), 1.0)
        for name, kept in rules
        for measure in ("residuals", "temporary")
    ]


def table(verdicts: list[Verdict]) -> Table:
    """Shows all verdicts."""
    made = Table("claim", title="Verdicts")
    for name in ("measured", "allowed", "verdict"):
        made.add_column(name, justify="right", no_wrap=True)
    for each in verdicts:
        mark = "[green]pass" if each.passed else "[bold red]fall short"
        allowed = f"{'=' if each.exact else '≤'} {each.limit:g}"
        made.add_row(each.claim, f"{each.measured:.4f}" if each.exact else f"{each.measured:.2f}", allowed, mark)
    return made
