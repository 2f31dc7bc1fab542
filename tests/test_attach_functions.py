"""Rules on functions by name: the program that is traced of a call, rewritten."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import pytest
from rules import identity

import crossvjp as cv
from crossvjp.rules import GuidedBackprop
from crossvjp.testing import assert_close, assert_same_bits

X = jax.random.normal(jax.random.key(0), (5,))
W = jax.random.normal(jax.random.key(1), (3, 5))


@cv.rule
def negated(call, y_bar):
    """Turns the cotangent round."""
    return call.pullback(jax.tree.map(jnp.negative, y_bar))


def guided(x):
    """The ReLU under the rule, as one writes it by hand."""
    return GuidedBackprop()(jax.nn.relu)(x)


def in_scan(relu):
    return lambda x: jax.lax.scan(lambda x, w: (relu(x * w), None), x, W)[0]


def in_cond(relu):
    return lambda x: jax.lax.cond(x[0] > 0, lambda x: relu(x * W[0]), lambda x: relu(x * W[1]), x)


def in_switch_and_jit(relu):
    return jax.jit(lambda x: jax.lax.switch(2, [relu, jnp.sin, lambda x: relu(x * W[2])], x))


def in_while(relu):
    return lambda x: jax.lax.fori_loop(0, 3, lambda index, x: relu(x * W[index] + 0.5), x)


def in_remat(relu):
    return jax.checkpoint(lambda x: jnp.sin(relu(x * W[0])))


def in_vmap(relu):
    return lambda x: jax.vmap(lambda w: relu(x * w))(W)


def twice_in_itself(relu):
    return lambda x: relu(relu(x * W[0] + 1.0) - 0.3)


PROGRAMS = [in_scan, in_cond, in_switch_and_jit, in_while, in_remat, in_vmap, twice_in_itself]
SIGNS = jnp.array([1.0, -1.0, 1.0, -1.0, 1.0])  # guided backpropagation differs where the cotangent is negative


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
@pytest.mark.parametrize("around", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_a_function_is_found_wherever_it_stands(program, around):
    attached = cv.attach(program(jax.nn.relu), GuidedBackprop(), where=cv.function(jax.nn.relu))
    loss = lambda f: lambda x: jnp.sum(SIGNS * f(x) + jnp.cos(f(x)))
    found = jax.value_and_grad(around(loss(attached)))(X)
    assert_close(found, jax.value_and_grad(around(loss(program(guided))))(X))
    assert not jnp.allclose(found[1], jax.grad(loss(program(jax.nn.relu)))(X))


def test_a_function_with_several_inputs_and_outputs():
    @jax.jit
    def pair(x, w):
        return x * w, x + w

    fn = lambda x: sum(a * b for a, b in zip(pair(x, 2.0), pair(3.0, x), strict=True))
    attached = cv.attach(fn, negated, where=cv.function("pair"))
    assert_close(attached(1.5), fn(1.5))
    assert_close(jax.grad(attached)(1.5), -jax.grad(fn)(1.5))


@jax.custom_vjp
def clipped(x):
    """A function with a derivative of its own."""
    return x


clipped.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -1, 1),))


def test_a_function_with_a_derivative_of_its_own_is_linearised_by_that():
    attached = cv.attach(lambda x: 5 * clipped(x), negated, where=cv.function("clipped"))
    assert_close(jax.grad(attached)(1.0), jnp.float32(-1.0))


def test_names_may_be_globs_and_the_first_pair_wins():
    fn = lambda x: jax.nn.relu(jax.nn.leaky_relu(x))
    attached = cv.attach(fn, where=[(cv.function("leaky_*"), None), (cv.function("*relu"), negated)])
    assert_close(jax.grad(attached)(1.0), jnp.float32(-1.0))
    assert_close(jax.grad(cv.attach(fn, negated, where=cv.function("*relu")))(1.0), jnp.float32(1.0))


def test_modules_and_functions_may_be_chosen_together():
    fn = lambda w, x: jnp.sum(jax.nn.relu(w * x))
    attached = cv.attach(fn, where=[(cv.function("relu"), GuidedBackprop()), (True, negated)])
    found = jax.grad(lambda w, x: jnp.sum(attached(w, x)), argnums=(0, 1))(X, W[0])
    own = jax.grad(lambda w, x: jnp.sum(guided(w * x)), argnums=(0, 1))(X, W[0])
    # The outer rule negates the cotangent before the inner one sees it, which then lets none of it through.
    assert_close(found, jax.tree.map(jnp.zeros_like, own))


def test_a_program_without_a_chosen_function_stays_as_it_is():
    fn = lambda x: jnp.sum(jax.nn.relu(x) ** 2)
    attached = cv.attach(fn, identity, where=cv.function("tanh"), must_match=False)
    assert_same_bits(jax.value_and_grad(attached)(X), jax.value_and_grad(fn)(X))


class LinenNet(nn.Module):
    """A network that makes its variables while it runs."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(jax.nn.relu(nn.Dense(4)(x)))


