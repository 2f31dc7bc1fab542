"""Which layer is which: order of calls, names, mapping, arrays of no layer, shared and stacked layers."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import crossvjp as cv
from crossvjp.adapters.haiku import bind
from crossvjp.migration import MigrationError
from crossvjp.testing import assert_same_bits

X = jax.random.normal(jax.random.key(1), (5, 4))


def linen(function: Any, x: Any = X) -> nn.Module:
    """Makes a Linen module of a function of modules, not bound."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return function(self, x)

    return Net()


def bound(function: Any, x: Any = X) -> nn.Module:
    """Makes a bound Linen module."""
    net = linen(function)
    return net.bind(jax.jit(net.init)(jax.random.key(0), x))


def haiku(function: Any, x: Any = X) -> Any:
    """Makes a bound Haiku function."""
    net = hk.transform(function)
    return bind(net, jax.jit(net.init)(jax.random.key(0), x))


def pairs_of(made: Any) -> dict[str, str]:
    """Lists which layer went where."""
    return {layer.source: layer.target for layer in made.report.layers}


def test_layers_that_are_alike_are_paired_by_the_order_of_their_calls():
    source = haiku(lambda x: hk.nets.MLP([4, 4, 4])(x))

    def three(_: Any, x: Any) -> Any:
        for _ in range(3):
            x = nn.Dense(4)(nn.relu(x))
        return x

    made = cv.migrate(source, linen(three), X, prove=False)
    assert pairs_of(made) == {
        "mlp/~/linear_0": "Dense_0",
        "mlp/~/linear_1": "Dense_1",
        "mlp/~/linear_2": "Dense_2",
    }
    kernel = source.params["mlp/~/linear_1"]["w"]
    assert_same_bits(made.variables["params"]["Dense_1"]["kernel"], kernel)


def branches(first: str, second: str, dense: Any) -> Any:
    """Makes a function with two branches, called in a given order."""

    def function(*args: Any) -> Any:
        x = args[-1]
        made = {name: dense(name)(x) for name in (first, second)}
        return made["left"] * jnp.tanh(made["right"])

    return function


def test_names_that_speak_against_the_order_of_calls_make_an_error_that_a_mapping_resolves():
    source = haiku(branches("left", "right", lambda name: hk.Linear(4, name=name)))
    target = linen(branches("right", "left", lambda name: nn.Dense(4, name=name)))
    with pytest.raises(MigrationError, match="'left' has two candidates: 'right' by the order of calls, 'left' by its"):
        cv.migrate(source, target, X)
    made = cv.migrate(source, target, X, mapping={"left": "left", "right": "right"}, prove=False)
    assert pairs_of(made) == {"left": "left", "right": "right"}


def test_a_wrong_mapping_does_not_pass_the_proof():
    source = haiku(branches("left", "right", lambda name: hk.Linear(4, name=name)))
    target = linen(branches("right", "left", lambda name: nn.Dense(4, name=name)))
    with pytest.raises(MigrationError, match=r"don't compute the same(.|\n)*outputs +\d.*FAILS"):
        cv.migrate(source, target, X, mapping={"left": "right", "right": "left"})


def test_where_the_order_of_different_layers_differs_names_decide_among_those_that_are_alike():
    def block(norm: Any, dense: Any, is_shortcut_first: bool) -> Any:
        def function(*args: Any) -> Any:
            x = args[-1]
            shortcut = lambda: norm("shortcut_norm")(dense("shortcut")(x[:, :2]))
            one = shortcut() if is_shortcut_first else None
            y = norm("norm")(dense("dense")(x))
            return y + (shortcut() if one is None else one)

        return function

    source = haiku(block(lambda name: hk.LayerNorm(-1, True, True, name=name), lambda n: hk.Linear(3, name=n), True))
    norm = lambda name: nn.LayerNorm(epsilon=1e-5, name=name)
    target = linen(block(norm, lambda name: nn.Dense(3, name=name), False))
    made = cv.migrate(source, target, X, prove=False)
    assert pairs_of(made) == {name: name for name in ("shortcut", "shortcut_norm", "dense", "norm")}
    unnamed = linen(block(lambda name: nn.LayerNorm(epsilon=1e-5), lambda name: nn.Dense(3), False))
    with pytest.raises(MigrationError, match="has 2 candidates that are alike, 'LayerNorm_0', 'LayerNorm_1'"):
        cv.migrate(source, unnamed, X)


