"""Whether the frameworks agree, and if not, which one does not and by how much."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from crossvjp.tour.network import Layers
from crossvjp.tour.train import Run

TOLERANCE = 1e-4
LEAST_ACCURACY = 0.95


class Difference(NamedTuple):
    """The largest difference between two networks, and the array that has it."""

    value: float
    where: str


def largest_difference(ours: Layers, theirs: Layers) -> Difference:
    """Compares arrays of the common layout; a NaN counts as larger than any number."""
    found = jax.tree.map(lambda a, b: float(np.max(np.abs(a - b))), ours, theirs)
    each = [Difference(value, f"{layer}/{name}") for layer, values in found.items() for name, value in values.items()]
    return max(each, key=lambda difference: (np.isnan(difference.value), difference.value))


def faults(reference: Run, others: Sequence[Run], baseline: Run) -> list[str]:
    """Lists what is wrong, one sentence a fault.

    Args:
        reference: the run in plain JAX, under the rule.
        others: the runs in the other frameworks, under the rule.
        baseline: the run in plain JAX with plain gradients. It has to differ, since otherwise a
            framework that leaves the rule out would not be noticed.

    Returns:
        An empty list where every framework agrees with the reference and learned the digits.
    """
    found = []
    for run in others:
        for kind, ours, theirs in (
            ("parameter", run.final.params, reference.final.params),
            ("running statistic", run.final.statistics, reference.final.statistics),
        ):
            value, where = largest_difference(ours, theirs)
            if not value <= TOLERANCE:  # so that a NaN is a fault
                found.append(
                    f"{run.label} disagrees with {reference.label}: the {kind} {where} differs by up to {value:.1e} "
                    f"after {len(run.losses)} steps; at most {TOLERANCE:.0e} is agreement."
                )
    found += [
        f"{run.label} has a test accuracy of {run.accuracy:.1%}; at least {LEAST_ACCURACY:.0%} is expected."
        for run in (reference, *others)
        if not run.accuracy >= LEAST_ACCURACY
    ]
    value, _ = largest_difference(baseline.final.params, reference.final.params)
    if not value > TOLERANCE:
        found.append(
            f"Training without the rule differs from training under it by {value:.1e} only, so this run can't tell "
            "whether a framework applies the rule."
        )
    return found
