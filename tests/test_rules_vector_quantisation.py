"""Gradients past a lookup: Haiku's own quantiser, and the rotation by an angle in a plane."""

from __future__ import annotations

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import crossvjp as cv
from crossvjp.rules import RotationTrick, VQStraightThrough
from crossvjp.testing import assert_close, assert_same_bits

CODES = jax.random.normal(jax.random.key(0), (7, 3))
Z, C = jax.random.normal(jax.random.key(1), (2, 5, 3))


def nearest(codes, z):
    distances = jnp.sum((z[..., None, :] - codes) ** 2, -1)
    return codes[jnp.argmin(distances, -1)]


def test_it_is_haikus_vector_quantizer_but_exact_in_the_forward_pass():
    def quantizer(z):
        return hk.nets.VectorQuantizer(embedding_dim=3, num_embeddings=7, commitment_cost=0.25)(z, is_training=True)

    transformed = hk.transform_with_state(quantizer)
    _, state = transformed.init(jax.random.PRNGKey(0), Z)
    state = {"vector_quantizer": {"embeddings": CODES.T}} if "vector_quantizer" in state else state
    params = {"vector_quantizer": {"embeddings": CODES.T}}
    theirs = lambda z: transformed.apply(params, state, None, z)[0]["quantize"]
    expected, expected_pullback = jax.vjp(theirs, Z)
    y, pullback = jax.vjp(lambda z: VQStraightThrough().lift(nearest)(CODES, z), Z)
    assert_close(y, expected)
    assert_same_bits(y, nearest(CODES, Z))
    assert_same_bits(pullback(C), expected_pullback(C))


@pytest.mark.parametrize("rule", [VQStraightThrough(), RotationTrick()], ids=["straight through", "rotation"])
def test_the_codebook_learns_by_its_own_loss_alone(rule):
    def loss(codes, z, lookup, weight):
        of_output = jnp.sum(C * lookup(codes, z))
        return of_output + weight * jnp.sum((nearest(codes, jax.lax.stop_gradient(z)) - jax.lax.stop_gradient(z)) ** 2)

    assert not jnp.any(jax.grad(loss)(CODES, Z, rule.lift(nearest), 0.0))
    expected = jax.grad(loss)(CODES, Z, lambda codes, z: jax.lax.stop_gradient(nearest(codes, z)), 1.0)
    assert_close(jax.grad(loss)(CODES, Z, rule.lift(nearest), 1.0), expected)


def by_angle(e, q, c):
    """Turns c back by the angle between e and q, in the plane of both, and scales it."""
    start, to = e / np.linalg.norm(e), q / np.linalg.norm(q)
    angle = np.arccos(start @ to)
    across = to - (to @ start) * start
    across /= np.linalg.norm(across)
    along, beside = c @ start, c @ across
    turned = (np.cos(angle) * along + np.sin(angle) * beside) * start
    turned += (np.cos(angle) * beside - np.sin(angle) * along) * across
    turned += c - along * start - beside * across
    return np.linalg.norm(q) / np.linalg.norm(e) * turned


def rotated(e, q, c):
    """Gives the rule's cotangent of e, with q as the only code."""
    return jax.vjp(lambda e: RotationTrick().lift(nearest)(q[None], e), e)[1](c)[0]


@pytest.mark.parametrize("seed", range(5))
def test_the_rotation_trick_turns_back_by_the_angle_in_the_plane(seed):
    e, q, c = np.random.default_rng(seed).normal(size=(3, 6))
    found = rotated(*(jnp.asarray(each, jnp.float32) for each in (e, q, c)))
    np.testing.assert_allclose(found, by_angle(e, q, c), rtol=1e-5, atol=1e-5)  # float32 through arccos in float64


def test_a_cotangent_along_the_code_becomes_one_along_the_vector():
    e, q = Z[0], CODES[0]
    ratio = jnp.linalg.norm(q) / jnp.linalg.norm(e)
    assert_close(rotated(e, q, q), ratio**2 * e)


def test_a_vector_that_is_its_code_passes_the_cotangent():
    assert_close(rotated(CODES[0], CODES[0], C[0]), C[0])


def test_opposite_vectors_have_a_finite_gradient():
    e = jnp.array([1.0, 0.0, 0.0])
    assert_close(rotated(e, -2 * e, C[0]), 2 * C[0] * jnp.array([-1.0, 1.0, 1.0]))


def test_a_vector_of_zeros_passes_the_cotangent():
    assert_same_bits(rotated(jnp.zeros(3), CODES[0], C[0]), C[0])


@pytest.mark.parametrize("rule", [VQStraightThrough(), RotationTrick()], ids=repr)
def test_two_inputs_are_refused(rule):
    with pytest.raises(cv.ArgumentError, match="a function of one array, but the call has 2 in 2 inputs"):
        jax.grad(lambda z: rule.lift(lambda codes, a, b: nearest(codes, a + b))(CODES, z, z).sum())(Z)
