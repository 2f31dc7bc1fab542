"""Traced programs are the same where they compute the same by the same operations, and only there."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters import partial_eval

from crossvjp._arrays import ArrayType
from crossvjp._programs import is_closed, program_of, same_program

TYPES = [ArrayType.of(jnp.ones((2, 3))), ArrayType.of(jnp.ones((3,)))]


def traced(function, types=TYPES):
    return program_of(lambda leaves: [function(*leaves)], types)


@jax.jit
def inner(x, y):
    return x * y


@jax.custom_jvp
def own(x):
    return 2 * x


own.defjvp(lambda primals, tangents: (own(*primals), 2 * tangents[0]))


def with_second_derivative(factor):
    """A function whose derivative is alike, but not the derivative of that."""
    made = jax.custom_jvp(lambda x: x)
    made.defjvp(lambda primals, tangents: (made(*primals), with_jvp(factor)(primals[0]) * tangents[0]))
    return made


def with_jvp(factor, symbolic_zeros=False):
    """A function whose derivative is another one."""
    made = jax.custom_jvp(lambda x: x)
    made.defjvp(lambda primals, tangents: (made(*primals), factor * tangents[0]), symbolic_zeros=symbolic_zeros)
    return made


@jax.custom_vjp
def with_vjp(x):
    return 2 * x


with_vjp.defvjp(lambda x: (with_vjp(x), None), lambda _, bar: (3 * bar,))


SAME = {
    "a derivative of its own": lambda x, y: own(x) * y,
    "derivatives that are alike": lambda x, y: with_jvp(2.0)(x) * y,
    "relu": lambda x, y: jax.nn.relu(jnp.stack([x[0], y])),
    "one operation": lambda x, y: x + y,
    "a literal": lambda x, y: x * 0.5 - y,
    "a jitted function": lambda x, y: inner(x, y) + inner(x, y),
    "a loop": lambda x, y: jax.lax.fori_loop(0, 3, lambda i, x: x * y, x),
    "a branch": lambda x, y: jax.lax.cond(y[0] > 0, lambda x: x, lambda x: -x, x),
    "a random number": lambda x, y: x + jax.random.normal(jax.random.key(0), x.shape) * y,
}


@pytest.mark.parametrize("function", SAME.values(), ids=SAME)
def test_what_is_traced_again_is_the_same(function):
    one, other = traced(function), traced(lambda *leaves: function(*leaves))
    assert one is not other
    assert is_closed(one)
    assert same_program(one, other)


@pytest.mark.parametrize("function", SAME.values(), ids=SAME)
def test_a_jax_that_traces_in_another_way_gives_the_same_programs(function, monkeypatch):
    one = traced(function)
    monkeypatch.delattr(partial_eval, "trace_to_jaxpr_dynamic")  # an upgrade without it fails here: tracing is slower
    assert same_program(one, traced(function))


DIFFERENT = {
    "the operation": (lambda x, y: x + y, lambda x, y: x - y),
    "the order of operands": (lambda x, y: x - y, lambda x, y: y - x),
    "which operand": (lambda x, y: x + x * y, lambda x, y: x + x * x),
    "a literal": (lambda x, y: x * 0.5, lambda x, y: x * 0.25),
    "the sign of a zero": (lambda x, y: x + 0.0, lambda x, y: x + -0.0),
    "the last bit of a literal": (lambda x, y: x * np.float32(1), lambda x, y: x * np.nextafter(np.float32(1), 2)),
    "a literal array": (lambda x, y: x * jnp.float32(1), lambda x, y: x * jnp.nextafter(jnp.float32(1), 2)),
    "a parameter": (lambda x, y: x.sum(0), lambda x, y: x.sum(1)),
    "the output": (lambda x, y: (x + y, x * y)[0], lambda x, y: (x + y, x * y)[1]),
    "the length": (lambda x, y: x, lambda x, y: -x),
    "inside a jitted function": (jax.jit(lambda x, y: x * y), jax.jit(lambda x, y: x + y)),
    "inside a loop": (
        lambda x, y: jax.lax.fori_loop(0, 3, lambda i, x: x * y, x),
        lambda x, y: jax.lax.fori_loop(0, 3, lambda i, x: x + y, x),
    ),
    "a derivative of its own": (lambda x, y: with_jvp(2.0)(x), lambda x, y: with_jvp(3.0)(x)),
    "a second derivative": (lambda x, y: with_second_derivative(2.0)(x), lambda x, y: with_second_derivative(3.0)(x)),
    "with a derivative of its own, and none": (lambda x, y: with_jvp(1.0)(x), lambda x, y: x),
    "a seed": (
        lambda x, y: x + jax.random.normal(jax.random.key(0), x.shape),
        lambda x, y: x + jax.random.normal(jax.random.key(1), x.shape),
    ),
}


@pytest.mark.parametrize(("one", "other"), DIFFERENT.values(), ids=DIFFERENT)
def test_a_difference_is_seen(one, other):
    assert not same_program(traced(one), traced(other))


def test_types_are_compared():
    wider = [TYPES[0], ArrayType.of(jnp.ones((1,)))]
    assert not same_program(traced(lambda x, y: x + y), traced(lambda x, y: x + y, wider))


@pytest.mark.parametrize(
    "function",
    [lambda x, y: x + jnp.arange(3.0) @ np.ones((3, 3), np.float32), lambda x, y: jax.debug.print("{}", x) or x],
    ids=["a constant", "an effect"],
)
def test_what_depends_on_more_than_its_arguments_is_not_closed_and_like_nothing(function):
    one, other = traced(function), traced(lambda *leaves: function(*leaves))
    assert not is_closed(one)
    assert not same_program(one, other)


@pytest.mark.parametrize(
    "function",
    [lambda x, y: with_vjp(x), lambda x, y: with_jvp(2.0, symbolic_zeros=True)(x)],
    ids=["custom_vjp", "symbolic zeros"],
)
def test_what_cannot_be_compared_counts_as_different(function):
    one, other = traced(function), traced(lambda *leaves: function(*leaves))
    assert is_closed(one)
    assert not same_program(one, other)
