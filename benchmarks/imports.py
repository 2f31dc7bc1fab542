"""What `import crossvjp` adds to `import jax`: CPU milliseconds in processes of their own."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys

from rich.table import Table

from benchmarks.timing import spread

PROCESSES = 9
_PROGRAM = """
import time
start = time.process_time()
import jax
between = time.process_time()
import crossvjp
print(between - start, time.process_time() - between)
"""


def imports() -> tuple[list[float], list[float]]:
    """Gives the seconds of `import jax`, and of `import crossvjp` after it, one after the other in each process."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    found = []
    for _ in range(PROCESSES + 1):  # the first one writes bytecode
        run = subprocess.run([sys.executable, "-c", _PROGRAM], env=environment, capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(f"`import crossvjp` failed in a process of its own:\n{run.stderr}")
        found.append(tuple(map(float, run.stdout.split())))
    jax_alone, added = zip(*found[1:], strict=True)
    return list(jax_alone), list(added)


def table(jax_alone: list[float], added: list[float]) -> Table:
    """Shows both."""
    made = Table("import", "CPU ms", title="Imports", caption=f"Medians of {PROCESSES} processes, with bytecode kept.")
    for name, values in (("jax", jax_alone), ("crossvjp, after jax", added)):
        made.add_row(name, f"{1e3 * statistics.median(values):.0f} ±{100 * spread(values):.0f}%")
    return made