INITIALISED = {
    "linen": LinenNet(),
    "haiku": hk.transform(lambda x: hk.Linear(3)(jax.nn.relu(hk.Linear(4)(x)))),
}
APPLIED = {"linen": (), "haiku": (None,)}


def test_static_arguments_and_outputs_pass_through_the_rewriting():
    def fn(x, mode, *, scale=1):
        return {"y": scale * jax.nn.relu(x), "mode": mode, "none": None}

    attached = cv.attach(fn, GuidedBackprop(), where=cv.function("relu"))
    out = attached(X, "train", scale=2)
    assert out["mode"] == "train"
    assert out["none"] is None
    assert_close(out["y"], 2 * jax.nn.relu(X))


def test_a_rule_with_traced_fields_is_refused_for_functions():
    class Scaled(cv.Rule):
        factor: Any

        def backward(self, call, y_bar):
            return call.pullback(self.factor * y_bar)

    loss = lambda factor: jnp.sum(cv.attach(jax.nn.relu, Scaled(factor), where=cv.function("relu"))(X))
    assert_close(jax.grad(cv.attach(jax.nn.relu, Scaled(3.0), where=cv.function("relu")))(1.0), jnp.float32(3.0))
    assert_close(
        jax.grad(cv.attach(jax.nn.relu, Scaled(jnp.float32(3.0)), where=cv.function("relu")))(1.0), jnp.float32(3.0)
    )
    with pytest.raises(cv.ArgumentError, match=r"Scaled.*'relu'.*traced fields or a traced key.*concrete"):
        jax.grad(loss)(2.0)


class Noise(cv.Rule):
    """Multiplies the cotangent by noise."""

    linear = False

    def backward(self, call, y_bar):
        """Draws it."""
        return call.pullback(y_bar * jax.random.normal(call.key, y_bar.shape))


def test_a_key_is_another_one_at_each_call_of_a_function_and_the_same_in_each_run():
    fn = lambda x: jnp.stack([jax.nn.relu(x[0]), jax.nn.relu(x[1])])
    attached = cv.attach(fn, Noise(), where=cv.function("relu"), key=jax.random.key(3))
    bars = jax.grad(lambda x: jnp.sum(attached(x)))
    found = bars(jnp.ones((2, 5)))
    assert not jnp.allclose(found[0], found[1])
    assert_close(jax.jit(bars)(jnp.ones((2, 5))), found)


def test_effects_of_a_rewritten_program_happen_once():
    seen = []

    def fn(x):
        jax.debug.callback(seen.append, x)
        return jax.nn.relu(x)

    jax.block_until_ready(cv.attach(fn, GuidedBackprop(), where=cv.function("relu"))(jnp.float32(2.0)))
    jax.effects_barrier()
    assert seen == [2.0]


@pytest.mark.parametrize("name", sorted(INITIALISED))
def test_an_attached_model_makes_its_variables_as_the_plain_one(name):
    model, x = INITIALISED[name], jnp.ones((2, 5))
    variables = model.init(jax.random.key(0), x)
    attached = cv.attach(model, GuidedBackprop(), where=cv.function("relu"))
    assert_same_bits(attached.init(jax.random.key(0), x), variables)
    with pytest.raises(cv.ArgumentError, match="matches nothing in this call"):
        cv.attach(model, GuidedBackprop(), where=cv.function("rleu")).apply(variables, *APPLIED[name], x)


def test_a_function_needs_a_name():
    with pytest.raises(cv.ArgumentError, match="names of functions"):
        cv.function()
    with pytest.raises(cv.ArgumentError, match="names of functions"):
        cv.function(3)  # pyright: ignore[reportArgumentType]
