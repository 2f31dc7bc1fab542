"""Traced values that functions close over: arguments in truth, and an error with their name if differentiated."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from helpers import IMPLEMENTATIONS, custom_vjp_of
from rules import identity, unchanged

import crossvjp as cv
from crossvjp import ArgumentError
from crossvjp.testing import assert_same_bits

W, X = jnp.array([2.0, 3.0]), jnp.array([1.0, -1.0])


@pytest.fixture(params=IMPLEMENTATIONS, autouse=True)
def mode(request):
    """Each implementation of JAX's custom_vjp."""
    with custom_vjp_of(request.param):
        yield request.param


def grad(loss):
    return jax.grad(loss)


def grad_jit(loss):
    return jax.grad(jax.jit(loss))


def jit_grad(loss):
    return jax.jit(jax.grad(loss))


def grad_remat(loss):
    return jax.grad(jax.checkpoint(loss))


def grad_scan(loss):
    return jax.grad(lambda *args: jax.lax.scan(lambda sum, _: (sum + loss(*args), None), 0.0, None, length=2)[0])


each_transform = pytest.mark.parametrize(
    "transform", [grad, grad_jit, jit_grad, grad_remat, grad_scan], ids=lambda transform: transform.__name__
)


class Scaled:
    """A method whose instance is no pytree."""

    def times(self, factor, w, x):
        return jnp.sum(w * x * factor)


def by_cell(factor):
    return lambda w, x: jnp.sum(w * x * factor)


def by_container(factor):
    held = {"all": [factor, "text"]}
    return lambda w, x: jnp.sum(w * x * held["all"][0])


def by_inner_function(factor):
    def scaled(x):
        return x * factor

    return lambda w, x: jnp.sum(w * scaled(x))


def by_partial(factor):
    return functools.partial(lambda factor, w, x: jnp.sum(w * x * factor), factor)


def by_default(factor):
    def scaled(w, x, *, factor=factor):
        return jnp.sum(w * x * factor)

    return lambda w, x: scaled(w, x)


def by_bound_method(factor):
    return functools.partial(Scaled().times, factor)


ROUTES = [by_cell, by_container, by_inner_function, by_partial, by_default, by_bound_method]
each_route = pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.__name__)


def as_rule(fn):
    return identity.lift(fn)


def as_functions(fn):
    return cv.custom_vjp(fn, lambda w, x: cv.vjp(fn, w, x), unchanged)


def as_plain(fn):
    call = cv.custom_vjp(lambda w, x: fn(w, x))
    call.defvjp(lambda w, x: jax.vjp(fn, w, x), lambda pull, y_bar: pull(y_bar))
    return call


each_way = pytest.mark.parametrize("way", [as_rule, as_functions, as_plain], ids=lambda way: way.__name__)


@each_way
@each_transform
@each_route
def test_a_closed_over_value_that_is_not_differentiated_just_works(way, transform, route):
    def loss(w, factor):
        return way(route(factor))(w, X)

    factor = jnp.array([5.0, 7.0])
    assert_same_bits(transform(loss)(W, factor), transform(lambda w, factor: route(factor)(w, X))(W, factor))


NAMES = {
    "by_cell": r"`factor`",
    "by_container": r"`held\['all'\]\['0'\]`",
    "by_inner_function": r"`factor`",
    "by_partial": r"`\w+\['0'\]`|`fn\['0'\]`",
    "by_default": r"`scaled's defaults\['factor'\]`",
    "by_bound_method": r"`\w+\['0'\]`",
}


@each_way
@each_transform
@each_route
def test_a_closed_over_value_that_is_differentiated_is_named(way, transform, route):
    def loss(factor):
        return way(route(factor))(W, X)

    message = rf"({NAMES[route.__name__]}), a float32\[2\], is differentiated.*Pass it as an input"
    with pytest.raises(ArgumentError, match=message):
        transform(loss)(jnp.array([5.0, 7.0]))


@each_transform
def test_a_closed_over_value_of_the_backward_pass_may_be_traced(transform):
    def loss(w, scale):
        rule = cv.rule(lambda call, y_bar: call.pullback(y_bar).replace(variables=scale * y_bar * jnp.ones(2)))
        return rule.lift(lambda w, x: jnp.sum(w * x))(w, X)

    runs = 2 if transform is grad_scan else 1
    assert_same_bits(transform(loss)(W, jnp.array(3.0)), runs * 3.0 * jnp.ones(2))


def test_a_late_run_sees_the_value_of_its_own_call():
    """The cell of a variable that changes holds the last value by the time that JAX runs the forward function."""

    def loss(w, factors):
        factor = factors[0]
        by_factor = lambda w, x: jnp.sum(w * x * factor)
        first = identity.lift(by_factor)(w, X)
        factor = factors[1]
        return first + identity.lift(by_factor)(w, X)

    factors = jnp.array([5.0, 7.0])
    assert_same_bits(jax.grad(jax.jit(loss))(W, factors), X * 12.0)


def test_cells_without_traced_values_are_shared():
    """So that `nonlocal` counts in the user's own variable."""
    count = 0

    def loss(w, factor):
        def fn(w, x):
            nonlocal count
            count += 1
            return jnp.sum(w * x * factor)

        return identity.lift(fn)(w, X)

    jax.jit(loss)(W, jnp.array(2.0))
    assert count > 0


def test_a_function_that_reaches_itself_is_no_endless_search():
    def loss(w, factor):
        def fn(w, x, depth=2):
            return fn(w, x, depth - 1) if depth else jnp.sum(w * x)

        return identity.lift(lambda w, x: fn(w, x) * factor)(w, X)

    assert_same_bits(jax.grad(jax.jit(loss))(W, jnp.array(2.0)), 2 * X)


def test_a_parent_of_which_only_a_setting_is_read_is_no_mistake():
    class Net(nnx.Module):
        def __init__(self):
            self.dense = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
            self.factor = 3.0

        def __call__(self, x):
            return identity.lift(lambda mdl, x: self.factor * mdl(x))(self.dense, x)

    grads = nnx.grad(nnx.jit(lambda net: net(X).sum()))(Net())
    assert_same_bits(grads["dense"]["bias"][...], jnp.full(2, 3.0))


def test_in_plain_jax_the_same_closures_fail():
    """With errors that name nothing, in today's implementation as in the coming one: what this is for."""

    def loss(w, factor):
        fn = by_cell(factor)
        call = jax.custom_vjp(lambda w, x: fn(w, x))
        call.defvjp(lambda w, x: jax.vjp(fn, w, x), lambda pull, y_bar: pull(y_bar))
        return call(w, X)

    with pytest.raises(Exception, match=r"No constant handler|[Tt]racer"):
        jax.grad(jax.jit(loss))(W, jnp.array(2.0))


def test_a_differentiated_attribute_of_what_is_no_pytree_gets_a_hint_beside_the_error_of_jax(mode):
    held: Any = Scaled()

    def product(w, x):
        return jnp.sum(w * x * held.factor)

    def loss(factor):
        held.factor = factor
        return identity.lift(product)(W, X)

    with pytest.raises(jax.errors.JAXTypeError) as caught:
        jax.grad(loss)(jnp.array(2.0))
    assert any("product runs under a rule" in note for note in caught.value.__notes__)
