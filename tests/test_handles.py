"""Handles beyond a single module: composites, shared weights, methods, modules that hold or make modules, arguments."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import flax.errors
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hosts import the_input
from rules import identity, sign_gradient

import crossvjp
from crossvjp.testing import assert_close, assert_same_bits

KEY = jax.random.key(0)


def two(mdls, x):
    """Calls two modules, the second on the output of the first."""
    return mdls[1](mdls[0](x))


def compare(loss: Any, variables: Any, *, exact: bool = True) -> None:
    """Compares values and gradients of `loss(rule, ...)` with the identity rule and without any."""
    compared = assert_same_bits if exact else assert_close
    unruled = lambda fn: fn
    for outer in (lambda g: g, jax.jit):
        grad = jax.value_and_grad(lambda v, x, lift=identity.lift, outer=outer: outer(loss(lift))(v, x), argnums=(0, 1))
        own = jax.value_and_grad(lambda v, x, outer=outer: outer(loss(unruled))(v, x), argnums=(0, 1))
        (assert_close if outer is jax.jit else compared)(grad(variables, the_input()), own(variables, the_input()))


def linen_loss(make: Any) -> tuple[Any, Any]:
    """Builds `loss(lift)` for a Linen module whose compact body is `make(self, x, lift)`."""

    class Net(nn.Module):
        lift: Any

        @nn.compact
        def __call__(self, x):
            return jnp.sum(jnp.sin(make(self, x, self.lift)))

    variables = Net(lambda fn: fn).init(KEY, the_input())
    return lambda lift: Net(lift).apply, variables


def test_linen_two_modules_in_one_call():
    compare(*linen_loss(lambda self, x, lift: lift(two)((nn.Dense(3), nn.Dense(4)), x)))


def test_linen_a_module_that_holds_modules():
    class Pair(nn.Module):
        first: nn.Module
        second: nn.Module

        def __call__(self, x):
            return self.second(self.first(x))

    compare(*linen_loss(lambda self, x, lift: lift(lambda mdl, x: mdl(x))(Pair(nn.Dense(3), nn.Dense(4)), x)))


def test_linen_sequential():
    compare(*linen_loss(lambda self, x, lift: lift(lambda mdl, x: mdl(x))(nn.Sequential([nn.Dense(3), nn.tanh]), x)))


def test_linen_the_module_itself_goes_on_naming_its_children():
    def body(self, x, lift):
        x = nn.Dense(3)(x)
        x = lift(lambda mdl, x: nn.Dense(4)(x))(self, x)
        return nn.Dense(5)(x)

    loss, variables = linen_loss(body)
    assert sorted(variables["params"]) == ["Dense_0", "Dense_1", "Dense_2"]
    compare(loss, variables)


def test_linen_a_module_called_twice():
    def body(self, x, lift):
        dense = nn.Dense(2)
        call = lift(lambda mdl, x: mdl(x))
        return call(dense, call(dense, x))

    compare(*linen_loss(body))


def test_linen_one_module_twice_in_one_handle_has_one_summed_cotangent():
    seen = []

    def noted(call, y_bar):
        bar = call.pullback(y_bar)
        seen.append(len(jax.tree.leaves(bar.variables)))
        return bar

    def body(self, x, lift):
        dense = nn.Dense(2)
        return lift(two)((dense, dense), x)

    loss, variables = linen_loss(body)
    compare(loss, variables)
    jax.grad(loss(crossvjp.rule(noted).lift))(variables, the_input())
    assert set(seen) == {2}


def test_linen_a_module_as_an_argument():
    compare(*linen_loss(lambda self, x, lift: lift(lambda mdl, x, other: other(mdl(x)))(nn.Dense(3), x, nn.Dense(4))))


def test_linen_a_bound_method():
    class Layer(nn.Module):
        def setup(self):
            self.dense = nn.Dense(3)

        def forward(self, x):
            return self.dense(x)

    def body(self, x, lift):
        return lift(lambda mdl, x: mdl(x))(Layer().forward, x)

    compare(*linen_loss(body))


def test_linen_partitioned_parameters_stay_boxed():
    boxed = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
    loss, variables = linen_loss(lambda self, x, lift: lift(lambda mdl, x: mdl(x))(nn.Dense(3, kernel_init=boxed), x))
    compare(loss, variables)
    bar = jax.grad(loss(sign_gradient.lift))(variables, the_input())
    assert isinstance(bar["params"]["Dense_0"]["kernel"], nn.Partitioned)


def test_linen_interceptors_and_sown_values_reach_late_runs():
    class Net(nn.Module):
        lift: Any

        @nn.compact
        def __call__(self, x):
            return self.lift(lambda mdl, x: mdl(x))(nn.Dense(3), x).sum()

    variables = Net(lambda fn: fn).init(KEY, the_input())

    def double(next_fun, args, kwargs, context):
        return 2 * next_fun(*args, **kwargs) if isinstance(context.module, nn.Dense) else next_fun(*args, **kwargs)

    def loss(lift):
        def apply(variables, x):
            with nn.intercept_methods(double):
                return Net(lift).apply(variables, x, capture_intermediates=True, mutable=["intermediates"])

        return apply

    for outer in (lambda g: g, jax.jit):
        grad = jax.value_and_grad(outer(loss(identity.lift)), has_aux=True)
        own = jax.value_and_grad(outer(loss(lambda fn: fn)), has_aux=True)
        assert_same_bits(grad(variables, the_input()), own(variables, the_input()))


def test_nnx_two_modules_and_shared_variables():
    class Tied(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(2, 2, rngs=rngs)
            self.second = nnx.Linear(2, 2, rngs=rngs)
            self.second.kernel = self.first.kernel

    graphdef, state = nnx.split(Tied(nnx.Rngs(0)))

    def loss(lift):
        def run(state, x):
            tied = nnx.merge(graphdef, state, copy=True)
            return jnp.sum(jnp.sin(lift(two)((tied.first, tied.second), x)))

        return run

    compare(loss, state)


@pytest.mark.parametrize("graph", [True, False])
def test_nnx_updates_reach_the_live_module_in_both_modes(graph):
    class Counter(nnx.Module):
        def __init__(self):
            self.count = nnx.BatchStat(jnp.array(0.0))

        def __call__(self, x):
            self.count.set_value(self.count.get_value() + 1)
            if hasattr(self, "seen"):
                self.seen.set_value(x)
            else:
                self.seen = nnx.Intermediate(x)
            return 2 * x

    with nnx.set_graph_mode(graph), nnx.set_graph_updates(graph):
        counter = Counter()
        assert float(identity(counter)(jnp.array(3.0))) == 6.0
        assert float(identity(counter)(jnp.array(4.0))) == 8.0
        assert float(counter.count.get_value()) == 2.0
        assert float(counter.seen.get_value()) == 4.0


def test_nnx_captures_what_a_wrapped_module_sows():
    class Layer(nnx.Module):
        def __call__(self, x):
            self.sow(nnx.Intermediate, "seen", 2 * x)
            return x

    class Net(nnx.Module):
        def __init__(self):
            self.layer = Layer()

        def __call__(self, x):
            return identity(self.layer)(x)

    _, captured = nnx.capture(Net(), nnx.Intermediate)(jnp.array(3.0))
    assert [float(leaf) for leaf in jax.tree.leaves(captured)] == [6.0]


def test_nnx_a_module_of_an_outer_trace_is_not_written_to():
    counter = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    with pytest.raises(flax.errors.TraceContextError, match="trace level"):
        jax.jit(lambda x: identity(counter)(x))(jnp.ones((4, 3)))
    np.testing.assert_array_equal(counter.mean.get_value(), jnp.zeros(3))


def test_nnx_variables_may_hold_what_is_no_array():
    class Named(nnx.Module):
        def __init__(self):
            self.label = nnx.Variable("start")
            self.calls = nnx.Variable(0)
            self.w = nnx.Param(jnp.array(2.0))

        def __call__(self, x):
            self.label.set_value("called")
            self.calls.set_value(self.calls.get_value() + 1)
            return self.w * x

    module = Named()
    assert float(identity(module)(jnp.array(3.0))) == 6.0
    bar = nnx.grad(lambda module: identity(module)(jnp.array(3.0)))(module)
    assert float(bar.w.get_value()) == 3.0
    assert module.label.get_value() == "called"
    assert module.calls.get_value() == 2


def test_nnx_a_bound_method():
    layer = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    assert_same_bits(identity(layer.__call__)(the_input()), layer(the_input()))


def haiku_loss(body: Any) -> tuple[Any, Any]:
    """Builds `loss(lift)` for a Haiku function `body(x, lift)`."""
    transformed = hk.transform(lambda x, lift: jnp.sum(jnp.sin(body(x, lift))))
    params = transformed.init(jax.random.PRNGKey(0), the_input(), lambda fn: fn)
    return lambda lift: lambda params, x: transformed.apply(params, None, x, lift), params


def test_haiku_two_modules_in_one_call():
    compare(*haiku_loss(lambda x, lift: lift(two)((hk.Linear(3), hk.Linear(4)), x)))


def test_haiku_a_module_that_holds_modules():
    compare(*haiku_loss(lambda x, lift: lift(lambda mdl, x: mdl(x))(hk.Sequential([hk.Linear(3), hk.Linear(4)]), x)))


def test_haiku_a_nested_module_and_names_behind_it():
    def body(x, lift):
        x = lift(lambda mdl, x: mdl(x))(hk.nets.MLP([3, 4]), x)
        x = lift(lambda mdl, x: hk.Linear(2)(x))(lambda: None, x)
        return hk.Linear(5)(x)

    loss, params = haiku_loss(body)
    assert "linear_1" in params
    compare(loss, params)


def test_haiku_a_function_that_reaches_modules_the_handle_does_not_hold():
    def body(x, lift):
        other = hk.Linear(3)
        return lift(lambda mdl, x: mdl(other(x)))(hk.Linear(4), x)

    compare(*haiku_loss(body))


def test_haiku_a_module_as_an_argument():
    compare(*haiku_loss(lambda x, lift: lift(lambda mdl, x, other: other(mdl(x)))(hk.Linear(3), x, hk.Linear(4))))


def test_haiku_lifted_parameters():
    def body(x, lift):
        def ensemble(mdl, x):
            inner = hk.transform(lambda x: hk.Linear(3)(x))
            key = hk.next_rng_keys(4) if hk.running_init() else None
            params = hk.lift(jax.vmap(inner.init, in_axes=(0, None)), name="ensemble")(key, x)
            return jax.vmap(inner.apply, in_axes=(0, None, None))(params, None, x)

        return lift(ensemble)(lambda: None, x)

    compare(*haiku_loss(body))


def test_haiku_custom_getters_interceptors_and_policies_reach_late_runs():
    def getter(next_getter, value, context):
        return next_getter(2 * value)

    def interceptor(next_method, args, kwargs, context):
        return 3 * next_method(*args, **kwargs) if context.method_name == "__call__" else next_method(*args, **kwargs)

    def body(x, lift):
        with hk.custom_getter(getter), hk.intercept_methods(interceptor):
            return lift(lambda mdl, x: mdl(x))(hk.Linear(3), x)

    compare(*haiku_loss(body))


def test_equinox_shared_layers_and_two_modules():
    embed = eqx.nn.Linear(2, 2, key=KEY)
    shared = eqx.nn.Shared((embed, embed), where=lambda pair: pair[1].weight, get=lambda pair: pair[0].weight)

    def loss(lift):
        return lambda shared, x: jnp.sum(jnp.sin(lift(lambda mdl, x: two(mdl(), x))(shared, x)))

    params, static = eqx.partition(shared, eqx.is_inexact_array)
    compare(lambda lift: lambda params, x: loss(lift)(eqx.combine(params, static), x), params)


def test_keyword_and_keyword_only_arguments_are_never_lost():
    def scaled(mdl, x, *, scale, shift=0.0, flag=True):
        return mdl["w"] @ x * scale + shift if flag else x

    w = {"w": jnp.array([[1.0, 2.0], [3.0, 4.0]])}

    def loss(lift):
        return lambda w, x, scale: lift(scaled)(w, x=x, scale=scale, shift=jnp.array(1.0)).sum()

    args = w, the_input(), jnp.array(10.0)
    own = jax.value_and_grad(loss(lambda fn: fn), argnums=(0, 1, 2))(*args)
    assert_same_bits(jax.value_and_grad(loss(identity.lift), argnums=(0, 1, 2))(*args), own)
    # A rule that returns a plain tuple does not speak of the keyword input, which keeps its own gradient.
    silent = crossvjp.rule(lambda call, y_bar: tuple(call.pullback(y_bar)))
    assert_close(jax.value_and_grad(loss(silent.lift), argnums=(0, 1, 2))(*args), own)


def test_arguments_and_outputs_of_every_kind_pass_through():
    def fn(mdl, x, index, key, name, options):
        y = mdl["w"][index] * x + jax.random.normal(key)
        return {"y": y, "name": name, "index": index, "none": None, "options": options["act"]}

    w = {"w": jnp.arange(3.0), "act": jnp.tanh}
    args = (jnp.array(2.0), jnp.array(1), jax.random.key(0), "dense", {"act": jnp.tanh, "flag": True})
    out = identity.lift(fn)(w, *args)
    assert out["name"] == "dense"
    assert out["options"] is jnp.tanh
    grad = lambda fn: jax.grad(lambda w, x: fn({"w": w, "act": jnp.tanh}, x, *args[1:])["y"], argnums=(0, 1))
    assert_same_bits(grad(identity.lift(fn))(w["w"], args[0]), grad(fn)(w["w"], args[0]))


def test_a_gradient_through_mutated_state_arrives():
    class Accumulate(nn.Module):
        @nn.compact
        def __call__(self, x):
            total = self.variable("state", "total", jnp.zeros, ())
            total.value = total.value + (self.param("w", nn.initializers.ones, ()) * x).sum()
            return x

    class Net(nn.Module):
        lift: Any

        @nn.compact
        def __call__(self, x):
            return self.lift(lambda mdl, x: mdl(x))(Accumulate(), x)

    variables = Net(lambda fn: fn).init(KEY, the_input())

    def loss(lift):
        def run(variables, x):
            state: Any = Net(lift).apply(variables, x, mutable=["state"])[1]
            return jnp.square(state["state"]["Accumulate_0"]["total"])

        return run

    own = jax.grad(loss(lambda fn: fn), argnums=(0, 1))(variables, jnp.array([3.0]))
    assert float(own[0]["params"]["Accumulate_0"]["w"]) != 0.0
    assert_close(jax.grad(loss(identity.lift), argnums=(0, 1))(variables, jnp.array([3.0])), own)


def test_backward_functions_that_ask_for_the_updates_cotangent_answer_for_it():
    got = []

    def backward(pullback, y_bar, updates_bar):
        got.append(updates_bar)
        return pullback(y_bar)

    def call(mdl, x):
        return mdl(x)

    use = crossvjp.custom_vjp(call, lambda mdl, x: crossvjp.vjp(call, mdl, x), backward)
    x = jax.random.normal(KEY, (4, 3))
    graphdef, params, rest = nnx.split(nnx.BatchNorm(3, momentum=0.5, rngs=nnx.Rngs(0)), nnx.Param, ...)

    def loss(params, x):
        norm = nnx.merge(graphdef, params, rest, copy=True)
        y = use(norm, x)
        return y.sum() + norm.mean.get_value().sum()

    x_bar = jax.grad(loss, argnums=1)(params, x)
    assert [np.asarray(leaf).tolist() for leaf in jax.tree.leaves(got[0])] == [[1.0] * 3, [0.0] * 3]
    np.testing.assert_allclose(x_bar, jnp.zeros((4, 3)), atol=1e-6)  # the rule answered, and gave nothing for the mean


def test_every_variable_is_differentiable_beside_a_rule_on_the_parameters():
    def fn(mdl, x):
        return jnp.sum(mdl["params"]["w"] * x * mdl["stats"])

    variables = {"params": {"w": jnp.array([1.0, 2.0])}, "stats": jnp.array([3.0, 4.0])}
    bar = jax.grad(sign_gradient.lift(fn))(variables, the_input())
    own = jax.grad(fn)(variables, the_input())
    assert_same_bits(bar["params"], jax.tree.map(jnp.sign, own["params"]))
    assert_close(bar["stats"], own["stats"])


def test_second_order_differentiates_the_rule():
    def fn(mdl, x):
        return jnp.sum(jnp.sin(mdl["w"] * x))

    w = {"w": jnp.array([1.0, 2.0])}
    inner = lambda lift: lambda w, x: sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(jax.grad(lift(fn))(w, x)))
    assert_close(jax.grad(inner(identity.lift))(w, the_input()), jax.grad(inner(lambda fn: fn))(w, the_input()))


def test_rules_inside_rules_each_act():
    double = crossvjp.rule(lambda call, y_bar: call.pullback(2 * y_bar))

    def fn(mdl, x):
        return double.lift(lambda mdl, x: jnp.sum(mdl["w"] * x))(mdl, x)

    bar = jax.grad(sign_gradient.lift(fn))({"w": jnp.array([1.0, 2.0])}, the_input())
    np.testing.assert_array_equal(bar["w"], jnp.sign(the_input()))
    np.testing.assert_array_equal(
        jax.grad(identity.lift(fn))({"w": jnp.array([1.0, 2.0])}, the_input())["w"], 2 * the_input()
    )
