"""Per-example clipping against optax's, and the memory that ghost norms spare."""

from __future__ import annotations

import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from dense_layers import DENSE
from optax.contrib import differentially_private_aggregate

import crossvjp as cv
from crossvjp.rules import GhostClip, PerExampleClip, PerExampleNorm, PerLayerClip

BATCH = 6
INPUTS = {"rows": (BATCH, 5), "sequences": (BATCH, 4, 5), "long sequences": (BATCH, 7, 5)}
# Sums of 6 to 42 products round to a few units in the last place.
TOLERANCE = {"float32": 1e-6, "float64": 1e-14}

each_input = pytest.mark.parametrize("shape", INPUTS.values(), ids=INPUTS)
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE)


@pytest.fixture(autouse=True)
def wide_where_asked(request: pytest.FixtureRequest):
    """Enables float64 for the tests with that dtype."""
    dtype = request.node.callspec.params.get("dtype") if hasattr(request.node, "callspec") else None
    with jax.enable_x64(dtype == "float64"):
        yield


def make_params(sizes: tuple[int, ...], dtype: str = "float32") -> Any:
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    pairs = itertools.pairwise(sizes)
    return [{"w": draw(before, after) / before**0.5, "b": 0.1 * draw(after)} for before, after in pairs]


def make_input(shape: tuple[int, ...], dtype: str = "float32") -> Any:
    """Draws examples whose gradients differ in size."""
    drawn = np.random.default_rng(1).normal(size=shape)
    return jnp.asarray(drawn * np.linspace(0.1, 2, len(drawn)).reshape(-1, *[1] * (len(shape) - 1)), dtype)


def dense(p, x):
    return x @ p["w"] + p["b"]


def network(params, x, layer=dense):
    for p in params[:-1]:
        x = jnp.tanh(layer(p, x))
    return layer(params[-1], x)


def with_ghost_norms(params, x, squares):
    return network(params, x, PerExampleNorm(squares).lift(dense))


def loss(y):
    return jnp.sum(y**2) / 2


def gradients_one_by_one(params, x):
    """Gives the gradient of each example by itself, by `vmap(grad)`."""
    return jax.vmap(lambda one: jax.grad(lambda params: loss(network(params, one)))(params))(x)


def norms_of(grads) -> Any:
    return jax.vmap(optax.tree.norm)(grads)


def aggregated_by_optax(grads, max_norm):
    """Gives the sum of the clipped gradients: optax gives their mean."""
    rule = differentially_private_aggregate(max_norm, noise_multiplier=0.0, key=0)
    mean, _ = rule.update(grads, rule.init(grads))
    return jax.tree.map(lambda leaf: BATCH * leaf, mean)


@jax.jit
def clipped_by_optax(params, x):
    """Gives the sum in which half of the gradients are clipped, the sum in which none is, and the bound."""
    grads = gradients_one_by_one(params, x)
    max_norm = jnp.median(norms_of(grads))
    return aggregated_by_optax(grads, max_norm), jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), grads), max_norm


def by_per_example_clip(params, x, max_norm):
    return loss(PerExampleClip(max_norm).lift(network)(params, x))


def by_ghost_clip(params, x, max_norm):
    return loss(GhostClip(max_norm).lift(with_ghost_norms)(params, x, cv.Sum((len(x),))))


CLIPPED = {"per example": by_per_example_clip, "ghost": by_ghost_clip}
each_way = pytest.mark.parametrize("way", CLIPPED.values(), ids=CLIPPED)


def assert_within(found, expected, tolerance):
    scale = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(expected))
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale)
    jax.tree.map(close, found, expected)


@each_way
@each_input
@each_dtype
def test_clipping_half_of_the_examples_equals_optax(way, shape, dtype):
    params, x = make_params((5, 9, 8), dtype), make_input(shape, dtype)
    expected, own, max_norm = clipped_by_optax(params, x)
    assert_within(jax.jit(jax.grad(way))(params, x, max_norm), expected, TOLERANCE[dtype])
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_within(own, expected, 0.05)  # the clipping is no small thing


