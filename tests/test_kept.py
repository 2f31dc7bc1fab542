"""What a rule keeps for its backward pass: what that depends on, and nothing else."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import is_coming
from memory_use import kept_bytes

import crossvjp as cv

X, W = jnp.ones((64, 32)), jnp.ones((32, 16))
Y_BYTES = 64 * 16 * 4


def layer(w, x):
    return jnp.tanh(x @ w)


def under(backward):
    return cv.rule(backward).lift(layer)


def relinearized(call, y_bar):
    return call.vjp_at(call.variables, *call.inputs)[1](y_bar)


def of_output(call, y_bar):
    slope = 1 - call.output**2
    (x,) = call.inputs
    return (y_bar * slope) @ call.variables.T, x.T @ (y_bar * slope)


CASES = {
    "the module's pullback": (lambda call, y_bar: call.pullback(y_bar), kept_bytes(layer, W, X)),
    "variables and inputs": (relinearized, 0),
    "the output": (of_output, Y_BYTES),
    "nothing": (lambda call, y_bar: cv.Cotangents((None,), None), 0),
}


@pytest.mark.parametrize("case", CASES)
def test_only_what_the_backward_pass_depends_on_is_kept(case):
    backward, expected = CASES[case]
    assert kept_bytes(under(backward), W, X) == expected


def test_what_is_dead_in_the_backward_pass_is_not_kept():
    def backward(call, y_bar):
        _ = jnp.sum(call.output) + jnp.sum(call.pullback(y_bar).variables)
        return relinearized(call, y_bar)

    assert kept_bytes(under(backward), W, X) == 0
    expected = jax.grad(lambda w: jnp.sum(layer(w, X)))(W)
    np.testing.assert_allclose(jax.jit(jax.grad(lambda w: jnp.sum(under(backward)(w, X))))(W), expected, rtol=1e-6)


def test_the_pullback_keeps_only_what_the_cotangents_depend_on_that_are_used():
    both = lambda w, x: (x @ w) * jnp.sin(w).sum()
    frozen = cv.rule(lambda call, y_bar: call.pullback(y_bar).replace(variables=None)).lift(both)
    assert kept_bytes(lambda x: frozen(W, x), X) < kept_bytes(cv.rule(lambda c, y: c.pullback(y)).lift(both), W, X)
    np.testing.assert_allclose(
        jax.jit(jax.grad(lambda x: jnp.sum(frozen(W, x))))(X),
        jax.grad(lambda x: jnp.sum(both(W, x)))(X),
        rtol=1e-5,  # a sum of 512 terms, which the compiler may reorder
    )


def test_a_cotangent_that_is_used_by_way_of_another_is_kept_although_its_input_is_not_differentiated():
    def backward(call, y_bar):
        bar = call.pullback(y_bar)
        return bar.replace(variables=bar.variables * jnp.linalg.norm(bar.inputs[0]))

    expected_x, expected_w = jax.grad(lambda x, w: jnp.sum(layer(w, x) ** 2), argnums=(0, 1))(X / 9, W)
    found = jax.jit(jax.grad(lambda w: jnp.sum(under(backward)(w, X / 9) ** 2)))(W)
    np.testing.assert_allclose(found, expected_w * jnp.linalg.norm(expected_x), rtol=1e-5)


def test_a_value_that_only_steers_what_the_pullback_is_given_is_kept():
    class Mixed(cv.Rule):
        matrix: Any = None

        def backward(self, call, y_bar):
            return call.pullback(y_bar @ self.matrix)

    matrix = jnp.arange(256.0).reshape(16, 16)
    found = jax.jit(jax.grad(lambda w: jnp.sum(Mixed(matrix).lift(layer)(w, X / 9))))(W)
    expected = jax.vjp(layer, W, X / 9)[1](jnp.ones((64, 16)) @ matrix)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_eagerly_everything_that_is_looked_at_is_what_it_is():
    seen = {}

    def backward(call, y_bar):
        seen.update(output=call.output, w=call.variables, x=call.inputs[0], x_bar=call.pullback(y_bar).inputs[0])
        return cv.Cotangents((None,), y_bar.sum() * jnp.ones_like(W))

    jax.grad(lambda w: jnp.sum(under(backward)(w, X)))(W)
    np.testing.assert_array_equal(seen["output"], layer(W, X))
    np.testing.assert_array_equal(seen["w"], W)
    np.testing.assert_array_equal(seen["x"], X)
    np.testing.assert_array_equal(seen["x_bar"], jax.grad(lambda x: jnp.sum(layer(W, x)))(X))


def test_what_is_printed_from_a_compiled_program_is_kept(capfd):
    def backward(call, y_bar):
        jax.debug.print("output {}", call.output[0, 0])
        return call.pullback(y_bar)

    jax.block_until_ready(jax.jit(jax.grad(lambda w: jnp.sum(under(backward)(w, X / 64))))(W))
    jax.effects_barrier()
    assert f"output {layer(W, X / 64)[0, 0]}" in capfd.readouterr().out


def test_a_rule_that_branches_on_values_keeps_everything_and_works_eagerly():
    def backward(call, y_bar):
        bar = call.pullback(y_bar)
        return bar.replace(variables=bar.variables / 2) if float(jnp.linalg.norm(bar.variables)) > 1 else bar

    found = jax.grad(lambda w: jnp.sum(under(backward)(w, X / 64)))(W)
    np.testing.assert_allclose(found, jax.grad(lambda w: jnp.sum(layer(w, X / 64)))(W) / 2, rtol=1e-6)


def without_derivative(w, x):
    shape = jax.ShapeDtypeStruct((64, 16), jnp.float32)
    return jax.pure_callback(lambda w, x: np.tanh(np.asarray(x) @ np.asarray(w)), shape, w, x)


def test_a_function_without_a_derivative_may_stand_under_a_rule_that_does_not_ask_for_it():
    y = jnp.tanh(X @ W)
    found = jax.grad(lambda w: jnp.sum(cv.rule(of_output).lift(without_derivative)(w, X)))(W)
    np.testing.assert_allclose(found, X.T @ (1 - y**2), rtol=1e-6)


def test_a_function_without_a_derivative_is_an_error_of_jax_where_the_rule_asks_for_it():
    own = cv.rule(lambda call, y_bar: call.pullback(y_bar))
    with pytest.raises(ValueError, match="Pure callbacks do not support JVP"):
        jax.grad(lambda w: jnp.sum(own.lift(without_derivative)(w, X)))(W)


def two(w, x):
    return {"a": w * x, "b": w + x}


def test_an_output_that_nothing_depends_on_has_no_cotangent_so_that_a_norm_makes_no_nan():
    normal = cv.rule(lambda call, y_bar: call.pullback(jax.tree.map(lambda c: c / jnp.linalg.norm(c), y_bar)))
    found = jax.grad(lambda w: jnp.sum(normal.lift(two)(w, 2 * jnp.ones(4))["a"]))(jnp.ones(4))
    expected = jnp.nan if is_coming() else 1.0  # the coming one has no symbolic zeros
    np.testing.assert_allclose(found, expected * jnp.ones(4), rtol=1e-6)


def test_a_rule_that_says_so_gets_zeros_there():
    mixed = cv.rule(
        lambda call, y_bar: call.pullback({"a": y_bar["a"] + y_bar["b"], "b": y_bar["b"]}), symbolic_zeros=False
    )
    found = jax.grad(lambda w: jnp.sum(mixed.lift(two)(w, 2 * jnp.ones(4))["a"]))(jnp.ones(4))
    np.testing.assert_allclose(found, 2 * jnp.ones(4), rtol=1e-6)


def test_arithmetic_with_a_missing_cotangent_is_an_error_that_says_how_to_get_zeros():
    wrong = cv.rule(lambda call, y_bar: call.pullback({"a": 2 * y_bar["a"], "b": 2 * y_bar["b"]}))
    run = jax.grad(lambda w: jnp.sum(wrong.lift(two)(w, jnp.ones(4))["a"]))
    if is_coming():  # it has zeros there
        np.testing.assert_array_equal(run(jnp.ones(4)), 2 * jnp.ones(4))
        return
    with pytest.raises(TypeError) as caught:
        run(jnp.ones(4))
    assert "symbolic_zeros = False" in caught.value.__notes__[0]


def test_a_rule_that_needs_more_where_a_cotangent_is_missing_is_an_error_and_no_zero():
    def backward(call, y_bar):
        if y_bar["b"] is None:
            return (call.output["b"] * y_bar["a"], call.variables * y_bar["a"])
        return call.pullback(y_bar)

    wrong = cv.rule(backward).lift(two)
    run = jax.jit(jax.grad(lambda w: jnp.sum(wrong(w, jnp.ones(4))["a"])))
    if is_coming():  # it has zeros there, and so this rule a pullback
        np.testing.assert_array_equal(run(jnp.ones(4)), jnp.ones(4))
        return
    with pytest.raises(cv.ArgumentError, match=r"needs float32\[4\] of its .* only where part of `y_bar` is None"):
        run(jnp.ones(4))


def test_a_mutable_array_among_the_rules_fields_is_written_in_a_loop():
    class Counts(cv.Rule):
        count: Any = None

        def backward(self, call, y_bar):
            self.count[...] += 1
            return call.pullback(y_bar)

    count = jax.new_ref(jnp.zeros(()))
    loop = lambda w: jax.lax.scan(lambda c, _: (Counts(count).lift(lambda w, c: w * c)(w, c), None), w, None, length=3)[
        0
    ]
    jax.block_until_ready(jax.jit(jax.grad(loop))(2.0))
    assert count[...] == 3
