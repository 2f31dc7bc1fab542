"""`compose`: rules around each other."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from five import five
from helpers import is_coming
from memory_use import kept_bytes

import crossvjp as cv

W, X = jnp.array([3.0, 4.0]), jnp.array([0.5, 2.0])


def product(w, x):
    return w * x


def norm(tree):
    return jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree)))


class Clip(cv.Rule):
    """Clips the gradient to a norm."""

    linear = False
    max_norm: float = 1.0

    def backward(self, call, y_bar):
        bar = call.pullback(y_bar)
        factor = jnp.minimum(1.0, self.max_norm / norm(bar.variables))
        return bar.replace(variables=jax.tree.map(lambda leaf: factor * leaf, bar.variables))


class Scale(cv.Rule):
    """Scales the gradient."""

    factor: float = 10.0

    def backward(self, call, y_bar):
        bar = call.pullback(y_bar)
        return bar.replace(variables=jax.tree.map(lambda leaf: self.factor * leaf, bar.variables))


class Half(cv.Rule):
    """Halves what flows in."""

    def backward(self, call, y_bar):
        return call.pullback(y_bar / 2)


class Probe(cv.Rule):
    """Sends the norm of what flows in."""

    tap: cv.Sum

    def backward(self, call, y_bar):
        return call.pullback(y_bar).with_fields(tap=self.tap.emit(norm(y_bar)))


class SignInputs(cv.Rule):
    """Replaces the inputs by their signs, with a straight-through gradient where they are small."""

    def forward(self, call):
        (x,) = call.inputs
        return call(call.variables, jnp.sign(x)), cv.Residuals(small=jnp.abs(x) <= 1)

    def backward(self, call, y_bar):
        bar = call.vjp_at(call.variables, jnp.sign(call.inputs[0]))[1](y_bar)
        return bar.replace(inputs=(jnp.where(call.residuals.small, bar.inputs[0], 0),))


DENSE = {"w": jnp.array([[0.2, -1.4], [0.7, 0.4]]), "b": jnp.array([3.0, 4.0])}


@pytest.mark.parametrize("subject", five(DENSE, lambda p, x: x @ p["w"] + p["b"], (X,)), ids=lambda s: s.name)
@pytest.mark.parametrize(("rules", "expected"), [((Clip(), Scale()), 1.0), ((Scale(), Clip()), 10.0)], ids=str)
def test_the_first_rule_has_the_last_word_on_the_gradient(subject, rules, expected):
    use = cv.compose(*rules)
    loss = lambda held: jnp.sum(subject.run(held, (), lambda mdl, *args: use(mdl)(*args), X)[0])
    assert float(norm(jax.grad(loss)(subject.variables))) == pytest.approx(expected, rel=1e-5)


def test_the_first_rule_sees_the_cotangent_first():
    run = lambda composed: jnp.sum(composed.lift(product)(W, X))
    outside = jax.grad(run)(cv.compose(Probe(cv.Sum()), Half())).rules[0].tap
    inside = jax.jit(jax.grad(run))(cv.compose(Half(), Probe(cv.Sum()))).rules[1].tap
    assert float(outside.value) == pytest.approx(2**0.5)
    assert float(inside.value) == pytest.approx(2**0.5 / 2)
    assert float(inside.count) == 1


@pytest.mark.parametrize(
    ("rules", "factor"),
    [
        ((SignInputs(),), 1.0),
        ((Half(), SignInputs()), 0.5),
        ((SignInputs(), Half()), 0.5),
        ((SignInputs(), SignInputs()), 1.0),
        ((Half(), SignInputs(), Half()), 0.25),
    ],
    ids=lambda value: "-".join(type(part).__name__ for part in value) if isinstance(value, tuple) else "",
)
@pytest.mark.parametrize("around", [lambda run: run, jax.jit, jax.checkpoint], ids=["eager", "jit", "remat"])
def test_rules_with_forward_passes_compose(rules, factor, around):
    run = around(lambda w, x: jnp.sum(cv.compose(*rules).lift(product)(w, x)))
    y, (w_bar, x_bar) = jax.value_and_grad(run, argnums=(0, 1))(W, X)
    assert float(y) == 7
    np.testing.assert_allclose(w_bar, factor * jnp.ones(2), rtol=1e-6)
    np.testing.assert_allclose(x_bar, factor * jnp.array([3.0, 0.0]), rtol=1e-6)


def test_each_rule_draws_numbers_of_its_own():
    class Noise(cv.Rule):
        def backward(self, call, y_bar):
            return call.pullback(y_bar + jax.random.normal(call.key, y_bar.shape))

    both = jax.grad(lambda w: jnp.sum(cv.compose(Noise(), Noise()).lift(product, key=jax.random.key(0))(w, X)))(W)
    draws = [jax.random.normal(jax.random.fold_in(jax.random.key(0), index), (2,)) for index in range(2)]
    np.testing.assert_allclose(both, X * (1 + draws[0] + draws[1]), rtol=1e-6)


def test_an_answer_that_loses_the_fields_of_a_rule_inside_is_an_error_if_they_are_differentiated():
    loses = cv.rule(lambda call, y_bar: tuple(call.pullback(y_bar)))
    both = cv.compose(loses, Probe(cv.Sum()))
    if not is_coming():  # it does not say what is differentiated
        np.testing.assert_array_equal(jax.grad(lambda w: jnp.sum(both.lift(product)(w, X)))(W), X)
    with pytest.raises(cv.ArgumentError, match=r"has lost their cotangents.*bar\.replace"):
        jax.grad(lambda both: jnp.sum(both.lift(product)(W, X)))(both)


def test_a_composed_rule_keeps_what_its_parts_keep():
    x, w = jnp.ones((8, 64)), jnp.ones((64, 64))
    layer = lambda w, x: jnp.tanh(x @ w)
    again = cv.rule(lambda call, y_bar: call.vjp_at(call.variables, *call.inputs)[1](y_bar))
    assert kept_bytes(cv.compose(Half(), again).lift(layer), w, x) == 0
    assert kept_bytes(cv.compose(Half(), Scale()).lift(layer), w, x) == kept_bytes(layer, w, x)


def test_a_composed_rule_is_linear_if_all_its_parts_are():
    assert cv.compose(Half(), Scale()).linear
    assert not cv.compose(Half(), Clip()).linear


def test_compositions_of_compositions_are_flat():
    assert len(cv.compose(Half(), cv.compose(Clip(), Scale())).rules) == 3


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ((), "takes rules, the outermost first, but argument 0 is None"),
        ((Half(), Half), "but argument 1 is <class"),
        (
            (cv.rule(lambda call, y_bar, updates_bar=None: call.pullback(y_bar)),),
            "asks for the cotangents of the updates",
        ),
    ],
    ids=["none", "a class", "updates"],
)
def test_what_does_not_compose_is_an_error(rules, message):
    with pytest.raises(cv.ArgumentError, match=message):
        cv.compose(*rules)
