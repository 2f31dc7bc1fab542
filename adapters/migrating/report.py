"""The tables."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from crossvjp.adapters.files import Entry
from crossvjp.migration import Report


def console() -> Console:
    """Makes the console; a file or a pipe gets lines that are wide enough for long paths."""
    return Console(width=None if sys.stdout.isatty() else 160)


def show(report: Report, console: Console) -> None:
    """Prints which layer went where, the proof, and the settings that differ."""
    one, other = report.frameworks
    layers = Table(title="What went where", title_justify="left")
    for heading in (f"{one}", "", f"{other}", "", "arrays", "by"):
        layers.add_column(heading, overflow="fold")
    for moved in report.layers:
        cells = (moved.source, moved.source_class, moved.target, moved.target_class, moved.shapes, moved.pieces)
        layers.add_row(*map(_plain, cells))
    console.print(layers)
    if report.checks:
        console.print(_proof(report))
    if report.settings:
        console.print("Settings that differ:", highlight=False)
        for difference in report.settings:
            console.print(f"  {_plain(difference.text)}", soft_wrap=True, highlight=False)


def show_dtypes(read: Any, written: Any, console: Console) -> None:
    """Says so if the new file has other dtypes than the old one; the values are the same, as the move saw to it."""
    before, after = (
        sorted({leaf.dtype.name for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype")})
        for tree in (read, written)
    )
    if after and before != after:
        console.print(f"Dtypes: {', '.join(before)} before, {', '.join(after)} now.", highlight=False)


def _proof(report: Report) -> Table:
    made = Table(title="The same function?", title_justify="left")
    for heading in ("compared", "difference", "allowed", "", "largest at"):
        made.add_column(heading, overflow="fold")
    for check in report.checks:
        figure = "bit for bit" if check.absolute == 0 else f"{check.difference:.1e}"
        verdict = "holds" if check.holds else "FAILS"
        where = "" if check.absolute == 0 else check.where
        made.add_row(_plain(check.what), figure, f"{check.tolerance:.0e}", verdict, _plain(where))
    return made


def listed(entries: Sequence[Entry], title: str) -> Table:
    """Makes a table of what a file holds."""
    made = Table(title=_plain(title), title_justify="left")
    made.add_column("path", overflow="fold")
    made.add_column("shape", no_wrap=True)
    made.add_column("dtype", no_wrap=True)
    for entry in entries:
        made.add_row(_plain("/".join(entry.path)), _plain(str(list(entry.shape))), entry.dtype)
    return made


def _plain(text: str) -> str:
    """Keeps brackets from being read as markup."""
    return text.replace("[", r"\[")
