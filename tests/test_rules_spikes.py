"""Surrogate gradients against the derivatives of the smooth functions that they are named after."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

import crossvjp as cv
from crossvjp.rules import ArcTan, SigmoidDerivative, SuperSpike, Triangle
from crossvjp.testing import assert_close, assert_same_bits

U = jnp.linspace(-2.1, 2.0, 30)  # without 0, where some are not smooth


def spike(u):
    return (u > 0).astype(u.dtype)


def parabolas(u, gamma, width):
    """Rises from 0 to gamma * width in two parabolas that meet at 0."""
    v = jnp.clip(u / width, -1, 1)
    return gamma * width * jnp.where(v < 0, (1 + v) ** 2 / 2, 1 - (1 - v) ** 2 / 2)


CASES = [
    (SuperSpike(5.0), lambda u: u / (1 + 5 * jnp.abs(u))),
    (SigmoidDerivative(4.0), lambda u: jax.nn.sigmoid(4 * u)),
    (ArcTan(3.0), lambda u: jnp.arctan(jnp.pi / 2 * 3 * u) / jnp.pi),
    (Triangle(0.3, width=0.7), lambda u: parabolas(u, 0.3, 0.7)),
]


@pytest.mark.parametrize(("rule", "smooth"), CASES, ids=lambda case: getattr(case, "__name__", repr(case)))
def test_a_spike_has_the_slope_of_a_smooth_function(rule, smooth):
    y, pullback = jax.vjp(rule(spike), U)
    assert_same_bits(y, spike(U))
    assert_close(pullback(jnp.cos(U)), jax.vjp(smooth, U)[1](jnp.cos(U)))


def test_a_neuron_that_draws_has_the_derivative_of_its_mean():
    draw = lambda u: jax.random.bernoulli(jax.random.key(0), jax.nn.sigmoid(4 * u)).astype(u.dtype)
    y, pullback = jax.vjp(SigmoidDerivative(4.0)(draw), U)
    assert 0 < float(y.mean()) < 1
    assert_close(pullback(jnp.cos(U)), jax.vjp(lambda u: jax.nn.sigmoid(4 * u), U)[1](jnp.cos(U)))


@jax.custom_jvp
def by_hand(u):
    return spike(u)


by_hand.defjvp(lambda primals, tangents: (spike(primals[0]), tangents[0] / (10 * jnp.abs(primals[0]) + 1) ** 2))


def run(params, currents, step):
    """Runs a leaky neuron that is reset by its spikes; gives its spikes."""

    def tick(voltage, current):
        voltage = 0.9 * voltage + params["gain"] * current
        spikes = step(voltage - params["threshold"])
        return voltage * (1 - spikes), spikes

    return jax.lax.scan(tick, jnp.zeros(8), currents)[1]


def test_a_network_in_time_has_the_gradient_of_a_step_with_a_derivative_by_hand():
    params = {"gain": jnp.linspace(0.3, 1.2, 8), "threshold": jnp.array(1.0)}
    currents = jax.random.uniform(jax.random.key(0), (40, 8))
    weights = jnp.cos(jnp.arange(320.0)).reshape(40, 8)
    found, expected = (
        jax.jit(jax.value_and_grad(lambda p, step=step: jnp.sum(weights * run(p, currents, step))))(params)
        for step in (SuperSpike(10.0)(spike), by_hand)
    )
    assert 0.1 < float(run(params, currents, spike).mean()) < 0.9
    assert_close(found, expected)


def test_the_steepness_may_be_another_in_each_lane():
    steepness = jnp.array([1.0, 5.0, 25.0])
    grads = jax.jit(jax.vmap(lambda beta: jax.grad(lambda u: SuperSpike(beta)(spike)(u).sum())(U)))(steepness)
    assert_close(grads, 1 / (steepness[:, None] * jnp.abs(U) + 1) ** 2)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: SuperSpike(0.0), "beta"),
        (lambda: SigmoidDerivative(-1.0), "beta"),
        (lambda: ArcTan(0.0), "alpha"),
        (lambda: Triangle(gamma=0.0), "gamma"),
        (lambda: Triangle(width=0.0), "width"),
    ],
)
def test_a_slope_without_height_or_width_is_refused(make, match):
    with pytest.raises(cv.ArgumentError, match=match):
        make()
