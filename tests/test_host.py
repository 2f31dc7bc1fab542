"""A model of each framework in a host of each: 20 pairs, in one table of tests."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hosting import GUESTS, HOSTS, Flat, GuestCase, HostCase, an_input

from crossvjp import rules
from crossvjp.testing import assert_same_bits

PAIRS = [(guest, host) for guest in GUESTS for host in HOSTS]
pairs = pytest.mark.parametrize(("guest", "host"), PAIRS, ids=lambda name: name)
KEY = jax.random.key(3)
SIGN = rules.SignGradient()
QUICK = {"xla_backend_optimization_level": 0}  # what is compared is the program, and not how well it is compiled


@functools.cache
def guest_of(guest: str, how: str = "plain") -> GuestCase:
    """Makes a guest, with a rule inside or around it."""
    options: dict[str, Any] = {"plain": {}, "inside": {"inside": SIGN}, "around": {"around": SIGN}}[how]
    return GUESTS[guest](**options)


@functools.cache
def host_of(guest: str, host: str, how: str = "plain") -> HostCase:
    """Makes a host."""
    if how == "outside":
        return HOSTS[host](guest_of(guest).model, SIGN)
    return HOSTS[host](guest_of(guest, how).model)


def differentiated(run: Any, params: Flat, state: Any, key: Any) -> tuple[Any, Any, Flat, Any]:
    """Gives output, state and gradients, with respect to the parameters by path and to the input."""
    names = list(params)

    def loss(values, x):
        y, after = run(dict(zip(names, values, strict=True)), state, key, x)
        return jnp.sum(jnp.sin(y)), (y, after)

    (_, (y, after)), (bars, x_bar) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(
        list(params.values()), an_input()
    )
    return y, after, dict(zip(names, bars, strict=True)), x_bar


@functools.cache
def hosted(guest: str, host: str, how: str = "plain") -> tuple[Any, Any, Flat, Any]:
    case = host_of(guest, host, how)
    return differentiated(case.run, case.params, case.state, KEY)


@functools.cache
def alone(guest: str, host: str, how: str = "plain") -> tuple[Any, Any, Flat, Any]:
    case = guest_of(guest, how)
    return differentiated(case.alone, case.params, case.state, host_of(guest, host).key(KEY))


@functools.cache
def alone_compiled(guest: str) -> Any:
    return jax.jit(guest_of(guest).alone, compiler_options=QUICK)


@pairs
def test_the_guests_variables_stand_in_the_host_at_their_own_paths_with_their_own_values(guest, host):
    ours, theirs = guest_of(guest), host_of(guest, host)
    assert_same_bits(theirs.params, ours.params)
    assert_same_bits(theirs.state, ours.state)


@pairs
def test_the_output_is_that_of_the_guest_alone(guest, host):
    y = hosted(guest, host)[0]
    assert_same_bits(y, alone(guest, host)[0])
    assert 0 < np.count_nonzero(y) < y.size  # a dropout mask was drawn


@pairs
def test_the_state_after_a_call_is_that_of_the_guest_alone(guest, host):
    after = hosted(guest, host)[1]
    assert_same_bits(after, alone(guest, host)[1])
    before = jax.tree.leaves(guest_of(guest).state)
    assert not all(np.array_equal(new, old) for new, old in zip(jax.tree.leaves(after), before, strict=True))


@pairs
def test_the_gradients_are_those_of_the_guest_alone(guest, host):
    assert_same_bits(hosted(guest, host)[2:], alone(guest, host)[2:])
    assert all(np.any(bar != 0) for bar in hosted(guest, host)[2].values() if bar.ndim == 2)


@pairs
def test_another_key_of_the_host_draws_another_mask_and_the_same_key_the_same(guest, host):
    case = host_of(guest, host)
    run = lambda key: case.run(case.params, case.state, key, an_input())[0]
    assert_same_bits(run(KEY), hosted(guest, host)[0])
    assert np.any((run(jax.random.key(4)) == 0) != (run(KEY) == 0))


@pairs
def test_jit_gives_what_jit_of_the_guest_alone_gives_with_the_mask_of_the_loss(guest, host):
    case, ours = host_of(guest, host), guest_of(guest)
    y, after = jax.jit(case.run, compiler_options=QUICK)(case.params, case.state, KEY, an_input())
    assert_same_bits((y, after), alone_compiled(guest)(ours.params, ours.state, case.key(KEY), an_input()))
    assert_same_bits(y == 0, hosted(guest, host)[0] == 0)


@pairs
@pytest.mark.parametrize("how", ["inside", "around"])
def test_a_rule_inside_or_around_the_guest_runs_in_the_host(guest, host, how):
    assert_same_bits(hosted(guest, host, how), alone(guest, host, how))
    assert any(np.any(hosted(guest, host, how)[2][path] != bar) for path, bar in hosted(guest, host)[2].items())


@pairs
def test_a_rule_around_the_host_sees_the_guests_gradients(guest, host):
    y, after, bars, x_bar = hosted(guest, host)
    signed = {path: jnp.sign(bar) for path, bar in bars.items()}
    assert_same_bits(hosted(guest, host, "outside"), (y, after, signed, x_bar))
