"""How tracing grows with the number of wrapped calls: its time, and the function calls that it makes."""

from __future__ import annotations

import cProfile
import functools
import math
import statistics
from collections.abc import Callable, Mapping

import jax
from rich.table import Table

from benchmarks.cases import FRAMEWORKS, TITLES, Case, Layer, Variant, build, variants
from benchmarks.timing import Samples, interleaved, settled, shown, tracing

FEW, FROM = 8, 16  # the fit starts at FROM
MARKED = 48
COUNTED = (FROM, MARKED, 256)  # function calls
ROUNDS: dict[Layer, dict[int, int]] = {  # of each number of wrapped calls
    "dense": {FEW: 5, FROM: 5, MARKED: 21, 128: 3, 256: 3},
    "transformer": {FEW: 2, FROM: 2, MARKED: 3},
    "residual": {FEW: 2, FROM: 2, MARKED: 3},
}
_CAPTION = (
    "make_jaxpr of the gradient: medians of CPU time of the thread in milliseconds, on empty caches, ± half the\n"
    "distance between the quartiles, and the ratio to the plain model (median of the ratios within each round).\n"
    f"exponent: e in the fit c * calls^e from {FROM} calls on, of the time, and of the function calls of Python and\n"
    "its builtins, which are the same on every run."
)


def exponent(values: Mapping[int, float]) -> float:
    """Fits `values[n] = c * n**e` by least squares of the logarithms, and gives e."""
    x, y = [math.log(n) for n in values], [math.log(value) for value in values.values()]
    return statistics.linear_regression(x, y).slope


def fitted(samples: Mapping[int, Samples], variant: Variant) -> float:
    """Gives the exponent of the medians, of as many calls as the fit is made from."""
    return exponent({depth: statistics.median(found[variant]) for depth, found in samples.items() if depth >= FROM})


def traces(framework: str, layer: Layer) -> dict[int, Samples]:
    """Times traces of all variants, by the number of wrapped calls, the variants taking turns."""
    cases: dict[int, dict[Variant, Case]] = {  # made before tracing empties the caches
        depth: {variant: build(framework, layer, variant, depth) for variant in variants(framework)}
        for depth in ROUNDS[layer]
    }
    found = {}
    for depth, rounds in ROUNDS[layer].items():
        runs: dict[Variant, Callable[[], float]] = {
            variant: functools.partial(tracing, case.gradient, *case.arguments)
            for variant, case in cases[depth].items()
        }
        with settled():
            found[depth] = interleaved(runs, rounds, warm=depth <= FROM)  # later ones meet nothing new
    return found


def function_calls(framework: str, layer: Layer, variant: Variant, depth: int) -> int:
    """Counts the function calls that tracing the gradient makes."""
    case = build(framework, layer, variant, depth)
    if depth <= FROM:
        tracing(case.gradient, *case.arguments)  # the first trace imports modules, too
    arguments = case.arguments
    jax.clear_caches()
    profile = cProfile.Profile()
    profile.runcall(lambda: jax.make_jaxpr(case.gradient)(*arguments))
    return sum(entry.callcount for entry in profile.getstats())


def counts(framework: str, layer: Layer) -> dict[int, dict[Variant, int]]:
    """Counts function calls of all variants, by the number of wrapped calls."""
    return {
        depth: {variant: function_calls(framework, layer, variant, depth) for variant in variants(framework)}
        for depth in COUNTED
    }


def table(
    layer: Layer,
    found: Mapping[str, Mapping[int, Samples]],
    counted: Mapping[str, Mapping[int, Mapping[Variant, int]]] | None = None,
) -> Table:
    """Shows times, ratios and exponents of all frameworks; of function calls, if they are counted."""
    made = Table(title=f"Growth of tracing: {TITLES[layer]}", caption=_CAPTION)
    for title in ("framework", "variant"):
        made.add_column(title, no_wrap=True)
    for depth in ROUNDS[layer]:
        made.add_column(f"{depth} calls", justify="right", no_wrap=True)
    titles = ("exponent\ntime", *((f"function calls\n{MARKED} calls", "exponent\nfunction calls") if counted else ()))
    for title in titles:
        made.add_column(title, justify="right", no_wrap=True)
    for framework in FRAMEWORKS:
        samples = found[framework]
        for variant in variants(framework):
            cells = [*(shown(each, variant, "plain") for each in samples.values()), f"{fitted(samples, variant):.2f}"]
            if counted:
                calls = {depth: each[variant] for depth, each in counted[framework].items()}
                ratio = calls[MARKED] / counted[framework][MARKED]["plain"]
                cells += [f"{calls[MARKED] / 1e3:.0f} k {ratio:5.2f}", f"{exponent(calls):.2f}"]
            made.add_row(framework, variant, *cells)
        made.add_section()
    return made
