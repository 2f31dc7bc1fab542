"""What a rule can ask of its call: examples one by one, keys, what is differentiated; and what it can be put on."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from five import five

import crossvjp as cv

P = {"w": jnp.array([[0.2, -1.4], [0.7, 0.4], [-0.1, 2.0]]), "b": jnp.array([0.5, -0.5])}
X = jnp.array([[1.0, -2.0, 0.5], [0.1, 0.3, 3.0], [0.0, 1.0, -1.0], [2.0, 2.0, 2.0]])


def dense(p, x):
    return jnp.tanh(x @ p["w"] + p["b"])


def normed(p, x):
    """Mixes the examples of a batch, as batch normalisation does."""
    y = dense(p, x)
    return (y - y.mean(axis=0)) / jnp.sqrt(y.var(axis=0) + 0.1)


def squares(bar):
    return jax.tree.map(lambda leaf: jnp.sum(leaf**2, axis=0), bar)


class SquaresOfExamples(cv.Rule):
    """Gives the sum of the squared gradients of the examples."""

    independent: bool = cv.static(default=True)
    linear = False

    def backward(self, call, y_bar):
        each = call.per_example(y_bar, independent=self.independent)
        return call.pullback(y_bar).replace(variables=squares(each.variables))


def one_by_one(fn, y_bar):
    rows = [jnp.where(jnp.arange(4)[:, None] == i, y_bar, 0) for i in range(4)]
    bars = [jax.vjp(fn, P, X)[1](row)[0] for row in rows]
    return squares(jax.tree.map(lambda *leaves: jnp.stack(leaves), *bars))


@pytest.mark.parametrize("subject", five(P, dense, (X,)), ids=lambda subject: subject.name)
def test_examples_get_gradients_of_their_own_in_every_framework(subject):
    use = SquaresOfExamples()
    run = lambda held: subject.run(held, subject.rest, lambda mdl, *args: use(mdl)(*args), *subject.inputs)[0]
    y, pullback = jax.vjp(run, subject.variables)
    found = subject.common(pullback(jnp.cos(y))[0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, one_by_one(dense, jnp.cos(y)))


def test_examples_that_meet_in_the_module_are_pulled_back_through_the_whole_batch():
    y, pullback = jax.vjp(lambda p: SquaresOfExamples(False).lift(normed)(p, X), P)
    expected = one_by_one(normed, jnp.cos(y))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), pullback(jnp.cos(y))[0], expected)


def test_the_inputs_cotangents_per_example_keep_the_shape_of_the_inputs():
    seen = []

    @cv.rule
    def own(call, y_bar):
        bar = call.per_example(y_bar)
        seen.append(jax.tree.map(jnp.shape, bar))
        return call.pullback(y_bar).replace(inputs=bar.inputs)

    x_bar = jax.grad(lambda x: jnp.sum(own.lift(dense)(P, x) ** 2))(X)
    np.testing.assert_allclose(x_bar, jax.grad(lambda x: jnp.sum(dense(P, x) ** 2))(X), rtol=1e-5)
    assert seen[-1] == cv.Cotangents(((4, 3),), {"b": (4, 2), "w": (4, 3, 2)})


def test_a_module_that_writes_state_has_no_independent_examples():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return SquaresOfExamples()(nn.BatchNorm(use_running_average=False))(x)

    variables = Net().init(jax.random.key(0), X)
    with pytest.raises(cv.ArgumentError, match=r"writes state in the call.*independent=False"):
        jax.grad(lambda v: jnp.sum(Net().apply(v, X, mutable=["batch_stats"])[0]))(variables)


@pytest.mark.parametrize(
    ("fn", "inputs", "message"),
    [
        (lambda p, x: jnp.sum(dense(p, x)), (X,), r"but `y_bar` at its root is float32\[\]"),
        (lambda p, x, z: dense(p, x) + z, (X, jnp.ones(2)), r"it is 4, but an input is float32\[2\]"),
    ],
    ids=["scalar output", "input without a batch"],
)
def test_a_leaf_without_the_batch_on_axis_0_is_an_error(fn, inputs, message):
    with pytest.raises(cv.ArgumentError, match=message):
        jax.grad(lambda p: jnp.sum(SquaresOfExamples().lift(fn)(p, *inputs)))(P)


def test_a_scalar_input_belongs_to_every_example():
    fn = lambda p, x, scale: scale * dense(p, x)
    y_bar = jnp.ones((4, 2))
    found = jax.vjp(lambda p: SquaresOfExamples().lift(fn)(p, X, jnp.array(3.0)), P)[1](y_bar)[0]
    expected = jax.tree.map(lambda leaf: 9 * leaf, one_by_one(dense, y_bar))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, expected)


class Noise(cv.Rule):
    """Adds noise to the gradient, and to the output the same."""

    def forward(self, call):
        return call(call.variables, *call.inputs) + jax.random.normal(call.key, (4, 2))

    def backward(self, call, y_bar):
        return call.pullback(y_bar + jax.random.normal(call.key, (4, 2)))


@pytest.mark.parametrize("around", [lambda run: run, jax.jit, jax.checkpoint], ids=["eager", "jit", "remat"])
def test_a_key_is_the_same_in_both_passes_and_under_every_transform(around):
    key = jax.random.key(7)
    run = around(lambda p: Noise().lift(dense, key=key)(p, X))
    y, pullback = jax.vjp(run, P)
    noise = jax.random.normal(key, (4, 2))
    np.testing.assert_allclose(y, dense(P, X) + noise, rtol=1e-6)
    expected = jax.vjp(lambda p: dense(p, X), P)[1](1 + noise)[0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), pullback(jnp.ones((4, 2)))[0], expected)


def test_a_batch_of_keys_draws_for_each_lane():
    keys = jax.random.split(jax.random.key(0), 3)
    ys = jax.vmap(lambda key: Noise()(lambda x: x[:, :2], key=key)(X))(keys)
    expected = jnp.stack([X[:, :2] + jax.random.normal(key, (4, 2)) for key in keys])
    np.testing.assert_allclose(ys, expected, rtol=1e-6)


def test_a_rule_without_a_key_says_how_to_give_one_in_each_framework():
    with pytest.raises(cv.ArgumentError, match=r"rule\(mdl, key=key\).*make_rng.*rngs.*next_rng_key"):
        Noise().lift(dense)(P, X)


def test_a_rule_sees_which_of_its_fields_are_differentiated():
    seen = []

    class Looks(cv.Rule):
        one: Any = 1.0
        other: Any = 1.0

        def backward(self, call, y_bar):
            seen.append(dict(call.perturbed.fields))
            return call.pullback(y_bar)

    jax.grad(lambda one: jnp.sum(Looks(one, jnp.ones(()))(jnp.sin)(X)) * one)(1.0)
    expected = {"one": True, "other": False}
    assert seen[-1] == expected if not getattr(jax.config, "jax_custom_vjp3", False) else all(seen[-1].values())


def test_nothing_is_differentiated_where_no_gradient_is_asked_for():
    seen = []

    class Looks(cv.Rule):
        def forward(self, call):
            seen.append(any(jax.tree.leaves(call.perturbed)))
            return call(call.variables, *call.inputs)

        def backward(self, call, y_bar):
            return call.pullback(y_bar)

    Looks().lift(dense)(P, X)
    assert seen == [False]
    jax.grad(lambda p: jnp.sum(Looks().lift(dense)(p, X)))(P)
    assert seen[-1]


def test_a_rule_is_put_on_a_function_of_inputs():
    half = cv.rule(lambda call, y_bar: call.pullback(y_bar / 2))
    np.testing.assert_allclose(jax.grad(lambda x: jnp.sum(half(jnp.sin)(x)))(X), jnp.cos(X) / 2, rtol=1e-6)
    np.testing.assert_allclose(jax.grad(lambda x: jnp.sum(half.lift(lambda _, x: x)(None, x)))(X), jnp.ones_like(X) / 2)


def test_a_function_of_inputs_may_close_over_traced_values_that_are_not_differentiated():
    half = cv.rule(lambda call, y_bar: call.pullback(y_bar / 2))
    run = jax.jit(lambda x, scale: jax.grad(lambda x: jnp.sum(half(lambda x: scale * x)(x)))(x))
    np.testing.assert_allclose(run(X, 3.0), 1.5 * jnp.ones_like(X))


class ForVariables(cv.Rule):
    """Acts on variables."""

    needs_variables = True

    def backward(self, call, y_bar):
        return call.pullback(y_bar)


@pytest.mark.parametrize(
    "use",
    [
        lambda rule: rule(jnp.sin)(X),
        lambda rule: rule.lift(lambda mdl, x: x)({"n": jnp.arange(3)}, X),
        lambda rule: nn.Sequential([lambda x: rule(nn.Dropout(0.5, deterministic=True))(x)]).apply({}, X),
    ],
    ids=["function", "integers", "linen"],
)
def test_a_rule_for_variables_on_a_module_without_any_is_an_error(use):
    with pytest.raises(cv.ArgumentError, match=r"ForVariables\(\) acts on variables, but the module has none"):
        use(ForVariables())


def test_a_static_function_of_a_rule_may_close_over_traced_values():
    class Mapped(cv.Rule):
        function: Any = cv.static()

        def backward(self, call, y_bar):
            return call.pullback(self.function(y_bar))

    def step(scale, x):
        return jax.grad(lambda x: jnp.sum(Mapped(lambda c: scale * c)(jnp.sin)(x)))(x)

    np.testing.assert_allclose(jax.jit(step)(3.0, X), 3 * jnp.cos(X), rtol=1e-6)
    _, scanned = jax.lax.scan(lambda c, scale: (c, step(scale, X)), 0, jnp.array([1.0, 3.0]))
    np.testing.assert_allclose(scanned[1], 3 * jnp.cos(X), rtol=1e-6)
