"""Pictures of what grows, written as PNG files."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.cases import FRAMEWORKS, TITLES, Layer, Variant, variants
from benchmarks.memory import FAMILIES, Kept
from benchmarks.stages import STAGES

COLOURS: dict[Variant, str] = {
    "plain": "0.5",
    "by hand": "black",
    "own": "tab:orange",
    "rule": "tab:blue",
    "custom_vjp": "tab:green",
}


def growth(folder: Path, layer: Layer, found: Mapping[str, Mapping[int, Mapping[Variant, list[float]]]]) -> Path:
    """Draws the time of tracing against the number of calls, one panel a framework."""
    figure, panels = _panels(len(FRAMEWORKS))
    for panel, framework in zip(panels, FRAMEWORKS, strict=True):
        samples = found[framework]
        for variant in variants(framework):
            medians = [1e3 * statistics.median(each[variant]) for each in samples.values()]
            panel.loglog([*samples], medians, marker="o", color=COLOURS[variant], label=variant)
        panel.set(title=framework, xlabel="wrapped calls", ylabel="tracing, ms")
        panel.legend()
    figure.suptitle(f"Tracing the gradient: {TITLES[layer]}")
    return _saved(figure, folder / f"growth-{layer}.png")


def stages(folder: Path, layer: Layer, found: Mapping[str, Mapping[str, Mapping[Variant, list[float]]]]) -> Path:
    """Draws the medians of every stage, as bars, one panel a stage."""
    figure, panels = _panels(len(STAGES))
    for panel, stage in zip(panels, STAGES, strict=True):
        for place, variant in enumerate(COLOURS):
            known = [index for index, framework in enumerate(FRAMEWORKS) if variant in found[framework][stage]]
            heights = [1e3 * statistics.median(found[[*FRAMEWORKS][index]][stage][variant]) for index in known]
            panel.bar(
                [index + (place - 2) * 0.16 for index in known], heights, 0.16, color=COLOURS[variant], label=variant
            )
        panel.set(title=stage, ylabel="ms")
        panel.set_xticks(range(len(FRAMEWORKS)), [*FRAMEWORKS], rotation=30)
    panels[0].legend()
    figure.suptitle(f"Stages: {TITLES[layer]}")
    return _saved(figure, folder / f"stages-{layer}.png")


def memory(folder: Path, measured: Mapping[str, Mapping[str, Mapping[int, Kept]]]) -> Path:
    """Draws residuals as lines and temporaries as dashed ones against the size, one panel a function."""
    figure, panels = _panels(len(measured))
    for panel, (title, ways) in zip(panels, measured.items(), strict=True):
        for index, (name, sizes) in enumerate(ways.items()):
            for measure, line in (("residuals", "-"), ("temporary", "--")):
                kilobytes = [getattr(kept, measure) / 1024 for kept in sizes.values()]
                label = f"{name}, {measure}"
                panel.loglog([*sizes], kilobytes, line, marker="o", color=f"C{index}", label=label)
        panel.set(title=title, xlabel=FAMILIES[title].size, ylabel="KB")
        panel.legend(fontsize=7)
    return _saved(figure, folder / "memory.png")


def _panels(number: int) -> tuple[Figure, list[Any]]:
    figure = Figure(figsize=(4.5 * number, 4.2), layout="constrained")
    return figure, [figure.add_subplot(1, number, place + 1) for place in range(number)]


def _saved(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=100)
    return path
