"""Whether a call is part of a trace, and that one that is not runs as it is."""

from __future__ import annotations

import threading
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from helpers import is_coming
from hosts import HOSTS, the_input

import crossvjp as cv
from crossvjp import _traces
from crossvjp._traces import at_once

TRANSFORMS: dict[str, Any] = {
    "jit": jax.jit,
    "grad": lambda f: jax.grad(lambda x: f(x).sum()),
    "vmap": jax.vmap,
    "jvp": lambda f: lambda x: jax.jvp(f, (x,), (x,)),
    "linearize": lambda f: lambda x: jax.linearize(f, x)[0],
    "vjp": lambda f: lambda x: jax.vjp(f, x)[0],
    "eval_shape": lambda f: lambda x: jax.eval_shape(f, x),
    "make_jaxpr": jax.make_jaxpr,
    "remat": jax.checkpoint,
    "scan": lambda f: lambda x: jax.lax.map(f, x),
    "cond": lambda f: lambda x: jax.lax.cond(True, f, f, x),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_a_transform_is_a_trace(transform):
    seen = []

    def look(x):
        seen.append(at_once())
        return 2 * x

    transform(look)(jnp.ones(3))
    assert seen
    assert not any(seen)
    look(jnp.ones(3))
    assert seen[-1]


def test_the_first_question_may_come_from_inside_of_a_trace():
    seen = []

    def look(x):
        _traces._outside.cache_clear()
        seen.append(at_once())
        return x

    jax.jit(look)(1.0)
    assert [*seen, at_once()] == [False, True]


def test_another_thread_is_not_in_the_trace():
    seen = []

    def look(x):
        thread = threading.Thread(target=lambda: seen.append(at_once()))
        thread.start()
        thread.join()
        return x

    jax.jit(look)(1.0)
    assert seen == [True]


@pytest.mark.skipif(is_coming(), reason="there JAX compiles the call, as the README says")
@pytest.mark.parametrize("name", [name for name in HOSTS if name != "haiku function"])  # traced to find its modules
def test_a_call_that_nothing_differentiates_runs_as_it_is(name, monkeypatch):
    """Once, and without a custom_vjp, which would cost more than the call; Python may look at values."""
    host, runs = HOSTS[name], []

    def looks(mdl, x):
        runs.append(float(x[0]))
        return mdl(x) if x[0] > 0 else -mdl(x)

    identity = cv.rule(lambda call, y_bar: call.pullback(y_bar))
    plain = host.run(host.params, looks, the_input())
    runs.clear()
    with monkeypatch.context() as patched:
        patched.setattr(jax, "custom_vjp", None)
        y = host.run(host.params, identity.lift(looks), the_input())
        with pytest.raises(TypeError):
            jax.grad(lambda x: host.run(host.params, identity.lift(looks), x).sum())(the_input())
    assert (y == plain).all()
    assert runs[0] == 1.0