def test_parameters_of_no_known_layer_are_paired_by_shape_and_name():
    def own(mdl: Any, x: Any) -> Any:
        y = x + mdl.param("position", nn.initializers.normal(), (4,)) * mdl.param("gain", nn.initializers.ones, (4,))
        return nn.Dense(2)(y) * mdl.param("scale", nn.initializers.ones, ())

    def other(x: Any) -> Any:
        make = lambda name, shape: hk.get_parameter(name, shape, init=hk.initializers.RandomNormal())
        return hk.Linear(2)(x + make("position", (4,)) * make("gain", (4,))) * make("temperature", ())

    made = cv.migrate(haiku(other), linen(own), X, prove=False)
    assert pairs_of(made) == {
        "linear": "Dense_0",
        "~/position": "position",
        "~/gain": "gain",
        "~/temperature": "scale",
    }


def test_a_layer_that_is_called_twice_is_moved_once():
    def twice(dense: Any) -> Any:
        return lambda *args: (layer := dense())(jnp.tanh(layer(args[-1])))

    made = cv.migrate(haiku(twice(lambda: hk.Linear(4))), linen(twice(lambda: nn.Dense(4))), X, prove=False)
    assert pairs_of(made) == {"linear": "Dense_0"}


def test_a_layer_that_is_left_behind_on_purpose_may_be():
    source = haiku(lambda x: (hk.Linear(3, name="kept")(x), hk.Linear(2, name="head")(x))[0])
    made = cv.migrate(source, linen(lambda _, x: nn.Dense(3)(x)), X, mapping={"head": None}, prove=False)
    assert pairs_of(made) == {"kept": "Dense_0"}


class Residual(nn.Module):
    """A step of a loop over stacked layers."""

    @nn.compact
    def __call__(self, x, _):
        return x + jnp.tanh(nn.Dense(4)(x)), None


def linen_stack(_: Any, x: Any) -> Any:
    """Three layers under `nn.scan`."""
    loop = nn.scan(Residual, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
    return loop()(x, None)[0]


def haiku_stack(x: Any) -> Any:
    """Three layers under `hk.layer_stack`."""
    return hk.layer_stack(3)(lambda x: x + jnp.tanh(hk.Linear(4)(x)))(x)


class NnxStack(nnx.Module):
    """Three layers under `nnx.scan`."""

    def __init__(self):
        make = nnx.split_rngs(splits=3)(nnx.vmap(lambda rngs: nnx.Linear(4, 4, rngs=rngs)))
        self.dense = make(nnx.Rngs(0))

    def __call__(self, x):
        return nnx.scan(lambda x, dense: x + jnp.tanh(dense(x)), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(
            x, self.dense
        )


class EquinoxStack(eqx.Module):
    """Three layers under `jax.lax.scan`."""

    dense: eqx.nn.Linear

    def __init__(self):
        self.dense = eqx.filter_vmap(lambda key: eqx.nn.Linear(4, 4, key=key))(jax.random.split(jax.random.key(0), 3))

    def __call__(self, x):
        return jax.lax.scan(lambda x, dense: (x + jnp.tanh(jax.vmap(dense)(x)), None), x, self.dense)[0]


@pytest.mark.parametrize(
    "target", [lambda: linen(linen_stack), lambda: hk.transform(haiku_stack), NnxStack, EquinoxStack]
)
def test_layers_that_are_stacked_for_a_loop_move_as_they_are(target):
    source = haiku(haiku_stack)
    made = cv.migrate(source, target(), X, steps=0)
    assert made.report.proved
    gradients = made.cotangents(source.params)
    assert sorted(leaf.shape for leaf in jax.tree.leaves(gradients)) == [(3, 4), (3, 4, 4)]


def test_a_stack_does_not_become_layers_that_stand_alone():
    target = linen(lambda _, x: nn.Dense(4)(nn.Dense(4)(nn.Dense(4)(x))))
    with pytest.raises(MigrationError, match="are stacked differently: 3 x Linear"):
        cv.migrate(haiku(haiku_stack), target, X)


def test_a_migration_is_a_source_and_knows_how_it_is_called():
    source = haiku(lambda x: hk.Linear(3)(x))
    one = cv.migrate(source, eqx.nn.Linear(4, 3, key=jax.random.key(0)), X, target_call=lambda mdl, x: jax.vmap(mdl)(x))
    other = cv.migrate(one, hk.transform(lambda x: hk.Linear(3)(x)), X, steps=0)
    assert_same_bits(other.variables, source.params)


@pytest.mark.parametrize("with_state", [False, True])
def test_haiku_functions_without_a_key_move_too(with_state):
    transform: Any = hk.transform_with_state if with_state else hk.transform
    net = hk.without_apply_rng(transform(lambda x: hk.Linear(3)(x)))
    made = cv.migrate(bound(lambda _, x: nn.Dense(3)(x)), net, X, prove=False)
    held = made.variables if with_state else (made.variables,)
    assert_same_bits(net.apply(*held, X), bind(net, *held)(X))
    back = cv.migrate(made, linen(lambda _, x: nn.Dense(3)(x)), X, steps=0)
    assert back.report.proved
