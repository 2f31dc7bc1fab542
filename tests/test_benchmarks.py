"""The claim that a rule costs nothing when compiled, and that the benchmark which shows it can tell a difference."""

from __future__ import annotations

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


@each_framework
@pytest.mark.parametrize("layer", ["dense", "block"])
@pytest.mark.parametrize("program", ["grad", "value_and_grad", "scan"])
@pytest.mark.parametrize("variant", ["rule", "custom_vjp"])
def test_a_compiled_rule_costs_what_it_costs_by_hand(
    benchmarks: Any, framework: str, layer: str, program: str, variant: str
) -> None:
    """Flops, bytes accessed, and the bytes of temporaries, arguments and outputs are the same, exactly."""
    ours, by_hand = (benchmarks.cost(framework, layer, each, program) for each in (variant, "by hand"))
    if COMING and layer == "block" and framework in WRITES_STATE:
        assert by_hand.flops < ours.flops < 2 * by_hand.flops
        return
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
