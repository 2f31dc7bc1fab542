"""The plot: training losses laid over each other, and how far each framework is from plain JAX."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from crossvjp.tour.train import Run
from crossvjp.tour.verdict import TOLERANCE, largest_difference

# Okabe and Ito's colours, which are told apart with any colour vision; a marker for each besides.
_STYLES = (("#0072B2", "o"), ("#E69F00", "s"), ("#009E73", "^"), ("#CC79A7", "D"))
_REFERENCE, _BASELINE, _LIMIT = "#BBBBBB", "#000000", "#D55E00"

# A logarithmic axis has no zero; runs that are equal bit for bit are drawn here.
_FLOOR = 1e-17


def save(path: Path, rule: str, reference: Run, others: Sequence[Run], baseline: Run) -> None:
    """Writes the plot as a PNG file."""
    figure = Figure(figsize=(12, 5.2), layout="constrained")  # without pyplot: no global state, no display
    figure.suptitle(f"One rule object, `{rule}`, on every layer of the same network, trained on handwritten digits")
    left, right = figure.subplots(1, 2)
    _draw_losses(left, reference, others, baseline)
    _draw_differences(right, reference, others, baseline)
    for axes in (left, right):
        axes.set_xlabel("training step")
        axes.set_xlim(0, len(reference.losses))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def _draw_losses(axes: Any, reference: Run, others: Sequence[Run], baseline: Run) -> None:
    """Draws the reference broad and pale, and the others on it as dashes and markers, each with gaps for the rest."""
    width = max(1, len(reference.losses) // 20)
    steps = np.arange(1, len(reference.losses) + 1)
    curves = [_smoothed(run.losses, width) for run in (reference, *others)]
    axes.plot(steps, _smoothed(baseline.losses, width), "-", color=_BASELINE, lw=1.2, label=_label(baseline))
    axes.plot(steps, curves[0], color=_REFERENCE, lw=7, solid_capstyle="round", label=_label(reference))
    gap = max(1, len(steps) // 32)
    for index, (run, curve) in enumerate(zip(others, curves[1:], strict=True)):
        every = (index * gap, gap * len(others))
        axes.plot(steps, curve, lw=1.6, markevery=every, label=_label(run), **_look(index, len(others)))
    axes.set_yscale("log")
    axes.set_ylabel(f"training loss, mean of up to {width} steps" if width > 1 else "training loss")
    axes.set_title("Training under the rule in every framework, and without it", fontsize=11)
    axes.legend(title="test accuracy in brackets", frameon=False, fontsize=9, title_fontsize=9, handlelength=4)


def _draw_differences(axes: Any, reference: Run, others: Sequence[Run], baseline: Run) -> None:
    """Draws the largest parameter difference from the reference at each snapshot."""
    axes.plot(*_differences(baseline, reference), color=_BASELINE, lw=1.2, label=baseline.label)
    axes.axhline(TOLERANCE, color=_LIMIT, lw=1.5)
    axes.annotate("limit of agreement", (0.99, TOLERANCE), (0, 4), xycoords=axes.get_yaxis_transform(),
                  textcoords="offset points", ha="right", color=_LIMIT, fontsize=9)  # fmt: skip
    for index, run in enumerate(others):
        look = _look(index, len(others)) | {"linestyle": "-"}
        axes.plot(*_differences(run, reference), lw=1, markevery=(index, len(others)), label=run.label, **look)
    axes.set_yscale("log")
    axes.set_ylim(bottom=_FLOOR / 3)
    axes.set_ylabel("largest difference of any parameter")
    axes.set_title(f"Distance from plain JAX in float64 (zero is drawn at {_FLOOR:.0e})", fontsize=11)
    axes.legend(frameon=False, fontsize=9, loc="center right")


def _look(index: int, count: int) -> dict[str, Any]:
    """Gives a curve dashes that leave room for those of `count - 1` others on the same line."""
    color, marker = _STYLES[index]
    dash = 4
    pattern = (-index * dash, (dash, dash * (count - 1))) if count > 1 else "-"
    return {"color": color, "linestyle": pattern, "marker": marker, "ms": 6, "mec": "white", "mew": 0.6}


def _differences(run: Run, reference: Run) -> tuple[list[int], list[float]]:
    values = [
        largest_difference(run.snapshots[at].params, reference.snapshots[at].params).value for at in run.snapshots
    ]
    return list(run.snapshots), [max(value, _FLOOR) for value in values]


def _smoothed(losses: Float[np.ndarray, " steps"], width: int) -> Float[np.ndarray, " steps"]:
    """Averages each loss with up to `width - 1` before it."""
    sums = np.concatenate([[0.0], np.cumsum(losses)])
    ends = np.arange(1, len(losses) + 1)
    starts = np.maximum(ends - width, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def _label(run: Run) -> str:
    return f"{run.label} ({run.accuracy:.1%})"
