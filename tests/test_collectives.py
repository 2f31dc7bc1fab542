"""A rule adds no collective: the compiled gradient of sharded arrays has those of the same rule written by hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from helpers import is_coming
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

pytest.importorskip("rich")
FRAMEWORKS = ["plain JAX", "Linen", "NNX", "Haiku", "Equinox"]
WRITES_STATE = ["Linen", "NNX", "Haiku"]  # in the others the state is an output like any other


@pytest.fixture
def collectives(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The counts, which are not installed."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1])
    from benchmarks import cases
    from benchmarks import collectives as counts

    assert [*cases.FRAMEWORKS] == FRAMEWORKS
    return counts


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("layer", ["dense", "block"])
@pytest.mark.parametrize("placement", ["data", "tensor"])
@pytest.mark.parametrize("variant", ["rule", "custom_vjp"])
def test_a_rule_has_the_collectives_that_it_has_by_hand(collectives, framework, layer, placement, variant):
    ours, by_hand = (collectives.collectives(framework, layer, each, placement) for each in (variant, "by hand"))
    if is_coming() and (placement, layer) == ("data", "block") and framework in WRITES_STATE:
        # There ours uses no symbolic zeros, so the derivative of the written state is always computed: of the mean
        # and of the variance over the batch.
        by_hand = {**by_hand, "all-reduce": by_hand["all-reduce"] + 2}
    assert ours == by_hand
    assert by_hand.get("all-reduce") or placement == "tensor"  # the gradient of the parameters, over the batch


def test_each_kind_is_counted(collectives):
    mesh = jax.make_mesh((8,), ("devices",), axis_types=(AxisType.Auto,))
    rows, whole = NamedSharding(mesh, P("devices")), NamedSharding(mesh, P())
    x = jax.device_put(jnp.ones((8, 8)), rows)
    counted = lambda run, out: collectives.count(jax.jit(run, out_shardings=out).lower(x).compile().as_text())
    assert counted(lambda x: x.sum(0), whole) == {"all-reduce": 1}
    assert counted(lambda x: 2 * x, whole) == {"all-gather": 1}
    assert counted(lambda x: x + 1, NamedSharding(mesh, P(None, "devices"))) == {"all-to-all": 1}
    assert counted(lambda x: x + 1, rows) == {}


def test_a_program_that_gathers_what_it_need_not_is_seen(collectives, monkeypatch):
    build = collectives.build

    def gathering(framework: str, layer: Any, variant: Any) -> Any:
        case = build(framework, layer, variant)
        if variant != "rule":
            return case
        mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
        everywhere = lambda y: jax.lax.with_sharding_constraint(y, NamedSharding(mesh, P()))
        return dataclasses.replace(
            case, apply=lambda params, rest, x: (everywhere(case.apply(params, rest, x)[0]), rest)
        )

    monkeypatch.setattr(collectives, "build", gathering)
    collectives.collectives.cache_clear()
    ours, by_hand = (collectives.collectives("plain JAX", "dense", each, "data") for each in ("rule", "by hand"))
    collectives.collectives.cache_clear()
    assert ours != by_hand