@each_way
def test_the_cotangent_of_the_input_is_not_clipped(way):
    params, x = make_params((5, 9, 8)), make_input((BATCH, 5))
    found = jax.jit(jax.grad(way, argnums=1))(params, x, 1e-3)
    assert_within(found, jax.jit(jax.grad(lambda x: loss(network(params, x))))(x), 1e-6)


@each_input
@each_dtype
def test_each_layer_is_clipped_by_itself_in_one_pass(shape, dtype):
    params, x = make_params((5, 9, 8), dtype), make_input(shape, dtype)

    @jax.jit
    def by_optax(params):
        grads = gradients_one_by_one(params, x)
        max_norms = [jnp.median(norms_of(layer)) for layer in grads]
        return max_norms, [aggregated_by_optax(layer, bound) for layer, bound in zip(grads, max_norms, strict=True)]

    def clipped(params, max_norms):
        bounds = iter(max_norms)
        return loss(network(params, x, lambda p, x: PerLayerClip(next(bounds)).lift(dense)(p, x)))

    max_norms, expected = by_optax(params)
    assert_within(jax.jit(jax.grad(clipped))(params, max_norms), expected, TOLERANCE[dtype])


@each_input
@each_dtype
def test_squared_norms_of_the_layers_add_up_to_those_of_the_model(shape, dtype):
    params, x = make_params((5, 9, 8), dtype), make_input(shape, dtype)
    squares = cv.Sum(jnp.zeros(BATCH, dtype))
    found = jax.jit(jax.grad(lambda squares: loss(with_ghost_norms(params, x, squares))))(squares)
    expected = jax.jit(lambda params: norms_of(gradients_one_by_one(params, x)) ** 2)(params)
    assert_within(found.value, expected, TOLERANCE[dtype])
    assert float(found.count) == 2


def per_example_gradients_in(function, *args) -> bool:
    """Says whether a program has an array with an entry for each example and each entry of the 5 x 3 kernel."""
    return bool(re.search(r"\[7,(1,)?(5,3|3,5)\]", str(jax.make_jaxpr(function)(*args))))


@pytest.mark.parametrize("name", DENSE)
def test_the_dense_layer_of_each_framework_has_ghost_norms(name):
    layer = DENSE[name]
    x, y_bar = make_input(layer.x), make_input((7, 3))
    bars = lambda squares: jax.vjp(lambda squares: layer.run(PerExampleNorm(squares), layer.variables, x), squares)[1](
        y_bar
    )
    alone = lambda a, c: layer.pull(None, a[None], c[None])[0]
    (found,), expected = jax.jit(lambda squares: (bars(squares), norms_of(jax.vmap(alone)(x, y_bar)) ** 2))(
        cv.Sum((7,))
    )
    assert_within(found.value, expected, 1e-6)
    assert not per_example_gradients_in(bars, cv.Sum((7,)))


SQUARE = {"w": jnp.asarray(np.random.default_rng(2).normal(size=(5, 5)), jnp.float32), "b": jnp.arange(5.0)}
NOT_DENSE = {
    "an activation": lambda p, x: jnp.tanh(dense(p, x)),
    "a bias in front": lambda p, x: (x + p["b"]) @ p["w"],
    "a scaled input": lambda p, x: (2 * x) @ p["w"] + p["b"],
    "a kernel used twice": lambda p, x: x @ p["w"] @ p["w"] + p["b"],
    "a skip connection": lambda p, x: dense(p, x) + x,
    "a bias added twice": lambda p, x: dense(p, x) + p["b"],
    "a loop": lambda p, x: jax.lax.fori_loop(0, 2, lambda _, x: dense(p, x), x),
    "a kernel alone": lambda p, x: x * p["w"][0] + p["b"],
}


