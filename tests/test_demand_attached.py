"""Rules on methods and, by hand, on the layers of a model that is not edited; tests/test_demand.py has the table."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from demand import each_outer, each_way, times, triple, tripled
from flax import nnx
from hosts import the_input

import crossvjp
from crossvjp.testing import assert_close, assert_same_bits

KEY = jax.random.key(0)


class Once(threading.local):
    """Puts a rule on a module in an interceptor, which the call under the rule meets again.

    The mark is set inside the function that runs under the rule, so that its late runs set it too.
    """

    inside = False

    def call(self, rule: Any, module: Any, args: Any, kwargs: Any) -> Any:
        """Calls a module under a rule."""

        def marked(module: Any, *args: Any, **kwargs: Any) -> Any:
            before, self.inside = self.inside, True
            try:
                return module(*args, **kwargs)
            finally:
                self.inside = before

        return rule.lift(marked)(module, *args, **kwargs)


once = Once()


def intercepting(kind: Any, rule: Any) -> Any:
    """Makes an interceptor, of Linen or of Haiku, that puts a rule on every module of a kind."""

    def intercept(next_method, args, kwargs, context):
        if once.inside or not isinstance(context.module, kind) or context.method_name != "__call__":
            return next_method(*args, **kwargs)
        return once.call(rule, context.module, args, kwargs)

    return intercept


def linen_model():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.LayerNorm()(nn.Dense(4)(x))
            return nn.Dense(1)(nn.tanh(nn.Dense(3)(x))).sum()

    params = Model().init(KEY, the_input())

    def run(params, x, rule=None):
        if rule is None:
            return Model().apply(params, x)
        with nn.intercept_methods(intercepting(nn.Dense, rule)):
            return Model().apply(params, x)

    return params, run


def haiku_model():
    def model(x):
        x = hk.LayerNorm(-1, True, True)(hk.Linear(4)(x))
        return hk.Linear(1)(jnp.tanh(hk.Linear(3)(x))).sum()

    params = hk.transform(model).init(jax.random.PRNGKey(0), the_input())

    def run(params, x, rule=None):
        def intercepted(x):
            with hk.intercept_methods(intercepting(hk.Linear, rule)):
                return model(x)

        return hk.transform(model if rule is None else intercepted).apply(params, None, x)

    return params, run


def equinox_model():
    class Under(eqx.Module):
        layer: Any
        rule: Any

        def __call__(self, x):
            return self.rule(self.layer)(x)

    class Model(eqx.Module):
        layers: list[Any]

        def __call__(self, x):
            for layer in self.layers:
                x = layer(x)
            return x.sum()

    keys = jax.random.split(KEY, 3)
    linear = [eqx.nn.Linear(*sizes, key=key) for sizes, key in zip([(2, 4), (4, 3), (3, 1)], keys, strict=True)]
    model = Model([linear[0], eqx.nn.LayerNorm(4), linear[1], eqx.nn.Lambda(jnp.tanh), linear[2]])
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def run(params, x, rule=None):
        model = eqx.combine(params, static)
        if rule is not None:
            where = lambda model: [layer for layer in model.layers if isinstance(layer, eqx.nn.Linear)]
            model = eqx.tree_at(where, model, replace_fn=lambda layer: Under(layer, rule))
        return model(x)

    return params, run


def nnx_model(*, graph: bool) -> Any:
    class Under(nnx.Module):
        def __init__(self, layer, rule):
            self.layer, self.rule = layer, rule

        def __call__(self, x):
            return self.rule(self.layer)(x)

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(2, 4, rngs=rngs)
            self.norm = nnx.LayerNorm(4, rngs=rngs)
            self.second = nnx.Linear(4, 3, rngs=rngs)
            self.third = nnx.Linear(3, 1, rngs=rngs)

        def __call__(self, x):
            return self.third(nnx.tanh(self.second(self.norm(self.first(x))))).sum()

    graphdef, params = nnx.split(Model(nnx.Rngs(0)))

    def run(params, x, rule=None):
        with nnx.set_graph_mode(graph), nnx.set_graph_updates(graph):
            model = nnx.merge(graphdef, params, copy=True)
            if rule is not None:
                for name, part in list(vars(model).items()):
                    if isinstance(part, nnx.Linear):
                        setattr(model, name, Under(part, rule))
            return model(x)

    return params, run


MODELS = {
    "linen": linen_model(),
    "nnx graph": nnx_model(graph=True),
    "nnx tree": nnx_model(graph=False),
    "haiku": haiku_model(),
    "equinox": equinox_model(),
}


@each_outer
@pytest.mark.parametrize(("params", "run"), MODELS.values(), ids=MODELS)
def test_row_24_a_rule_on_every_dense_layer_acts_once_on_each_and_on_nothing_else(params, run, outer):
    own = jax.tree.leaves(jax.grad(run)(params, the_input()))
    got = jax.tree.leaves(outer(jax.grad, lambda params, x: run(params, x, triple))(params, the_input()))
    ratios = [float(jnp.sum(ruled * bar) / jnp.sum(bar * bar)) for ruled, bar in zip(got, own, strict=True)]
    for ruled, ratio, bar in zip(got, ratios, own, strict=True):
        np.testing.assert_allclose(ruled, round(ratio) * bar, rtol=1e-4, atol=1e-6)  # two compilations
    assert sorted(round(ratio) for ratio in ratios) == [1] * 2 + [3] * 6


@pytest.mark.parametrize(("params", "run"), MODELS.values(), ids=MODELS)
def test_row_24_the_output_is_the_unedited_models(params, run):
    np.testing.assert_array_equal(run(params, the_input(), triple), run(params, the_input()))


def dense(mdl, x):
    """The body of every decorated method below."""
    return mdl.dense(x)


METHODS = {
    "rule": lambda method: triple.lift(method),
    "custom_vjp": lambda method: crossvjp.custom_vjp(
        method, lambda mdl, x: crossvjp.vjp(method, mdl, x), lambda pullback, y_bar: tripled(pullback(y_bar))
    ),
    "plain": lambda method: method,
}


def linen_methods(decorate):
    class Layer(nn.Module):
        def setup(self):
            self.dense = nn.Dense(3)

        @decorate
        def forward(self, x):
            return dense(self, x)

        def __call__(self, x):
            return self.forward(x)

    params = Layer().init(KEY, the_input())
    return params, lambda params, x: Layer().apply(params, x)


def linen_compact_methods(decorate):
    class Layer(nn.Module):
        @nn.compact
        @decorate
        def __call__(self, x):
            return nn.Dense(3)(x)

    params = Layer().init(KEY, the_input())
    return params, lambda params, x: Layer().apply(params, x)


def nnx_methods(graph):
    def make(decorate):
        class Layer(nnx.Module):
            def __init__(self):
                self.dense = nnx.Linear(2, 3, rngs=nnx.Rngs(0))

            @decorate
            def __call__(self, x):
                return dense(self, x)

        graphdef, params = nnx.split(Layer())

        def run(params, x):
            with nnx.set_graph_mode(graph), nnx.set_graph_updates(graph):
                return nnx.merge(graphdef, params, copy=True)(x)

        return params, run

    return make


def haiku_methods(decorate):
    class Layer(hk.Module):
        def __init__(self):
            super().__init__()
            self.dense = hk.Linear(3)

        @decorate
        def __call__(self, x):
            return dense(self, x)

    transformed = hk.transform(lambda x: Layer()(x))
    params = transformed.init(jax.random.PRNGKey(0), the_input())
    return params, lambda params, x: transformed.apply(params, None, x)


def equinox_methods(decorate):
    class Layer(eqx.Module):
        dense: eqx.nn.Linear

        @decorate
        def __call__(self, x):
            return dense(self, x)

    params, static = eqx.partition(eqx.nn.Linear(2, 3, key=KEY), eqx.is_array)
    return params, lambda params, x: Layer(eqx.combine(params, static))(x)


DECORATED = {
    "linen": linen_methods,
    "linen compact": linen_compact_methods,
    "nnx graph": nnx_methods(True),
    "nnx tree": nnx_methods(False),
    "haiku": haiku_methods,
    "equinox": equinox_methods,
}


@each_way
@pytest.mark.parametrize("make", DECORATED.values(), ids=DECORATED)
def test_row_14_a_rule_decorates_a_method(make, how, outer):
    params, run = make(METHODS[how])
    _, own = make(METHODS["plain"])
    loss = lambda run: lambda params, x: jnp.sum(jnp.sin(run(params, x)))
    assert_same_bits(run(params, the_input()), own(params, the_input()))
    expected = times(3)(jax.grad(loss(own))(params, the_input()))
    assert_close(outer(jax.grad, loss(run))(params, the_input()), expected)


@crossvjp.custom_vjp
def by_decorator(self, x):
    """A method in the form of `jax.custom_vjp`, which takes the instance for its first argument."""
    return self.w * x


by_decorator.defvjp(lambda self, x: (self.w * x, (self, x)), lambda kept, bar: (times(kept[1] * bar)(kept[0]), None))


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class PlainLayer:
    """A pytree of parameters with methods."""

    w: Any
    forward = by_decorator

    @triple.lift
    def under_rule(self, x):
        """Multiplies."""
        return self.w * x


class EquinoxLayer(eqx.Module):
    """The same in Equinox."""

    w: Any
    forward = by_decorator


@each_outer
@pytest.mark.parametrize("layer", [PlainLayer, EquinoxLayer], ids=["plain", "equinox"])
def test_row_14_a_method_in_the_form_of_jax_custom_vjp(layer, outer):
    loss = lambda layer, x: layer.forward(x)
    layer_bar, x_bar = outer(lambda loss: jax.grad(loss, argnums=(0, 1)), loss)(layer(jnp.array(2.0)), jnp.array(5.0))
    assert (float(layer_bar.w), float(x_bar)) == (10.0, 0.0)  # the rule's own: the layer times x, and nothing


def test_row_14_a_rule_decorates_a_method_of_a_plain_pytree():
    bar = jax.grad(lambda layer: layer.under_rule(jnp.array(5.0)))(PlainLayer(jnp.array(2.0)))
    assert float(bar.w) == 15.0


def linen_with_a_decorated_method(x):
    class Layer(nn.Module):
        forward = by_decorator

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Layer().forward(x)

    Net().apply({}, x)


def nnx_with_a_decorated_method(x):
    class Layer(nnx.Module):
        forward = by_decorator

    Layer().forward(x)


def haiku_with_a_decorated_method(x):
    class Layer(hk.Module):
        forward = by_decorator

    hk.transform(lambda x: Layer().forward(x)).apply({}, None, x)


REFERENCES = [linen_with_a_decorated_method, nnx_with_a_decorated_method, haiku_with_a_decorated_method]


@pytest.mark.parametrize("run", REFERENCES, ids=["linen", "nnx", "haiku"])
def test_row_14_where_modules_are_references_that_form_says_which_one_to_use(run):
    message = r"by_decorator got a Layer as an argument.*custom_vjp\(fn, forward_fn, backward_fn"
    with pytest.raises(crossvjp.HandleError, match=message):
        run(jnp.array(5.0))
