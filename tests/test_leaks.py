"""Nothing of a trace outlives it: the functions that JAX keeps for late runs hold no tracer."""

from __future__ import annotations

import gc
from typing import Any

import jax
import pytest
from hosts import HOSTS, Host, the_input
from rules import WRAPS, by_custom_vjp

from crossvjp.testing import checking_leaks


@pytest.fixture(params=sorted(HOSTS))
def host(request: pytest.FixtureRequest) -> Host:
    """Each kind of handle in turn."""
    return HOSTS[request.param]


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("outer", ["jit", "jit_grad", "grad_jit"])
def test_no_tracer_leaks(host, wrap, outer):
    def call(params: Any, x: Any) -> Any:
        return host.run(params, lambda mdl, x: WRAPS[wrap](mdl)(x), x)

    def loss(params: Any, x: Any) -> Any:
        return call(params, x).sum()

    with checking_leaks():
        run = {
            "jit": lambda: jax.jit(call),  # a sum of it is a false alarm of JAX's: see test_coming_custom_vjp.py
            "jit_grad": lambda: jax.jit(jax.grad(loss)),
            "grad_jit": lambda: jax.grad(jax.jit(loss)),
        }[outer]()
        run(host.params, the_input())


def test_the_checker_catches_a_rule_that_keeps_a_tracer():
    kept = []
    keep = by_custom_vjp(jax.tree_util.Partial(lambda w, x: kept.append(w) or w * x, the_input()))
    with checking_leaks(), pytest.raises(Exception, match="Leaked"):
        jax.jit(keep)(the_input())


def test_objects_that_somebody_froze_stay_frozen():
    gc.freeze()
    try:
        count = gc.get_freeze_count()
        with checking_leaks():
            assert gc.get_freeze_count() == count
        assert gc.get_freeze_count() == count
    finally:
        gc.unfreeze()
    with checking_leaks():
        assert gc.get_freeze_count()
    assert not gc.get_freeze_count()
