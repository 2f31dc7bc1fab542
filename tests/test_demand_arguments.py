"""Users' needs about arguments and closures; tests/test_demand.py has the table of all needs."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from demand import OUTER, each_framework, each_outer, each_way, scalar
from flax import nnx
from helpers import is_coming
from hosts import the_input
from rules import identity, unchanged

import crossvjp
from crossvjp.testing import assert_close, assert_same_bits


def scaled(mdl, x, scale=1.0, *, shift):
    return mdl(x) * scale + shift


CALLS = {
    "keyword-only": lambda use, mdl, x, scale, shift: use(mdl, x, scale, shift=shift),
    "by name": lambda use, mdl, x, scale, shift: use(mdl, x=x, scale=scale, shift=shift),
    "other order": lambda use, mdl, x, scale, shift: use(mdl, shift=shift, scale=scale, x=x),
}
SCALED = {
    "rule": identity.lift(scaled),
    "custom_vjp": crossvjp.custom_vjp(
        scaled, lambda mdl, *args, **kwargs: crossvjp.vjp(scaled, mdl, *args, **kwargs), unchanged
    ),
}


@each_outer
@pytest.mark.parametrize(
    ("call", "use"), [("keyword-only", "rule"), ("by name", "custom_vjp"), ("other order", "rule")], ids=str
)
@each_framework
def test_row_13_keyword_arguments_reach_the_function_and_have_a_gradient(host, use, call, outer):
    def loss(use):
        total = scalar(lambda mdl, *args: CALLS[call](use, mdl, *args))
        return lambda *args: host.run(args[0], total, *args[1:])

    grad = lambda loss: jax.value_and_grad(loss, argnums=(0, 1, 2, 3))
    args = host.params, the_input(), jnp.array(10.0), jnp.array(0.5)
    got, expected = outer(grad, loss(SCALED[use]))(*args), grad(loss(scaled))(*args)
    assert_close(got, expected)
    assert float(expected[1][2]) != 0.0  # the scale's gradient, which Flax and Equinox lose


@each_framework
def test_row_13_arguments_without_gradient_are_named_as_well_as_numbered(host):
    got: list[Any] = []

    def backward(scale, how, pullback, y_bar):
        got.append((float(scale), how))
        return pullback(y_bar)

    def named(mdl, x, scale, how):
        return mdl(x) * scale if how == "times" else mdl(x)

    def forward(mdl, x, scale, how):
        return crossvjp.vjp(lambda mdl, x: named(mdl, x, scale, how), mdl, x)

    use = crossvjp.custom_vjp(named, forward, backward, nondiff_argnames=("scale", "how"))
    call = scalar(lambda mdl, x, scale: use(mdl, x, scale=scale, how="times"))
    by_name = jax.grad(lambda params: host.run(params, call, the_input(), jnp.array(10.0)))(host.params)
    expected = jax.grad(lambda params: host.run(params, scalar(named), the_input(), jnp.array(10.0), "times"))
    assert got == [(10.0, "times")]
    assert_close(by_name, expected(host.params))


CLOSED_OVER = {
    "rule": lambda fn: identity.lift(fn),
    "custom_vjp": lambda fn: crossvjp.custom_vjp(fn, lambda mdl, x: crossvjp.vjp(fn, mdl, x), unchanged),
}


@each_way
@each_framework
def test_row_15_a_differentiated_value_that_the_function_closes_over_is_named(host, how, outer):
    def loss(scale):
        return host.run(host.params, scalar(CLOSED_OVER[how](lambda mdl, x: mdl(x) * scale)), the_input())

    with pytest.raises(
        crossvjp.ArgumentError, match=r"`scale`, a float32\[3\], is differentiated.*[Pp]ass it as an input"
    ):
        outer(jax.grad, loss)(jnp.ones(3))


@pytest.mark.parametrize("wrap", CLOSED_OVER.values(), ids=CLOSED_OVER)
@each_framework
def test_row_15_a_value_that_is_not_differentiated_may_be_closed_over(host, wrap):
    def loss(params, scale, wrap=wrap):
        return host.run(params, scalar(wrap(lambda mdl, x: mdl(x) * scale)), the_input())

    got = jax.jit(jax.grad(loss))(host.params, jnp.full(3, 2.0))
    assert_close(got, jax.grad(loss)(host.params, jnp.full(3, 2.0), lambda fn: fn))


def linen_pair(use, params, x):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            first, second = nn.Dense(2, name="first"), nn.Dense(2, name="second")
            second(x)
            return use(first, second, x)

    return Net().apply({"params": params}, x)


def nnx_pair(*, graph: bool) -> Any:
    def run(use, params, x):
        with nnx.set_graph_mode(graph), nnx.set_graph_updates(graph):
            first, second = (nnx.Linear(2, 2, rngs=nnx.Rngs(0)) for _ in range(2))
            for layer, name in ((first, "first"), (second, "second")):
                layer.kernel, layer.bias = (nnx.Param(params[name][key]) for key in ("kernel", "bias"))
            return use(first, second, x)

    return run


def plain_pair(use, params, x):
    dense = lambda params, x: x @ params["kernel"] + params["bias"]
    first, second = (jax.tree_util.Partial(dense, params[name]) for name in ("first", "second"))
    return use(first, second, x)


PAIRS = {"linen": linen_pair, "nnx graph": nnx_pair(graph=True), "nnx tree": nnx_pair(graph=False), "plain": plain_pair}
PAIR = {"kernel": jnp.array([[0.5, -1.0], [2.0, 0.25]]), "bias": jnp.array([0.1, -0.2])}


@each_outer
@pytest.mark.parametrize("run", PAIRS.values(), ids=PAIRS)
def test_row_15_a_differentiated_module_that_the_function_closes_over_is_named(run, outer):
    """In Haiku this works: a module there is a name in the frame, not the holder of its parameters."""

    def use(mdl, other, x):
        return identity.lift(lambda mdl, x: mdl(other(x)))(mdl, x).sum()

    named: Any = (crossvjp.CrossVJPError, r"`other.*[Pp]ass it as an input")
    if is_coming() and outer is OUTER["grad_jit"] and run is not plain_pair:
        # There JAX refuses every traced value in a closure, before it could be differentiated.
        named = (jax.errors.UnexpectedTracerError, r"closed over a DynamicJaxprTracer.* as an explicit input")
    error, words = named
    with pytest.raises(error, match=words):
        outer(jax.grad, lambda params: run(use, params, the_input()))({"first": PAIR, "second": PAIR})


@each_outer
@pytest.mark.parametrize("run", PAIRS.values(), ids=PAIRS)
def test_row_15_another_module_may_be_an_input(run, outer):
    as_input = lambda wrap: lambda mdl, other, x: wrap(lambda mdl, x, other: mdl(other(x)))(mdl, x, other).sum()
    loss = lambda wrap: lambda params: run(as_input(wrap), params, the_input())
    params = {"first": PAIR, "second": PAIR}
    assert_close(outer(jax.grad, loss(identity.lift))(params), jax.grad(loss(lambda fn: fn))(params))


@each_framework
def test_row_15_what_the_error_says_to_do_gives_the_gradient(host):
    use = identity.lift(lambda mdl, x, scale: mdl(x) * scale)
    got = jax.grad(lambda scale: host.run(host.params, scalar(use), the_input(), scale))(jnp.ones(3))
    own = jax.grad(lambda scale: host.run(host.params, scalar(lambda mdl, x: mdl(x) * scale), the_input()))
    assert_close(got, own(jnp.ones(3)))


@each_outer
@each_framework
def test_row_16_an_array_without_gradient_may_be_traced_and_a_static_argument_stays_one(host, outer):
    def fn(mdl, x, mask, power):
        return (mdl(x) * mask) ** power  # with a traced power, the gradient of this would have a logarithm

    got: list[Any] = []

    def backward(mask, power, pullback, y_bar):
        got.append((mask.shape, power))
        return pullback(y_bar)

    forward = lambda mdl, x, mask, power: crossvjp.vjp(lambda mdl, x: fn(mdl, x, mask, power), mdl, x)
    use = crossvjp.custom_vjp(fn, forward, backward, nondiff_argnums=(2, 3))
    mask = jnp.array([1.0, 0.0, 2.0])
    loss = lambda use: lambda params, mask: host.run(params, scalar(use), the_input(), mask, 3)
    grad = lambda loss: jax.grad(loss, argnums=(0, 1))
    params_bar, mask_bar = outer(grad, loss(use))(host.params, mask)
    assert got
    assert set(got) == {((3,), 3)}
    assert_close(params_bar, jax.grad(loss(fn))(host.params, mask))
    np.testing.assert_array_equal(mask_bar, jnp.zeros(3))


WANTED = {
    "params": (0, {"variables": True, "inputs": False, "keywords": False}),
    "input": (1, {"variables": False, "inputs": True, "keywords": False}),
    "keyword": (2, {"variables": False, "inputs": False, "keywords": True}),
}


def shifted(mdl, x, *, shift):
    return mdl(x) + shift


def what_is_perturbed(perturbed: Any) -> dict[str, bool]:
    """Reads off one truth value for each part, of which all leaves must agree."""
    parts = {name: jax.tree.leaves(getattr(perturbed, name)) for name in ("variables", "inputs", "keywords")}
    assert {name: len(leaves) for name, leaves in parts.items()} == {"variables": 2, "inputs": 1, "keywords": 1}
    return {name: leaves[0] for name, leaves in parts.items() if len(set(leaves)) == 1}


@each_way
@pytest.mark.parametrize(("argument", "expected"), WANTED.values(), ids=WANTED)
@each_framework
def test_row_17_a_rule_knows_what_needs_a_gradient(host, argument, expected, how, outer):
    seen: list[Any] = []

    def forward(mdl, x, *, shift, perturbed):
        seen.append(what_is_perturbed(perturbed))
        return crossvjp.vjp(shifted, mdl, x, shift=shift)

    @crossvjp.rule
    def look(call, y_bar):
        seen.append(what_is_perturbed(call.perturbed))
        return call.pullback(y_bar)

    by_functions = crossvjp.custom_vjp(shifted, forward, unchanged)
    uses: Any = {"custom_vjp": by_functions, "rule": look.lift(shifted)}

    def loss(use):
        total = scalar(lambda mdl, x, shift: use(mdl, x, shift=shift))
        return lambda *args: host.run(args[0], total, *args[1:])

    args = host.params, the_input(), jnp.array(0.5)
    grad = lambda loss: jax.grad(loss, argnums=argument)
    assert_close(outer(grad, loss(uses[how]))(*args), grad(loss(shifted))(*args))
    told = dict.fromkeys(expected, True) if is_coming() else expected  # there, everything counts as differentiated
    assert seen
    assert all(each == told for each in seen)


@each_framework
def test_row_17_what_has_no_gradient_is_not_perturbed(host):
    seen: list[Any] = []

    @crossvjp.rule
    def look(call, y_bar):
        seen.append(jax.tree.leaves(call.perturbed.inputs))
        return call.pullback(y_bar)

    use = look.lift(lambda mdl, x, index, key: mdl(x)[index])
    loss = lambda params: host.run(params, use, the_input(), jnp.array(1), jax.random.key(0))
    jax.grad(loss)(host.params)
    assert seen[0] == [is_coming(), False, False]  # in the coming custom_vjp, every floating array counts


def takes_all_kinds(mdl, x, index, key, nothing, table, flags, name):
    """Needs all its arguments, of which only `x` and one leaf of the table have a gradient."""
    assert nothing is None
    assert name == "dense"
    noise = jax.random.normal(key, (3,))
    y = mdl(x) * table["scale"] + jnp.where(flags, noise, 0) * index
    return {"y": table["act"](y), "name": name, "nothing": None, "index": index + 1, "act": table["act"]}


KINDS = {
    "rule": identity.lift(takes_all_kinds),
    "custom_vjp": crossvjp.custom_vjp(
        takes_all_kinds,
        lambda mdl, *args: crossvjp.vjp(takes_all_kinds, mdl, *args),
        unchanged,
    ),
}


@each_way
@each_framework
def test_rows_19_and_29_arguments_and_outputs_of_every_kind_pass(host, how, outer):
    table = {"act": jnp.tanh, "rows": jnp.array([3, 4], jnp.int8)}
    rest = jnp.array(2), jax.random.key(3), None

    def loss(use):
        def run(params, x, scale):
            out = host.run(params, use, x, *rest, {**table, "scale": scale}, np.array([True, False, True]), "dense")
            assert out["name"] == "dense"
            assert out["nothing"] is None
            assert out["act"] is jnp.tanh
            return jnp.sum(out["y"]), out["index"]

        return run

    grad = lambda loss: jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
    args = host.params, the_input(), jnp.array(2.0)
    (value, index), bars = outer(grad, loss(KINDS[how]))(*args)
    (own_value, _), own_bars = grad(loss(takes_all_kinds))(*args)
    assert int(index) == 3
    assert_close((value, bars), (own_value, own_bars))


def test_row_29_plain_parameters_beside_functions_and_text_have_a_gradient():
    handle = {"w": jnp.array([1.0, 2.0]), "act": jnp.tanh, "name": "dense", "steps": 3}
    fn = lambda mdl, x: jnp.sum(mdl["act"](mdl["w"] * x) * mdl["steps"])
    grad = lambda fn: jax.grad(lambda w, x: fn({**handle, "w": w}, x), argnums=(0, 1))(handle["w"], the_input())
    assert_same_bits(grad(identity.lift(fn)), grad(fn))
