"""Attribution on whole networks, against NumPy and against gradient times input."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import crossvjp as cv
from crossvjp.rules import DeconvNet, GuidedBackprop, LRPEpsilon

RNG = np.random.default_rng(0)
X = RNG.normal(size=(4, 6))
WEIGHTS = [RNG.normal(size=shape) for shape in ((6, 8), (8, 7), (7, 2))]


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


def dense(w, x):
    return x @ w


def network(x, relu: Any = jax.nn.relu, layer: Any = dense):
    """Gives the first of two outputs, without biases."""
    for w in WEIGHTS[:-1]:
        x = relu(layer(jnp.asarray(w), x))
    return layer(jnp.asarray(WEIGHTS[-1]), x)[:, 0]


def explained(**parts: Any) -> Any:
    return jax.grad(lambda x: jnp.sum(network(x, **parts)))(jnp.asarray(X))


def by_hand(through_relu: Any) -> np.ndarray:
    """Goes back through the network in NumPy, with another derivative of the activation."""
    h, before = X, []
    for w in WEIGHTS[:-1]:
        before.append(h @ w)
        h = np.maximum(before[-1], 0)
    bar = np.tile(WEIGHTS[-1][:, 0], (len(X), 1))
    for w, z in zip(reversed(WEIGHTS[:-1]), reversed(before), strict=True):
        bar = through_relu(bar, z) @ w.T
    return bar


RELUS = {
    "guided backprop": (GuidedBackprop(), lambda c, z: c * (c > 0) * (z > 0)),
    "deconvnet": (DeconvNet(), lambda c, z: c * (c > 0)),
}


@pytest.mark.parametrize("name", RELUS)
def test_a_network_with_another_backward_pass_of_relu_is_as_by_hand(name):
    rule, through_relu = RELUS[name]
    found = explained(relu=rule(jax.nn.relu))
    np.testing.assert_allclose(found, by_hand(through_relu), rtol=1e-12)  # float64
    own = by_hand(lambda c, z: c * (z > 0))
    np.testing.assert_allclose(explained(), own, rtol=1e-12)  # the same by hand, for the true gradient
    assert np.max(np.abs(found - own)) > 0.1


def relevances(epsilon: float) -> tuple[jax.Array, jax.Array]:
    """Gives the output, and what of it each input has."""
    rule = LRPEpsilon(epsilon)
    y, pull = jax.vjp(lambda x: network(x, rule(jax.nn.relu), rule.lift(dense)), jnp.asarray(X))
    assert float(jnp.min(jnp.abs(y))) > 0.01
    return y, pull(y)[0]


def test_relevance_is_gradient_times_input_without_biases():
    _, relevance = relevances(1e-12)  # near LRP-0
    np.testing.assert_allclose(relevance, X * explained(), rtol=0, atol=1e-9)


def test_the_relevances_add_up_to_the_output():
    y, relevance = relevances(1e-12)
    np.testing.assert_allclose(jnp.sum(relevance, axis=1), y, rtol=1e-9)


def test_epsilon_takes_relevance_away():
    y, relevance = relevances(10.0)
    assert float(jnp.max(jnp.abs(jnp.sum(relevance, axis=1) / y))) < 0.5


@pytest.mark.parametrize("epsilon", [0.0, -1.0])
def test_epsilon_must_be_positive(epsilon):
    with pytest.raises(cv.ArgumentError, match="epsilon"):
        LRPEpsilon(epsilon)


def test_integers_beside_the_input_have_no_relevance():
    take = LRPEpsilon(1e-9).lift(lambda w, x, index: (x @ w)[index])
    pulled = jax.grad(lambda x: jnp.sum(take(jnp.asarray(WEIGHTS[0]), x, jnp.array([0, 1]))))(jnp.asarray(X))
    assert bool(jnp.all(pulled[2:] == 0))
    assert bool(jnp.any(pulled[:2] != 0))
