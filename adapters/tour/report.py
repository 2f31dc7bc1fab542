"""The table."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from crossvjp.tour.train import Run
from crossvjp.tour.verdict import LEAST_ACCURACY, TOLERANCE, largest_difference


def table(reference: Run, others: Sequence[Run], baseline: Run) -> Table:
    """Makes the table: a row for each framework, and the run without the rule below."""
    steps = len(reference.losses)
    made = Table(
        title=f"One rule object on every layer, {steps} steps",
        caption=f"Differences are the largest from plain JAX under the rule; up to {TOLERANCE:.0e} the frameworks "
        f"agree. Accuracy is expected to be {LEAST_ACCURACY:.0%} or more. Times include compiling.",
    )
    made.add_column("framework", no_wrap=True)
    for heading in ("test\naccuracy", "difference of\nparameters", "difference of\nstatistics", "time"):
        made.add_column(heading, justify="right")
    for run in (reference, *others):
        made.add_row(*_row(run, reference))
    made.add_section()
    made.add_row(*_row(baseline, reference), style="dim")
    return made


def _row(run: Run, reference: Run) -> list[str]:
    params = largest_difference(run.final.params, reference.final.params).value
    statistics = largest_difference(run.final.statistics, reference.final.statistics).value
    differences = ["-", "-"] if run is reference else [f"{params:.1e}", f"{statistics:.1e}"]
    return [run.label, f"{run.accuracy:.1%}", *differences, f"{run.seconds:.1f} s"]
