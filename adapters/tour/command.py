"""The tour from beginning to end: train, show the table, write the plot, judge."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import crossvjp as cv
from crossvjp.tour import data, plot, report, verdict
from crossvjp.tour.frameworks import OTHERS, PLAIN
from crossvjp.tour.network import Training
from crossvjp.tour.rule import UnitNorm
from crossvjp.tour.train import Plan, Run, train


def load(names: Sequence[str]) -> dict[str, type[Training]]:
    """Imports plain JAX's network and those of the named frameworks, by the label of each.

    Raises:
        ModuleNotFoundError: a framework is not installed.
    """
    return {framework.label: framework.load() for framework in (PLAIN, *(OTHERS[name] for name in names))}


def run(trainings: dict[str, type[Training]], plan: Plan, out: Path) -> int:
    """Runs the tour.

    Args:
        trainings: as `load` gives them, plain JAX first.
        plan: the number of steps and the seed.
        out: an existing folder, which gets the plot.

    Returns:
        0 if every framework agrees with plain JAX and learned the digits, else 1.
    """
    rule, console = UnitNorm(), Console()
    reference, *others, baseline = train_all(rule, trainings, plan, console)
    console.print(report.table(reference, others, baseline))
    path = out / "tour.png"
    plot.save(path, type(rule).__name__, reference, others, baseline)
    console.print(f"Plot: {path}", soft_wrap=True, highlight=False)
    found = verdict.faults(reference, others, baseline)
    for fault in found:
        print(f"crossvjp tour: {fault}", file=sys.stderr)
    if not found:
        console.print(f"Agreed: {', '.join(trainings)}.", soft_wrap=True, highlight=False)
    return 1 if found else 0


def train_all(rule: cv.Rule, trainings: dict[str, type[Training]], plan: Plan, console: Console) -> list[Run]:
    """Trains in every framework under the rule, and last in plain JAX without it.

    JAX computes in float64 meanwhile, and on the CPU, so that the figures do not depend on the
    machine; other threads and code that runs later are not affected.
    """
    digits = data.load()
    plans = [(label, training, rule) for label, training in trainings.items()]
    plans.append((f"{PLAIN.label}, no rule", trainings[PLAIN.label], None))
    columns = (
        TextColumn("{task.description:<20}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[loss]}"),
    )
    runs = []
    with jax.enable_x64(True), jax.default_device(_cpu()), Progress(*columns, console=console) as progress:
        tasks = [progress.add_task(label, total=plan.steps, loss="", start=False) for label, _, _ in plans]
        for task, (label, training, its_rule) in zip(tasks, plans, strict=True):
            progress.start_task(task)

            def show(loss: float, task: object = task) -> None:
                progress.update(task, advance=1, loss=f"loss {loss:.4f}")

            runs.append(train(label, training, its_rule, plan, digits, show))
    return runs


def _cpu() -> jax.Device | None:
    """Finds the CPU; `None`, JAX's own choice, where `JAX_PLATFORMS` leaves it out."""
    try:
        return jax.devices("cpu")[0]
    except RuntimeError:
        return None
