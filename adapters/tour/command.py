"""The tour from beginning to end: train, show the table, write the plot, judge."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

import crossvjp as cv
from crossvjp.tour import data, plot, report, verdict
from crossvjp.tour.frameworks import OTHERS, PLAIN
from crossvjp.tour.network import Start
from crossvjp.tour.plain import PlainTraining
from crossvjp.tour.rule import UnitNorm
from crossvjp.tour.train import Plan, Run, train


def load(names: Sequence[str]) -> dict[str, Start]:
    """Imports the named frameworks; gives what starts a training in plain JAX and in each of them, by label.

    Raises:
        ModuleNotFoundError: a framework is not installed.
    """
    return {framework.label: framework.load() for framework in (PLAIN, *(OTHERS[name] for name in names))}


def run(starts: dict[str, Start], plan: Plan, out: Path) -> int:
    """Runs the tour.

    Args:
        starts: as `load` gives them, plain JAX first.
        plan: the number of steps and the seed.
        out: an existing folder, which gets the plot.

    Returns:
        0 if every framework agrees with plain JAX and learned the digits, else 1.
    """
    rule, console = UnitNorm(), Console()
    reference, *others, baseline = train_all(rule, starts, plan, console)
    console.print(report.table(reference, others, baseline))
    path = out / "tour.png"
    plot.save(path, type(rule).__name__, reference, others, baseline)
    console.print(f"Plot: {path}", soft_wrap=True, highlight=False)
    found = verdict.faults(reference, others, baseline)
    for fault in found:
        print(f"crossvjp tour: {fault}", file=sys.stderr)
    if not found:
        console.print(f"Agreed: {', '.join(starts)}.", soft_wrap=True, highlight=False)
    return 1 if found else 0


def train_all(rule: cv.Rule, starts: dict[str, Start], plan: Plan, console: Console) -> list[Run]:
    """Trains in every framework under the rule, and last in plain JAX without it."""
    digits = data.load()
    under_rule = {label: partial(start, rule) for label, start in starts.items()}
    trainings = {**under_rule, f"{PLAIN.label}, no rule": partial(PlainTraining, None)}
    columns = (
        TextColumn("{task.description:<20}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[loss]}"),
    )
    runs = []
    with settings(), Progress(*columns, console=console) as progress:
        tasks = [progress.add_task(label, total=plan.steps, loss="", start=False) for label in trainings]
        for task, (label, start) in zip(tasks, trainings.items(), strict=True):
            progress.start_task(task)

            def show(loss: float, task: TaskID = task) -> None:
                progress.update(task, advance=1, loss=f"loss {loss:.4f}")

            runs.append(train(label, start, plan, digits, show))
    return runs


@contextlib.contextmanager
def settings() -> Iterator[None]:
    """Computes in float64 on the CPU inside, so that the figures do not depend on the machine.

    Other threads and code that runs later are not affected. Promotion is JAX's default, whatever the environment says.
    """
    with (
        jax.enable_x64(True),
        jax.default_device(_cpu()),
        jax.numpy_rank_promotion("allow"),
        jax.numpy_dtype_promotion("standard"),
    ):
        yield


def _cpu() -> Any:
    """Finds the CPU; `None`, JAX's own choice, where `JAX_PLATFORMS` leaves it out."""
    try:
        return jax.devices("cpu")[0]
    except RuntimeError:
        return None
