"""The claim that a rule costs nothing when compiled, and that the benchmark which shows it can tell a difference."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from helpers import is_coming

pytest.importorskip("rich")
FRAMEWORKS = ["plain JAX", "Linen", "NNX", "Haiku", "Equinox"]
WRITES_STATE = ["Linen", "NNX", "Haiku"]  # in the others the state is an output like any other
# With JAX's coming custom_vjp ours uses no symbolic zeros, so the derivative of the written state is always computed.
COMING = is_coming()
each_framework = pytest.mark.parametrize("framework", FRAMEWORKS)


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmarks, which are not installed."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1])
    from benchmarks import cases, compiled

    assert [*cases.FRAMEWORKS] == FRAMEWORKS
    return compiled


@pytest.fixture
def verdicts(benchmarks: Any) -> Any:
    """What is promised."""
    from benchmarks import verdicts

    return verdicts


PROGRAMS = [
    *((layer, program) for layer in ("dense", "block") for program in ("grad", "value_and_grad", "scan")),
    *((layer, program) for layer in ("transformer", "residual") for program in ("grad", "value_and_grad")),
]


@each_framework
@pytest.mark.parametrize(("layer", "program"), PROGRAMS)
@pytest.mark.parametrize("variant", ["rule", "custom_vjp"])
def test_a_compiled_rule_costs_what_it_costs_by_hand(
    benchmarks: Any, framework: str, layer: str, program: str, variant: str
) -> None:
    """Flops, bytes accessed, and the bytes of temporaries, arguments and outputs are the same, exactly."""
    ours, by_hand = (benchmarks.cost(framework, layer, each, program) for each in (variant, "by hand"))
    if COMING and layer in ("block", "residual") and framework in WRITES_STATE:
        assert by_hand.flops < ours.flops < 2 * by_hand.flops
        return
    assert ours == by_hand


@each_framework
@pytest.mark.parametrize("variant", ["rule", "custom_vjp"])
def test_compiled_calls_that_repeat_cost_what_they_cost_by_hand(benchmarks: Any, framework: str, variant: str) -> None:
    """From the second on, equal calls share a program, and that costs the same."""
    ours, by_hand = (benchmarks.cost(framework, "dense", each, "grad", 4) for each in (variant, "by hand"))
    assert ours == by_hand


@each_framework
@pytest.mark.parametrize("variant", ["rule", "custom_vjp"])
def test_the_rule_by_hand_is_the_same_rule(benchmarks: Any, framework: str, variant: str) -> None:
    """The gradients of two stacked layers agree in every bit, and are signs."""
    ours, by_hand = (benchmarks.build(framework, "dense", each, 2) for each in (variant, "by hand"))
    params, rest, x = ours.arguments
    same_params = jax.tree.unflatten(jax.tree.structure(by_hand.params), jax.tree.leaves(params))
    bars = jax.tree.leaves(jax.grad(ours.loss, has_aux=True)(params, rest, x)[0])
    bars_by_hand = jax.tree.leaves(jax.grad(by_hand.loss, has_aux=True)(same_params, by_hand.rest, x)[0])
    assert len(bars) == len(bars_by_hand) == 4
    assert all(jnp.array_equal(one, other) for one, other in zip(bars, bars_by_hand, strict=True))
    assert all(jnp.array_equal(one, jnp.sign(one)) for one in bars)


@each_framework
@pytest.mark.parametrize("layer", ["dense", "block"])
def test_the_benchmark_sees_what_the_rule_adds(benchmarks: Any, framework: str, layer: str) -> None:
    """One sign of each parameter is a flop each: the model without a rule has fewer, by about that number."""
    case = benchmarks.build(framework, layer, "plain")
    count = sum(leaf.size for leaf in jax.tree.leaves(case.params))
    plain, by_hand = (benchmarks.cost(framework, layer, variant, "grad") for variant in ("plain", "by hand"))
    assert 0.5 * count <= by_hand.flops - plain.flops <= 2 * count


@pytest.mark.parametrize("measure", ["flops", "accessed", "temporary", "arguments", "outputs"])
@pytest.mark.parametrize("factor", [0.5, 1.001])
def test_a_program_that_costs_something_else_is_seen(
    benchmarks: Any, verdicts: Any, monkeypatch: pytest.MonkeyPatch, measure: str, factor: float
) -> None:
    right = benchmarks.Cost(1e6, 1e6, 1000, 1000, 1000)
    wrong = dataclasses.replace(right, **{measure: factor * getattr(right, measure)})
    monkeypatch.setattr(benchmarks, "cost", lambda *_: right)
    assert benchmarks.farthest("NNX", "dense") == 1
    monkeypatch.setattr(benchmarks, "cost", lambda _, __, variant, ___: wrong if variant == "rule" else right)
    assert benchmarks.farthest("NNX", "dense") == factor
    (verdict,) = verdicts.compiled("NNX", "dense", factor)
    assert not verdict.passed


def samples(**medians: float) -> Any:
    """Three turns, of which the last one was slow for all; `by_hand` is 1."""
    named = {"plain": 1.0, "by hand": 1.0, "own": 2.0, "rule": 1.0, "custom_vjp": 1.0, **medians}
    return {variant: [median, median, 5 * median] for variant, median in named.items()}


def linear(rule: float = 1.0) -> Any:
    """What grows linearly, but for the rule."""
    return {depth: samples(rule=depth**rule, custom_vjp=depth) for depth in (8, 16, 48, 128, 256)}


def counted(rule: float = 1.0) -> Any:
    """The same, of numbers."""
    return {depth: {"rule": depth**rule, "custom_vjp": depth} for depth in (16, 48, 128, 256)}


def kept(residuals: int, temporary: int) -> dict[str, dict[int, Any]]:
    """What a rule keeps where the plain function keeps 100."""
    from benchmarks.memory import Kept

    return {"plain": {1: Kept(1, 1), 4: Kept(100, 100)}, "rule": {1: Kept(9, 9), 4: Kept(residuals, temporary)}}


VERDICTS = {  # one call that falls short nowhere; calls that fall short, and in how many of the verdicts
    "compiled": (lambda v: v.compiled("Linen", "block", 1.0), [(lambda v: v.compiled("Linen", "block", 1.0001), 1)]),
    "collectives": (lambda v: v.collectives("Linen", 0), [(lambda v: v.collectives("Linen", 1), 1)]),
    "tracing": (
        lambda v: v.tracing("Linen", "dense", samples(rule=1.3, custom_vjp=1.3)),
        [
            (lambda v: v.tracing("Linen", "dense", samples(rule=1.31)), 1),
            (lambda v: v.tracing("Linen", "dense", samples(own=1.4)), 2),
            (lambda v: v.tracing("Linen", "residual", samples(own=1.4, custom_vjp=1.31)), 1),
        ],
    ),
    "growth": (
        lambda v: v.growth("NNX", linear(), counted()),
        [
            (lambda v: v.growth("NNX", linear(1.11), counted()), 1),
            (lambda v: v.growth("NNX", linear(), counted(2)), 1),
        ],
    ),
    "eager": (
        lambda v: v.eager("NNX", samples(rule=1.5, custom_vjp=0.5)),
        [
            (lambda v: v.eager("NNX", samples(rule=1.51)), 1),
            (lambda v: v.eager("NNX", samples(own=0.99)), 2),
        ],
    ),
    "attached": (
        lambda v: v.attached(samples(rule=1.6), {"plain": 1e9, "rule": 1e9}),
        [
            (lambda v: v.attached(samples(rule=1.61), {"plain": 1e9, "rule": 1e9}), 1),
            (lambda v: v.attached(samples(), {"plain": 1e9, "rule": 1e9 + 1}), 1),
            (lambda v: v.attached(samples(), {"plain": 1e9, "rule": 1e9 - 1}), 1),
        ],
    ),
    "imports": (lambda v: v.imports([0.04, 0.05, 0.3]), [(lambda v: v.imports([0.04, 0.051, 0.3]), 1)]),
    "memory": (
        lambda v: v.memory("a scan", kept(100, 3)),
        [(lambda v: v.memory("a scan", kept(101, 3)), 1), (lambda v: v.memory("a scan", kept(1, 101)), 1)],
    ),
}


@pytest.mark.parametrize(("right", "wrong"), VERDICTS.values(), ids=VERDICTS)
def test_each_verdict_falls_short_of_a_wrong_number(verdicts: Any, right: Any, wrong: Any) -> None:
    assert all(each.passed for each in right(verdicts))
    for make, number in wrong:
        short = [each for each in make(verdicts) if not each.passed]
        assert len(short) == number
        assert all(str(each).endswith("fall short") for each in short)


def test_no_verdict_lacks_a_wrong_number(verdicts: Any) -> None:
    functions = {
        name for name, value in vars(verdicts).items() if getattr(value, "__module__", "") == verdicts.__name__
    }
    assert functions - {"Verdict", "table"} == {*VERDICTS}


def test_verdicts_are_shown_with_what_is_allowed(verdicts: Any) -> None:
    made = verdicts.table([verdicts.Verdict("quick", 2.0, 1.0), verdicts.Verdict("equal", 1.0, 1.0, exact=True)])
    shown = [[*column.cells] for column in made.columns]
    assert shown == [["quick", "equal"], ["2.00", "1.0000"], ["≤ 1", "= 1"], ["[bold red]fall short", "[green]pass"]]


def test_ratios_are_taken_within_a_turn(benchmarks: Any) -> None:
    from benchmarks import timing

    turns = iter(range(100))
    runs: Any = {"plain": lambda: float(next(turns)), "rule": lambda: float(next(turns))}
    assert timing.interleaved(runs, 2) == {"plain": [2.0, 4.0], "rule": [3.0, 5.0]}
    slow: Any = {"plain": [1.0, 10.0, 2.0], "rule": [2.0, 20.0, 4.0]}
    assert timing.ratio(slow, "rule", "plain") == 2
    assert timing.spread([1.0, 2.0, 3.0]) == 0.25
    assert timing.spread([3.0]) == 0


@pytest.mark.parametrize("degree", [0, 1, 2.5])
def test_the_exponent_of_a_power_is_found(benchmarks: Any, degree: float) -> None:
    from benchmarks.growth import exponent

    assert exponent({n: 3.0 * n**degree for n in (16, 48, 256)}) == pytest.approx(degree)


def test_what_is_kept_are_neither_arguments_nor_the_same_array_twice(benchmarks: Any) -> None:
    from benchmarks.memory import kept

    x = jax.ShapeDtypeStruct((8, 4), jnp.float32)
    assert kept(lambda x: x * x, (x,)).residuals == 0
    assert kept(lambda x: jnp.sin(x) ** 2, (x,)).residuals == 2 * 8 * 4 * 4  # its cosine, and its sine


def test_pictures_are_drawn(benchmarks: Any, tmp_path: Path) -> None:
    from benchmarks import memory, plots, stages

    measured = {title: {"plain": {n: memory.Kept(4 * n, 4 * n) for n in (1, 2)}} for title in memory.FAMILIES}
    staged = {framework: {stage: samples() for stage in stages.STAGES} for framework in FRAMEWORKS}
    paths = [
        plots.growth(tmp_path, "dense", {framework: linear() for framework in FRAMEWORKS}),
        plots.stages(tmp_path, "dense", staged),
        plots.memory(tmp_path, measured),
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    assert stages.table("dense", staged).row_count == 23
