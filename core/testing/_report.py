"""Named checks, and what came of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, TypeAlias

Outcome: TypeAlias = Literal["passed", "failed", "not applicable"]


class NotApplicableError(Exception):
    """A check has nothing to compare: the module itself can't do what it is about, or the rule does not claim it."""


@dataclasses.dataclass(frozen=True)
class Check:
    """One check: a name, and a function that raises an `AssertionError` where something is wrong.

    Example:
        >>> check = Check("one is one", lambda number: None)
        >>> check(1).outcome
        'passed'
    """

    name: str
    run: Callable[..., None]

    def __call__(self, *args: Any, **kwargs: Any) -> Result:
        """Runs the check; what it raises passes through, but for "not applicable"."""
        try:
            self.run(*args, **kwargs)
        except NotApplicableError as reason:
            return Result(self.name, "not applicable", str(reason))
        return Result(self.name, "passed", "")

    def attempt(self, *args: Any, **kwargs: Any) -> Result:
        """Runs the check and gives whatever is raised as a failure."""
        try:
            return self(*args, **kwargs)
        except Exception as error:
            return Result(self.name, "failed", f"{type(error).__name__}: {error}", error)

    def __str__(self) -> str:
        return self.name


@dataclasses.dataclass(frozen=True)
class Result:
    """What came of one check."""

    name: str
    outcome: Outcome
    message: str
    error: BaseException | None = None

    def __str__(self) -> str:
        return f"{self.name}: {self.outcome}" + (f": {self.message}" if self.message else "")


@dataclasses.dataclass(frozen=True)
class Report:
    """What came of all checks of one subject."""

    subject: str
    results: tuple[Result, ...]

    def __getitem__(self, outcome: Outcome) -> list[Result]:
        """Lists the results of one outcome."""
        return [result for result in self.results if result.outcome == outcome]

    def __str__(self) -> str:
        return "\n".join([f"{self.subject}:", *(f"  {result}" for result in self.results)])


class CheckError(AssertionError):
    """Some checks failed; `reports` has all results, and the message those that failed."""

    def __init__(self, reports: Sequence[Report]):
        failed = [(report, result) for report in reports for result in report["failed"]]
        lines = [f"{report.subject}: {result}" for report, result in failed]
        super().__init__(f"{len(failed)} check{'s' if len(failed) > 1 else ''} failed.\n" + "\n".join(lines))
        self.reports = tuple(reports)


def run_all(checks: Iterable[Check], name: str, *args: Any, **kwargs: Any) -> Report:
    """Runs checks on one subject, each to its end."""
    return Report(name, tuple(check.attempt(*args, **kwargs) for check in checks))


def raise_failures(reports: Sequence[Report]) -> None:
    """Raises a `CheckError` if any check failed, with the first failure as its cause."""
    failures = [result.error for report in reports for result in report["failed"]]
    if failures:
        raise CheckError(reports) from failures[0]
