"""Feedback alignment on the layers of every framework, and direct feedback alignment on a network."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_layers import CONVOLUTIONS, DENSE, Layer

import crossvjp as cv
from crossvjp.rules import DirectFeedbackAlignment, FeedbackAlignment, SignSymmetry
from crossvjp.testing import assert_close

LAYERS = {f"dense {name}": layer for name, layer in DENSE.items()}
LAYERS |= {f"convolution {name}": layer for name, layer in CONVOLUTIONS.items()}


def draw(seed: int, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def feedback(layer: Layer) -> jax.Array:
    return draw(3, layer.kernel.shape)


def half_the_signs(layer: Layer) -> jax.Array:
    return 0.5 * jnp.sign(layer.kernel)


CASES = {f"feedback, {name}": (feedback, layer) for name, layer in LAYERS.items()}
CASES |= {f"signs, {name}": (half_the_signs, LAYERS[name]) for name in ("dense haiku", "convolution equinox")}


@pytest.mark.parametrize(("kernel", "layer"), CASES.values(), ids=CASES)
def test_the_input_gets_the_cotangent_of_the_layer_with_another_kernel(kernel, layer):
    rule = SignSymmetry(0.5) if kernel is half_the_signs else FeedbackAlignment(kernel(layer))
    x = draw(1, layer.x)
    y = jax.eval_shape(lambda: layer.run(None, layer.variables, x))
    other = layer.with_kernel(kernel(layer))
    # One compiled program for all three: eagerly, each operation of a convolution is compiled by itself.
    pulled = jax.jit(lambda bar: [layer.pull(rule, x, bar), layer.pull(None, x, bar), other.pull(None, x, bar)])
    (variables_bar, x_bar), (own_variables_bar, own_x_bar), (_, expected) = pulled(draw(2, y.shape))
    assert_close(variables_bar, own_variables_bar)
    assert_close(x_bar, expected)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_close(x_bar, own_x_bar, 0.1)


@pytest.mark.parametrize("name", ["linen", "nnx", "haiku"])
def test_a_dense_layers_cotangent_is_that_times_the_transposed_feedback(name):
    layer, B = DENSE[name], draw(3, (5, 3))
    y_bar = draw(2, (7, 3))
    _, x_bar = layer.pull(FeedbackAlignment(B), draw(1, layer.x), y_bar)
    np.testing.assert_allclose(x_bar, np.asarray(y_bar) @ np.asarray(B).T, rtol=0, atol=1e-5)  # float32


def dense(w, x):
    return x @ w


W = draw(4, (5, 3))


def test_a_normalised_kernel_keeps_its_own_gradient():
    normalised = lambda w, x: x @ (w / jnp.linalg.norm(w))
    grads = lambda fn: jax.jit(jax.grad(lambda w, x: jnp.sum(jnp.tanh(fn(w, x))), argnums=(0, 1)))(W, draw(1, (7, 5)))
    (w_bar, x_bar), own = grads(FeedbackAlignment(draw(3, (5, 3))).lift(normalised)), grads(normalised)
    assert_close(w_bar, own[0])
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_close(x_bar, own[1], 0.1)


@pytest.mark.parametrize("rule", [FeedbackAlignment(W), SignSymmetry()], ids=["feedback", "sign"])
def test_a_layer_with_its_activation_is_refused(rule):
    activated = rule.lift(lambda w, x: jnp.tanh(dense(w, x)))
    with pytest.raises(cv.ArgumentError, match="must be put on a layer that is linear in its inputs"):
        jax.grad(lambda x: jnp.sum(activated(W, x)))(draw(1, (7, 5)))


@pytest.mark.parametrize(
    ("rule", "variables", "message"),
    [
        (FeedbackAlignment(W.T), {"w": W}, r"must have the shape of the layer's kernel, \(5, 3\), but has \(3, 5\)"),
        (FeedbackAlignment(W), {"w": W, "v": W}, "must be put on one dense or convolutional layer"),
        (SignSymmetry(), {"w": W[:, 0]}, "must be put on one dense or convolutional layer"),
    ],
    ids=["another shape", "two kernels", "no kernel"],
)
def test_a_layer_that_has_not_one_such_kernel_is_refused(rule, variables, message):
    lifted = rule.lift(lambda p, x: sum(x @ w for w in p.values()))
    with pytest.raises(cv.ArgumentError, match=message):
        jax.grad(lambda x: jnp.sum(lifted(variables, x)))(draw(1, (7, 5)))


def test_the_size_of_the_signs_must_be_positive():
    with pytest.raises(cv.ArgumentError, match="size"):
        SignSymmetry(0.0)


SIZES = (5, 4, 4, 3)
WEIGHTS = [draw(seed, shape) for seed, shape in enumerate(itertools.pairwise(SIZES))]
TO_HIDDEN = [draw(10 + seed, (3, 4)) for seed in range(2)]


def layer(w, x, road):
    return jnp.tanh(x @ w), road


def by_direct_feedback(weights, x, feedbacks=TO_HIDDEN):
    road = cv.Highway(x[:, :3])  # shaped like the output
    for w, B in zip(weights[:-1], feedbacks, strict=True):
        x, road = DirectFeedbackAlignment(B).lift(layer)(w, x, road)
    return road.depart(x @ weights[-1])


def loss(y):
    return jnp.sum(jnp.tanh(y - 1) ** 2)


def by_hand(weights, x):
    """Computes the updates of Nøkland's paper in NumPy."""
    h = [np.asarray(x)]
    for w in weights[:-1]:
        h.append(np.tanh(h[-1] @ np.asarray(w)))
    error = np.asarray(jax.grad(loss)(h[-1] @ weights[-1]))
    below = [
        before.T @ (error @ np.asarray(B) * (1 - after**2))
        for before, after, B in zip(h, h[1:], TO_HIDDEN, strict=False)
    ]
    return [*below, h[-1].T @ error]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_direct_feedback_gives_each_layer_the_error_of_the_output(compiled):
    x = draw(1, (7, 5))
    grad = jax.grad(lambda weights: loss(by_direct_feedback(weights, x)))
    assert_close((jax.jit(grad) if compiled else grad)(WEIGHTS), by_hand(WEIGHTS, x))


