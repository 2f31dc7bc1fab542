"""Probes: what they tell against backpropagation by hand, and that they change and cost nothing."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_layers import DENSE

import crossvjp as cv
from crossvjp.rules import FirstNaN, Histogram, KroneckerFactors, Probe, max_abs
from crossvjp.testing import assert_close, assert_same_bits

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(6, 5)), jnp.float32)
W = jnp.asarray(RNG.normal(size=(5, 4)), jnp.float32)
V = jnp.asarray(RNG.normal(size=(4, 3)), jnp.float32)
PARAMS = {"w": W, "v": V}


def dense(w, x):
    return x @ w


def network(params, x, rule: Any = None):
    layer = rule.lift(dense) if rule else dense
    return jnp.sum(jnp.tanh(jnp.tanh(layer(params["w"], x)) @ params["v"]))


def cotangents_by_hand() -> dict[str, np.ndarray]:
    """Goes back through the network in NumPy, to the first layer."""
    x, w, v = (np.asarray(array, np.float64) for array in (X, W, V))
    h = np.tanh(x @ w)
    y = np.tanh(h @ v)
    c = ((1 - y**2) @ v.T) * (1 - h**2)
    return {"output": c, "inputs": c @ w.T, "variables": x.T @ c}


def means(tree):
    return jnp.stack([jnp.mean(leaf) for leaf in jax.tree.leaves(tree)])


EDGES = (-0.5, -0.1, 0.0, 0.1, 0.5)
STATISTICS = {
    "norm": ({}, np.linalg.norm),
    "max_abs": ({"statistic": max_abs}, lambda c: np.max(np.abs(c))),
    "histogram": ({"statistic": Histogram(EDGES)}, lambda c: np.histogram(c, EDGES)[0]),
    "one of the user's": ({"statistic": means}, lambda c: [np.mean(c)]),
}
each_statistic = pytest.mark.parametrize("statistic", STATISTICS)
each_place = pytest.mark.parametrize("of", ["output", "inputs", "variables"])


def probe(statistic: str, of: str) -> Probe:
    shape = np.shape(STATISTICS[statistic][1](np.zeros(1)))
    return Probe(cv.Sum(shape), of=of, **STATISTICS[statistic][0])


@each_statistic
@each_place
def test_a_probe_tells_what_backpropagation_by_hand_has(statistic, of):
    found = jax.grad(lambda rule: network(PARAMS, X, rule))(probe(statistic, of)).tap
    expected = STATISTICS[statistic][1](cotangents_by_hand()[of])
    np.testing.assert_allclose(found.value, expected, rtol=1e-5)  # float32, after five matrix products
    assert float(found.count) == 1


RULES = {
    "a probe": probe("norm", "variables"),
    "a histogram": probe("histogram", "inputs"),
    "the first NaN": FirstNaN(cv.Sum(())),
    "Kronecker factors": KroneckerFactors(cv.Sum((5, 5)), cv.Sum((4, 4))),
}
each_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


@each_rule
@pytest.mark.parametrize("asked", [False, True], ids=["not asked", "asked"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_probes_leave_gradients_as_they_are_bit_for_bit(rule, asked, compiled):
    around = jax.jit if compiled else lambda function: function
    expected = around(jax.grad(network, argnums=(0, 1)))(PARAMS, X)
    arguments = (0, 1, 2) if asked else (0, 1)
    found = around(jax.grad(network, argnums=arguments))(PARAMS, X, rule)
    assert_same_bits(found[:2], expected)


def cost(function, *args) -> tuple[float, float, int]:
    """Gives the flops, the bytes that are read and written, and those of temporaries, of the compiled program."""
    compiled = jax.jit(function).lower(*args).compile()
    analysis, memory = compiled.cost_analysis(), compiled.memory_analysis()
    assert analysis is not None
    assert memory is not None
    return analysis["flops"], analysis["bytes accessed"], memory.temp_size_in_bytes


@each_rule
def test_a_probe_that_is_not_asked_costs_nothing(rule):
    alone = cost(jax.value_and_grad(network), PARAMS, X)
    not_asked = cost(lambda params, x: jax.value_and_grad(network)(params, x, rule), PARAMS, X)
    asked = cost(jax.value_and_grad(network, argnums=(0, 2)), PARAMS, X, rule)
    assert not_asked == alone
    assert asked[0] > alone[0]


def test_the_steps_of_a_scan_stay_apart_in_a_stack():
    ws = jnp.stack([scale * jnp.eye(5) for scale in (0.5, 1.0, 1.5)])

    def loss(taps):
        def step(h, layer):
            w, tap = layer
            return jnp.tanh(Probe(tap).lift(dense)(w, h)), None

        return jnp.sum(jax.lax.scan(step, X, (ws, taps))[0])

    found = jax.grad(loss)(cv.Stack(3, ()))
    h, states = X, []
    for w in ws:
        h = jnp.tanh(h @ w)
        states.append(h)
    expected, h_bar = [], jnp.ones_like(X)
    for w, h in zip(reversed(ws), reversed(states), strict=True):
        c = h_bar * (1 - h**2)
        expected.insert(0, jnp.linalg.norm(c))
        h_bar = c @ w.T
    np.testing.assert_allclose(found.value, expected, rtol=1e-5)  # float32, after a few matrix products


def root_network(params, x, taps):
    """Has an infinite derivative where a hidden unit is zero."""
    first = FirstNaN(taps["first"]).lift(dense)(params["w"], x)
    root = FirstNaN(taps["root"])(jnp.sqrt)(jnp.maximum(first, 0))
    return FirstNaN(taps["last"]).lift(dense)(params["v"], root)


TAPS = {name: cv.Sum(()) for name in ("first", "root", "last")}


@pytest.mark.parametrize(
    ("loss", "x", "expected"),
    [
        (jnp.sum, X, {"first": 0, "root": 1, "last": 0}),
        (lambda y: jnp.sum(jnp.sqrt(y * 0)), jnp.abs(X), {"first": 0, "root": 0, "last": 0}),
        (lambda y: jnp.sum(y[:1] * 1e38) * 1e38, X, {"first": 0, "root": 0, "last": 0}),
        (lambda y: jnp.sum(y[:1] * 1e38), jnp.abs(X) + 1, {"first": 0, "root": 0, "last": 1}),
    ],
    ids=["in the middle", "in the loss", "infinite in the loss", "overflow in the last layer"],
)
def test_the_first_layer_with_a_nan_is_told_apart_from_those_that_pass_it_on(loss, x, expected):
    params = {"w": jnp.abs(W) if loss is not jnp.sum else W, "v": 10 * jnp.abs(V)}
    bars, taps = jax.grad(lambda params, taps: loss(root_network(params, x, taps)), argnums=(0, 1))(params, TAPS)
    assert not all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(bars))
    assert {name: float(tap.value) for name, tap in taps.items()} == expected


@pytest.mark.parametrize("name", DENSE)
def test_the_kronecker_product_of_the_factors_is_the_fisher_block_of_one_example(name):
    layer = DENSE[name]
    x, y_bar = X[:1], jnp.asarray(RNG.normal(size=(1, 3)), jnp.float32)
    size = 5 if "without bias" in name else 6
    rule = KroneckerFactors(cv.Sum((size, size)), cv.Sum((3, 3)))
    found = jax.vjp(lambda rule: layer.run(rule, layer.variables, x), rule)[1](y_bar)[0]
    bars = jax.tree.leaves(layer.pull(None, x, y_bar)[0])
    kernel = max(bars, key=lambda leaf: leaf.ndim)
    rows = [kernel if kernel.shape == (5, 3) else kernel.T, *(leaf[None] for leaf in bars if leaf.ndim == 1)]
    gradient = jnp.concatenate(rows).ravel()  # row by row, the bias last
    assert_close(jnp.kron(found.inputs.value, found.outputs.value), jnp.outer(gradient, gradient))


def test_kronecker_factors_are_those_of_a_dense_layer_alone():
    rule = KroneckerFactors(cv.Sum((5, 5)), cv.Sum((4, 4)))
    activated = rule.lift(lambda w, x: jnp.tanh(x @ w))
    with pytest.raises(cv.ArgumentError, match="KroneckerFactors must be put on a dense layer"):
        jax.grad(lambda w: jnp.sum(activated(w, X)))(W)


def test_a_probe_of_something_else_is_an_error():
    with pytest.raises(cv.ArgumentError, match="`of` must be 'output', 'inputs' or 'variables', but is 'y_bar'"):
        Probe(cv.Sum(()), of="y_bar")
