"""Prints all tables and verdicts, and draws what grows; `python -m benchmarks growth memory` does these parts."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
from rich.console import Console

from benchmarks import attached, collectives, compiled, growth, imports, memory, plots, stages, verdicts
from benchmarks.cases import FRAMEWORKS, LAYERS
from benchmarks.verdicts import Verdict

FOLDER = Path("bench-out")


def _imports(console: Console) -> list[Verdict]:
    jax_alone, added = imports.imports()
    console.print(imports.table(jax_alone, added))
    return verdicts.imports(added)


def _growth(console: Console) -> list[Verdict]:
    found: list[Verdict] = []
    for layer in growth.ROUNDS:
        samples = {framework: growth.traces(framework, layer) for framework in FRAMEWORKS}
        counted = {framework: growth.counts(framework, layer) for framework in FRAMEWORKS} if layer == "dense" else None
        console.print(growth.table(layer, samples, counted))
        console.print(plots.growth(FOLDER, layer, samples))
        for framework in FRAMEWORKS:
            found += verdicts.tracing(framework, layer, samples[framework][growth.MARKED])
            if counted:
                found += verdicts.growth(framework, samples[framework], counted[framework])
    return found


def _stages(console: Console) -> list[Verdict]:
    found: list[Verdict] = []
    for layer in stages.MODELS:
        samples = {framework: stages.stages(framework, layer) for framework in FRAMEWORKS}
        console.print(stages.table(layer, samples))
        console.print(plots.stages(FOLDER, layer, samples))
        for framework in FRAMEWORKS if layer == "dense" else ():
            found += verdicts.eager(framework, samples[framework]["eager call"])
    return found


def _attached(console: Console) -> list[Verdict]:
    samples, flops = attached.traces(), attached.flops()
    console.print(attached.table(samples, flops))
    return verdicts.attached(samples, flops)


def _memory(console: Console) -> list[Verdict]:
    measured = {title: family.measured() for title, family in memory.FAMILIES.items()}
    for title, family in memory.FAMILIES.items():
        console.print(memory.table(title, family, measured[title]))
    console.print(plots.memory(FOLDER, measured))
    return [each for title, ways in measured.items() for each in verdicts.memory(title, ways)]


def _compiled(console: Console) -> list[Verdict]:
    found: list[Verdict] = []
    for layer in LAYERS:
        console.print(compiled.table(layer))
        for framework in FRAMEWORKS:
            found += verdicts.compiled(framework, layer, compiled.farthest(framework, layer))
    return found


def _collectives(console: Console) -> list[Verdict]:
    console.print(collectives.table())
    return [
        each for framework in FRAMEWORKS for each in verdicts.collectives(framework, collectives.differing(framework))
    ]


PARTS: dict[str, Callable[[Console], list[Verdict]]] = {
    "imports": _imports,
    "growth": _growth,
    "stages": _stages,
    "attached": _attached,
    "memory": _memory,
    "compiled": _compiled,
    "collectives": _collectives,
}


def main() -> int:
    """Runs the benchmarks; fails if an exact number falls short, since times depend on the machine."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all by default")
    chosen = parser.parse_args().parts or [*PARTS]
    if unknown := set(chosen) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    jax.config.update("jax_num_cpu_devices", collectives.DEVICES)  # all but the collectives runs on the first
    console = Console()
    console.width = max(console.width, 170)  # a wrapped number can't be read
    found: list[Verdict] = []
    for part in chosen:
        start = time.perf_counter()
        found += PARTS[part](console)
        console.print(f"{part}: {time.perf_counter() - start:.0f} s")
    console.print(verdicts.table(found))
    short = [each for each in found if not each.passed]
    console.print(f"{len(found) - len(short)} pass, {len(short)} fall short")
    return 1 if any(each.exact for each in short) else 0


if __name__ == "__main__":
    sys.exit(main())
