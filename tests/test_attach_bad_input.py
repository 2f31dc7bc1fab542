"""Mistakes with `attach`: each is an error that says what was expected, what came, and how to mend it."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from models import MODELS, x_of
from rules import identity

import crossvjp as cv
from crossvjp.extend import Ambient, ambient

DENSE = nn.Dense(3)


@pytest.mark.parametrize("model", [3, None, "net", jnp.ones(2), nn.Dense], ids=str)
def test_what_is_no_model_is_named(model):
    with pytest.raises(cv.HandleError, match=r"attached to a Linen module.*or a function, but this is a \w+"):
        cv.attach(model, identity, where=True)


@pytest.mark.parametrize("where", [None, 3, (), ("head", 3), False, {"head": identity}], ids=str)
def test_a_choice_that_means_nothing_is_refused(where):
    with pytest.raises(cv.ArgumentError, match="`where` must be a class, a path glob"):
        cv.attach(DENSE, identity, where=where)


@pytest.mark.parametrize("rule", [None, 3, "sign", type(identity)], ids=str)
def test_a_rule_that_is_none_is_refused(rule):
    with pytest.raises(cv.ArgumentError, match=r"`rule` must be a crossvjp.Rule or a function"):
        cv.attach(DENSE, rule, where=True)


def test_pairs_are_checked():
    with pytest.raises(cv.ArgumentError, match=r"pairs .*which name the rules, but `rule` is given too"):
        cv.attach(DENSE, identity, where=[("*", identity)])
    with pytest.raises(cv.ArgumentError, match="empty list"):
        cv.attach(DENSE, where=[])
    with pytest.raises(cv.ArgumentError, match=r"must hold pairs.*but holds '\*'. Choices of which any.*tuple"):
        cv.attach(DENSE, where=["*", "head"])
    with pytest.raises(cv.ArgumentError, match="must hold pairs"):
        cv.attach(DENSE, where=[("*", 3)])


@pytest.mark.parametrize("methods", [(), 3, [3]], ids=str)
def test_methods_are_names(methods):
    with pytest.raises(cv.ArgumentError, match="`methods` must be names"):
        cv.attach(DENSE, identity, where=True, methods=methods)


def test_a_function_in_the_place_of_a_rule_must_return_one():
    rule: Any = lambda path, module: "sign"
    with pytest.raises(
        cv.ArgumentError, match=r"must return a rule or None, but for the model itself it returned 'sign'"
    ):
        cv.attach(DENSE, rule, where=True).init(jax.random.key(0), jnp.ones(2))


class Inside(nn.Module):
    """Attaches where it is too late."""

    @nn.compact
    def __call__(self, x):
        return cv.attach(nn.Dense(3), identity, where=True)(x)


def test_attaching_inside_of_a_linen_module_says_where_to_do_it():
    with pytest.raises(cv.HandleError, match=r"before it is bound.*Attach outside, or put the rule on it here"):
        Inside().init(jax.random.key(0), jnp.ones(2))
    bound = DENSE.bind(DENSE.init(jax.random.key(0), jnp.ones(2)))
    with pytest.raises(cv.HandleError, match="belongs to variables or to a parent module"):
        cv.attach(bound, identity, where=True)


def test_attaching_inside_of_a_haiku_transform_says_where_to_do_it():
    def net(x):
        return cv.attach(hk.Linear(3), identity, where=True)(x)

    with pytest.raises(
        cv.HandleError, match=r"Haiku module linear belongs to a transform.*hk.transform.*rule\(module\)\(x\)"
    ):
        hk.transform(net).init(jax.random.key(0), jnp.ones(2))


class Table(eqx.Module):
    """A module that is no function."""

    values: jax.Array


class Lookup(eqx.Module):
    """A model with one of those."""

    table: Table

    def __call__(self, index):
        return self.table.values[index]


def test_a_class_that_can_not_be_intercepted_is_named():
    model = Lookup(Table(x_of(3)))
    with pytest.raises(cv.ArgumentError, match=r"chooses 'table' of class Table, which has no method"):
        cv.attach(model, identity, where=Table)
    with pytest.raises(cv.ArgumentError, match=r"'table' of class Table, which has no method"):
        cv.attach(model, identity, where="table")
    cv.attach(model, identity, where=True)  # what can be wrapped is


def test_nothing_is_left_behind_when_a_model_fails():
    model = cv.attach(lambda x: jnp.dot(x, jnp.ones(3)), identity, where=True)
    with pytest.raises(TypeError, match="dot"):
        model(jnp.ones(2))
    made = MODELS["linen"]()
    failing = cv.attach(made.model, identity, where=True)
    with pytest.raises(Exception, match=r"shape"):
        failing.apply({"params": made.params}, jnp.ones((4, 3)))
    assert ambient() == Ambient()


def test_sites_of_what_is_no_model():
    with pytest.raises(cv.HandleError, match="but this is a int"):
        cv.sites(3)


def test_an_attached_nnx_model_has_variables_of_its_own():
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    attached = cv.attach(model, identity, where=True)
    attached.kernel[...] = jnp.zeros((2, 3))
    assert float(jnp.abs(model.kernel[...]).sum()) > 0
