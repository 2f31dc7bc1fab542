"""Prints all tables; fails if a compiled program costs, or says, more or less than the same rule written by hand."""

from __future__ import annotations

import sys

import jax
from rich.console import Console

from benchmarks import collectives, compiled, tracing
from benchmarks.cases import LAYERS


def main() -> int:
    """Runs the benchmarks and gives the exit code."""
    jax.config.update("jax_num_cpu_devices", collectives.DEVICES)  # all but the collectives runs on the first
    console = Console()
    console.width = max(console.width, 140)  # a wrapped number can't be read
    passed = []
    for layer in LAYERS:
        table, equal = compiled.table(layer)
        console.print(table)
        passed.append(equal)
    table, equal = collectives.table()
    console.print(table)
    passed.append(equal)
    console.print(tracing.table())
    console.print("Compiled programs: " + ("all PASS" if all(passed) else "some FALL SHORT"))
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