def test_direct_feedback_reaches_a_convolutional_layer_by_its_flattened_units():
    images, B = draw(1, (7, 4, 4, 1)), draw(2, (3, 4 * 4 * 2))
    kernel, last = draw(3, (3, 3, 1, 2)), draw(4, (32, 3))
    convolve = lambda w, x: jax.lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )

    def network(kernel):
        road = cv.Highway(images.reshape(7, -1)[:, :3])
        h, road = DirectFeedbackAlignment(B).lift(lambda w, x, road: (convolve(w, x), road))(kernel, images, road)
        return loss(road.depart(h.reshape(7, -1) @ last))

    def by_hand(kernel):
        h, pull = jax.vjp(lambda w: convolve(w, images), kernel)
        error = jax.grad(loss)(h.reshape(7, -1) @ last)
        return pull((error @ B).reshape(7, 4, 4, 2))[0]

    found, expected = jax.jit(lambda kernel: (jax.grad(network)(kernel), by_hand(kernel)))(kernel)
    assert_close(found, expected)


def test_direct_feedback_trains_a_network():
    x, w = draw(1, (64, 5)), draw(20, (5, 3))
    total = lambda weights: jnp.mean((by_direct_feedback(weights, x) - jnp.tanh(x @ w)) ** 2)
    step = jax.jit(lambda weights: jax.tree.map(lambda w, g: w - 0.1 * g, weights, jax.grad(total)(weights)))
    weights = [0.1 * w for w in WEIGHTS]
    before = total(weights)
    for _ in range(300):
        weights = step(weights)
    assert total(weights) < before / 3


def test_direct_feedback_without_a_highway_is_an_error():
    alone = DirectFeedbackAlignment(TO_HIDDEN[0]).lift(lambda w, x: jnp.tanh(x @ w))
    with pytest.raises(cv.ArgumentError, match="needs a highway from the end of the network"):
        jax.grad(lambda w: jnp.sum(alone(w, draw(1, (7, 5)))))(WEIGHTS[0])


def test_feedback_of_another_shape_than_the_hidden_layer_is_an_error():
    with pytest.raises(cv.ArgumentError, match=r"must have the shape \(3, 4\)"):
        jax.grad(lambda weights: loss(by_direct_feedback(weights, draw(1, (7, 5)), [TO_HIDDEN[0].T] * 2)))(WEIGHTS)