@pytest.mark.parametrize("name", NOT_DENSE)
def test_what_is_no_dense_layer_has_the_norms_of_its_per_example_gradients(name):
    fn, x = NOT_DENSE[name], make_input((7, 5))
    found = jax.jit(jax.grad(lambda squares: loss(PerExampleNorm(squares).lift(fn)(SQUARE, x))))(cv.Sum((7,)))
    alone = lambda one: jax.grad(lambda p: loss(fn(p, one[None])))(SQUARE)
    expected = jax.jit(lambda x: norms_of(jax.vmap(alone)(x)) ** 2)(x)
    assert_within(found.value, expected, 1e-6)


def test_a_rule_inside_changes_the_norms():
    x, p = make_input((7, 5)), SQUARE
    double = cv.rule(lambda call, y_bar: call.pullback(2 * y_bar))
    under = lambda rule: jax.grad(lambda squares: loss(rule(squares).lift(dense)(p, x)))(cv.Sum((7,)))
    composed = lambda squares: cv.compose(PerExampleNorm(squares), double)
    inside, alone = jax.jit(lambda: (under(composed).value, under(PerExampleNorm).value))()
    assert_within(inside, 4 * alone, 1e-6)


def test_the_search_for_per_example_gradients_finds_them():
    layer = DENSE["linen"]
    x, y_bar = make_input(layer.x), make_input((7, 3))
    clipped = lambda variables: jax.vjp(lambda v: layer.run(PerExampleClip(1.0), v, x), variables)[1](y_bar)
    assert per_example_gradients_in(clipped, layer.variables)


def test_an_example_without_a_gradient_stays_finite():
    params, x = make_params((5, 9, 8)), make_input((BATCH, 5))
    weighed = lambda rule: (
        lambda params: jnp.sum(rule.lift(network)(params, x) * jnp.array([0, 1, 1, 1, 1, 1.0])[:, None])
    )
    one, other = jax.jit(lambda p: [jax.grad(weighed(rule))(p) for rule in (PerExampleClip(0.5), PerLayerClip(0.5))])(
        params
    )
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves((one, other)))
    assert_within(one, other, 1e-6)


def bytes_of(function, *args) -> int:
    memory = jax.jit(function).lower(*args).compile().memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes


def test_ghost_clipping_needs_less_than_a_tenth_of_the_memory_of_per_example_gradients():
    params = jax.eval_shape(lambda: make_params((256, 512, 512, 10)))
    x = jax.ShapeDtypeStruct((256, 256), jnp.float32)
    optax_sum = lambda params, x: aggregated_by_optax(gradients_one_by_one(params, x), 1.0)
    ghost = bytes_of(lambda params, x: jax.grad(by_ghost_clip)(params, x, 1.0), params, x)
    one_by_one = bytes_of(optax_sum, params, x)
    unclipped = bytes_of(jax.grad(lambda params, x: loss(network(params, x))), params, x)
    assert ghost < one_by_one / 10
    assert ghost < 2 * unclipped


@pytest.mark.parametrize("rule", [PerExampleClip, PerLayerClip, GhostClip])
def test_the_norm_must_be_positive(rule):
    with pytest.raises(cv.ArgumentError, match="max_norm"):
        rule(0.0)


def test_ghost_clipping_needs_one_channel():
    params, x = make_params((5, 9, 8)), make_input((BATCH, 5))
    with pytest.raises(cv.ArgumentError, match=r"one Sum channel among the inputs of the call.* but there are 0"):
        jax.grad(lambda params: loss(GhostClip(1.0).lift(network)(params, x)))(params)


@pytest.mark.parametrize("rule", [PerLayerClip(1.0), GhostClip(1.0)], ids=["per layer", "ghost"])
def test_a_loss_has_no_examples_to_weigh(rule):
    params, x = make_params((5, 9, 8)), make_input((BATCH, 5))
    of_loss = lambda params, x, squares: loss(with_ghost_norms(params, x, squares))
    with pytest.raises(cv.ArgumentError, match="axis 0"):
        jax.grad(lambda params: rule.lift(of_loss)(params, x, cv.Sum((BATCH,))))(params)
