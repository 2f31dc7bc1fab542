"""`crossvjp.custom_vjp(f)` against `jax.custom_vjp(f)`, case by case, under either implementation of the latter.

Where ours is different on purpose, a test here says so:

| use | JAX | ours |
|---|---|---|
| leaves that are no arrays, in arguments, outputs, residuals | `TypeError` | as they are |
| keyword-only arguments | `TypeError` | with their own derivative |
| traced arrays in `nondiff_argnums` | `UnexpectedTracerError` | without a gradient |
| a traced value closed over, not differentiated, run late | `UnexpectedTracerError` | allowed |
| a cotangent of another dtype than its primal | kept, or an error in `scan` | cast |
| `nondiff_argnums=1` | `TypeError` | `(1,)` |
| a decorated method of an object | not bound | bound |
| a module as an argument | no valid type, or its state leaks | `HandleError`, with what to do |
| a cotangent that is a prefix of its argument's tree | spread | error |
| a complex cotangent of a real argument | kept | error |
| unknown or keyword-only names in `nondiff_argnames`, negative `nondiff_argnums` | taken, without meaning | error |
| `custom_vjp(3)`, `defvjp(fwd, None)` | taken, an error later or never | error |
| a Python number in a call without any transform | passed through | an array |
| `symbolic_zeros` with `optimize_remat` | `NotImplementedError` | `ArgumentError` |
| `nondiff_argnums` out of range | `IndexError` | `ArgumentError` |
| a value closed over and differentiated | `UnexpectedTracerError` | `ArgumentError` that names it |
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import plain_cases_transforms
import plain_cases_values
import plain_cases_zeros
import pytest
from jax import lax
from plain_cases import CASES, X, Y, both, by_jax, describe, grad, grad_with, made, mode, product

import crossvjp

assert mode  # a fixture
assert all((plain_cases_transforms, plain_cases_values, plain_cases_zeros))  # they add to CASES


@pytest.mark.parametrize("name", CASES)
def test_results_and_calls_are_those_of_jax(mode, name):
    expected_calls: list[Any] = []
    calls: list[Any] = []
    expected = by_jax(CASES[name], expected_calls)
    got = CASES[name](crossvjp.custom_vjp, calls)
    # The coming implementation compiles what is called eagerly, so that it runs at other times and gives
    # no NumPy arrays, and has no symbolic zeros.
    exactly = mode == "today"
    assert describe(got, exactly=exactly) == describe(expected, exactly=exactly)
    assert not exactly or calls == expected_calls


class Beyond(NamedTuple):
    """A use that JAX refuses, and what ours gives."""

    use: Callable[[Any], Any]
    expected: Any
    refusal: type[Exception]
    match: str


def with_labels(custom_vjp: Any) -> Any:
    """Keeps strings, a function and an object among arguments, outputs and residuals."""
    mark = object()

    def fun(x, how):
        return how["f"](x) * 2, how["name"]

    def bwd(kept, g):
        x, name, function, kept_mark = kept
        assert (name, function, kept_mark is mark, g[1]) == ("twice", jnp.negative, True, None)
        return 3 * function(x) * g[0], None

    rule = custom_vjp(fun)
    rule.defvjp(lambda x, how: (fun(x, how), (x, how["name"], how["f"], mark)), bwd)
    loss = lambda x: (rule(x, {"f": jnp.negative, "name": "twice"})[0].sum(), "aux")
    assert rule(X, {"f": jnp.negative, "name": "twice"})[1] == "twice"
    return jax.grad(loss, has_aux=True)(X)[0], jax.vmap(jax.grad(lambda x: loss(x)[0]))(X)


def with_a_static_residual(custom_vjp: Any, residual: Any) -> Any:
    rule = custom_vjp(lambda x: x)
    rule.defvjp(lambda x: (x, (x, residual)), lambda kept, g: (kept[1](kept[0]) * g,))
    grad = jax.grad(lambda x: lax.scan(lambda c, _: (rule(c), None), x, None, length=1)[0].sum())
    return grad(X), jax.grad(lambda x: jax.checkpoint(jax.jit(rule))(x).sum())(X)


def with_a_keyword_only_argument(custom_vjp: Any) -> Any:
    def fun(x, *, scale):
        return x * scale

    rule = custom_vjp(fun)
    rule.defvjp(lambda x, *, scale: (x * scale, scale), lambda scale, g: (3 * g * scale,))
    grad = jax.grad(lambda x, scale: rule(x, scale=scale).sum(), (0, 1))
    return grad(X, Y), jax.jit(grad)(X, Y)


def with_a_traced_array_without_gradient(custom_vjp: Any) -> Any:
    rule = custom_vjp(lambda k, x: k * x, nondiff_argnums=(0,))
    rule.defvjp(lambda k, x: (k * x, None), lambda k, _, g: (3 * g * k,))
    grad = jax.grad(lambda k, x: rule(k, x).sum(), (0, 1))
    return grad(Y, X), jax.jit(grad)(Y, X), jax.vmap(grad)(Y, X)


def closing(custom_vjp: Any, around: Callable[[Any], Any]) -> Any:
    def loss(x, k):
        rule = custom_vjp(lambda x: k * x)
        rule.defvjp(lambda x: (k * x, k), lambda kept, g: (2 * g * kept + k,))
        return rule(x).sum()

    return jax.grad(lambda x: around(loss)(x, Y))(X)


def scanned_over(loss: Any) -> Any:
    return lambda x, k: lax.scan(lambda total, xk: (total + loss(*xk), None), 0.0, (x, k))[0]


def in_lower_precision(custom_vjp: Any, step: Callable[[Any, Any, Any], Any]) -> Any:
    rule = custom_vjp(lambda x: x * 2)
    rule.defvjp(lambda x: (x * 2, None), lambda _, g: (3 * g.astype(jnp.float32),))
    x = X.astype(jnp.bfloat16)
    return jax.grad(lambda x: lax.scan(lambda c, _: (step(rule, c, x), None), x, None, length=2)[0].sum())(x)


class Scale:
    """Something with a method that a test decorates."""

    def scale(self, x):
        return 2 * x


def bound_to_an_object(custom_vjp: Any) -> Any:
    rule = custom_vjp(Scale.scale, nondiff_argnums=(0,))
    rule.defvjp(lambda self, x: (2 * x, None), lambda self, _, g: (7 * g,))
    layer = type("Layer", (Scale,), {"scale": rule})()
    return layer.scale(X), jax.grad(lambda x: layer.scale(x).sum())(X)


ONE = jnp.ones(3)
LATE = "Encountered an unexpected tracer"
BEYOND = {
    "labels": Beyond(with_labels, (-3 * X, -3 * X), TypeError, "not a valid JAX type"),
    "a_function_as_residual": Beyond(
        lambda custom_vjp: with_a_static_residual(custom_vjp, lambda x: 3 * x),
        (3 * X, 3 * X),
        TypeError,
        "not a valid JAX type",
    ),
    "keyword_only": Beyond(with_a_keyword_only_argument, ((3 * Y, X),) * 2, TypeError, "could not be resolved"),
    "traced_without_gradient": Beyond(
        with_a_traced_array_without_gradient,
        ((0 * ONE, 3 * Y),) * 3,
        jax.errors.UnexpectedTracerError,
        "nondiff_argnums",
    ),
    "closed_over_in_jit": Beyond(
        functools.partial(closing, around=jax.jit), 3 * Y, TypeError, "No constant handler for type"
    ),
    "closed_over_in_remat": Beyond(
        functools.partial(closing, around=jax.checkpoint), 3 * Y, jax.errors.UnexpectedTracerError, LATE
    ),
    "closed_over_in_scan": Beyond(
        functools.partial(closing, around=scanned_over), 3 * Y, jax.errors.UnexpectedTracerError, LATE
    ),
    "bfloat16_carried_by_a_scan": Beyond(
        lambda custom_vjp: in_lower_precision(custom_vjp, lambda rule, c, x: rule(c)),
        (9 * ONE).astype(jnp.bfloat16),
        TypeError,
        "must have equal types",
    ),
    "bfloat16_that_a_scan_closes_over": Beyond(
        lambda custom_vjp: in_lower_precision(custom_vjp, lambda rule, c, x: c + rule(x)),
        (7 * ONE).astype(jnp.bfloat16),
        AssertionError,
        "bfloat16",
    ),
    "a_method_of_an_object": Beyond(bound_to_an_object, (2 * X, 7 * ONE), TypeError, "missing a required argument"),
    "one_position_as_a_number": Beyond(
        lambda custom_vjp: grad(
            made(custom_vjp, bwd=lambda y, kept, g: (g,), fwd=lambda x, y: (x, None), nondiff_argnums=1)
        ),
        (ONE, {"w": 0 * ONE}),
        TypeError,
        "not iterable",
    ),
}


@pytest.mark.parametrize("name", BEYOND)
def test_jax_refuses_what_ours_goes_beyond(name):
    with pytest.raises(BEYOND[name].refusal, match=BEYOND[name].match):
        by_jax(BEYOND[name].use)


@pytest.mark.parametrize("name", BEYOND)
def test_ours_does_what_jax_refuses(mode, name):
    got = BEYOND[name].use(crossvjp.custom_vjp)
    assert describe(got, exactly=False) == describe(BEYOND[name].expected, exactly=False)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.int32])
def test_a_cotangent_of_another_dtype_is_cast_where_jax_leaves_it(mode, dtype):
    use = grad_with(bwd=lambda kept, g: (2 * g.astype(dtype), None))
    assert by_jax(use)[0].dtype == dtype
    assert describe(use(crossvjp.custom_vjp)[0]) == describe(2 * ONE)


def test_a_python_number_without_a_transform_is_an_array_where_jax_leaves_it(mode):
    assert type(by_jax(product, [])(2.0, 3.0)) is float
    assert describe(product(crossvjp.custom_vjp, [])(2.0, 3.0)) == describe(jnp.asarray(6.0))
    assert isinstance(product(crossvjp.custom_vjp, [])(2.0, 3.0), jax.Array)


def test_a_wrong_rule_differs_from_that_of_jax():
    """What the comparison of cases would miss, nothing here would find."""
    one, other = both(product(crossvjp.custom_vjp, []))(X, Y), both(lambda x, y: x * y)(X, Y)
    assert describe(one) != describe(other)
    assert describe(X) != describe(np.asarray(X))
    assert describe(jnp.float32(2)) != describe(2.0)
