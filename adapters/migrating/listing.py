"""`crossvjp show`: what a file of parameters holds."""

from __future__ import annotations

import math
import sys
from pathlib import Path

from crossvjp.adapters import files
from crossvjp.adapters.migrating import report


def run(path: Path, format: str | None) -> int:
    """Prints paths, shapes and dtypes.

    Returns:
        0; 1 if the file can't be read, 2 if there is none.
    """
    try:
        found, entries = files.entries(path, format=format)
    except (files.FileError, OSError) as error:
        print(f"crossvjp show: {error}", file=sys.stderr)
        return 2 if isinstance(error, FileNotFoundError) else 1
    count = sum(math.prod(entry.shape) for entry in entries)
    console = report.console()
    console.print(report.listed(entries, f"{path.name} ({found})"))
    console.print(f"{len(entries)} arrays, {count:,} numbers", highlight=False)
    return 0
