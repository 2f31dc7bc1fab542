"""Attached rules under each framework's own transforms, methods and interceptors."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from models import haiku as haiku_model
from models import linen as linen_model
from models import x_of

import crossvjp as cv
from crossvjp.testing import assert_close, assert_same_bits, one_by_one

KEY = jax.random.key(0)
X = x_of(4, 6)


@cv.rule
def doubled(call, y_bar):
    """Doubles the gradient of the parameters."""
    bar = call.pullback(y_bar)
    return bar.replace(variables=jax.tree.map(lambda g: 2 * g, bar.variables))


def check_doubled(loss: Any, params: Any, model: Any, attached: Any, chosen: str, *, exact: bool = True) -> None:
    """Checks that just the parameters with `chosen` in their path have twice the gradient; and the same under jit."""
    own_value, own = jax.value_and_grad(loss(model))(params)
    for around in (lambda loss: loss, jax.jit):
        value, found = jax.value_and_grad(around(loss(attached)))(params)
        compared = assert_same_bits if exact and around is not jax.jit else assert_close
        compared(value, own_value)
        scaled = jax.tree_util.tree_map_with_path(
            lambda path, g: 2 * g if chosen in jax.tree_util.keystr(path) else g, own
        )
        assert chosen in str(jax.tree_util.tree_leaves_with_path(own))
        compared(found, scaled)


class Cell(nn.Module):
    """A layer with one dense module, as scans and loops take it."""

    @nn.compact
    def __call__(self, x, _=None):
        return jnp.tanh(nn.Dense(6, name="dense")(x)), None


class ByHelper(nn.Module):
    """Calls methods of its own, and another one is called from outside."""

    def setup(self):
        self.inner = nn.Dense(6)

    def encode(self, x):
        return self.inner(x)

    def decode(self, x):
        return self.inner.__class__.__call__(self.inner, self.encode(x))

    def __call__(self, x):
        return self.decode(x)


def scanned(x):
    return nn.scan(Cell, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)(name="cell")(x, None)[0]


def rematted(x):
    return nn.remat(Cell)(name="cell")(x)[0]


def mapped(x):
    cell = nn.vmap(Cell, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=0, out_axes=0)
    return cell(name="cell")(x)[0]


def jitted(x):
    return nn.jit(Cell)(name="cell")(x)[0]


def scanned_remat(x):
    cell = nn.scan(nn.remat(Cell), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
    return cell(name="cell")(x, None)[0]


LINEN = [scanned, rematted, mapped, jitted, scanned_remat]


class Around(nn.Module):
    """Runs a function of modules behind a layer of its own."""

    fn: Any

    @nn.compact
    def __call__(self, x):
        return self.fn(nn.Dense(6, name="first")(x))


@pytest.mark.parametrize("fn", LINEN, ids=lambda fn: fn.__name__)
@pytest.mark.parametrize(("where", "chosen"), [("cell/dense", "dense"), (nn.Dense, ""), ("cell", "cell")])
def test_linen_transforms(fn, where, chosen):
    model = Around(fn)
    params = model.init(KEY, X)
    loss = lambda model: lambda params: jnp.sum(model.apply(params, X) ** 2)
    # Under vmap the rule sees a lane at a time, so the sum over lanes is in another order.
    check_doubled(loss, params, model, cv.attach(model, doubled, where=where), chosen, exact=fn is not mapped)


class TwoJitted(nn.Module):
    """Two modules that are alike; Flax compiles them once."""

    traced: ClassVar[list[Any]] = []

    @nn.compact
    def __call__(self, x):
        made = nn.jit(CountedCell)
        return made(name="b")(made(name="a")(x))


class CountedCell(nn.Module):
    """Takes down when it is traced."""

    @nn.compact
    def __call__(self, x):
        TwoJitted.traced.append(self.name)
        return jnp.tanh(nn.Dense(6, name="dense")(x))


@pytest.mark.parametrize(
    ("where", "rule", "factors", "traces"),
    [
        ("a/dense", doubled, (2, 1), 2),
        ("b/dense", doubled, (1, 2), 2),
        (nn.Dense, doubled, (2, 2), 1),
        (nn.Dense, lambda path, module: doubled if path[0] == "b" else None, (1, 2), 2),
    ],
    ids=["the first", "the second", "both", "by a function"],
)
def test_what_linens_jit_keeps_of_one_module_is_not_used_for_another(where, rule, factors, traces):
    model = TwoJitted()
    params = model.init(KEY, X)
    loss = lambda model: jax.jit(lambda params: jnp.sum(model.apply(params, X) ** 2))
    own = jax.grad(loss(model))(params)["params"]
    attached = cv.attach(model, rule, where=where)
    TwoJitted.traced.clear()
    assert jnp.isfinite(loss(attached)(params))
    assert len(TwoJitted.traced) == traces
    grads = jax.grad(loss(attached))(params)["params"]
    for name, factor in zip(("a", "b"), factors, strict=True):
        assert_same_bits(grads[name], jax.tree.map(functools.partial(jnp.multiply, factor), own[name]))


def test_linen_methods_are_calls_from_outside_and_none_from_inside():
    model = ByHelper()
    params = model.init(KEY, X)
    attached = cv.attach(model, doubled, where="")
    for method in ("__call__", "encode", "decode"):
        loss = lambda model, method=method: lambda params: jnp.sum(model.apply(params, X, method=method) ** 2)
        check_doubled(loss, params, model, attached, "inner")
    rows = cv.sites(attached, X)
    assert [(row.path, row.method, row.calls) for row in rows] == [("", "__call__", 1), ("inner", "__call__", 2)]


@pytest.mark.parametrize("transform", [hk.transform, hk.transform_with_state])
@pytest.mark.parametrize("around", [lambda model: model, hk.without_apply_rng], ids=["as it is", "without rng"])
def test_sites_of_haiku_models_whose_apply_takes_a_key_and_of_others(transform, around):
    named_as_a_key = around(transform(lambda rng: hk.Linear(2)(rng)))
    (row,) = cv.sites(cv.attach(named_as_a_key, doubled, where=hk.Linear), X)
    assert (row.path, row.rule) == ("linear", doubled)


def test_methods_may_be_chosen_by_name():
    model = ByHelper()
    params = model.init(KEY, X)
    loss = lambda model, method: lambda params: jnp.sum(model.apply(params, X, method=method) ** 2)
    attached = cv.attach(model, doubled, where="", methods="decode")
    for method, factor in (("encode", 1), ("decode", 2), ("__call__", 2)):
        own = jax.grad(loss(model, method))(params)
        assert_close(jax.grad(loss(attached, method))(params), jax.tree.map(lambda g, by=factor: by * g, own))


def test_captured_intermediates_and_tables_of_linen_are_the_same():
    made = linen_model()
    model, attached = made.model, cv.attach(made.model, doubled, where=nn.Dense)
    keys = {"params": KEY, "dropout": KEY}
    held = model.init(keys, *made.sample)
    run = lambda model: model.apply(held, *made.sample, rngs=keys, capture_intermediates=True, mutable=True)
    assert_same_bits(run(attached), run(model))
    assert attached.tabulate(keys, *made.sample) == model.tabulate(keys, *made.sample)


def test_an_attached_linen_model_may_be_bound_cloned_and_a_part_of_another():
    made = linen_model()
    attached = cv.attach(made.model, doubled, where="head")

    class Outer(nn.Module):
        part: nn.Module

        @nn.compact
        def __call__(self, x):
            return self.part(x, train=False) * nn.Dense(3)(x)

    params = Outer(made.model).init(KEY, *made.sample)
    loss = lambda model: lambda params: jnp.sum(model.apply(params, *made.sample) ** 2)
    for variant in (attached, attached.clone(), attached.copy()):
        assert_same_bits(Outer(variant).init(KEY, *made.sample), params)
        check_doubled(loss, params, Outer(made.model), Outer(variant), "head")
    held = attached.init(KEY, *made.sample, train=False)
    bound = lambda model: lambda held: jnp.sum(model.bind(held)(*made.sample, train=False) ** 2)
    check_doubled(bound, held, made.model, attached, "head")


def user_interceptor(next_fun, args, kwargs, context):
    """Somebody else's interceptor."""
    y = next_fun(*args, **kwargs)
    return 3 * y if type(context.module).__name__ in ("Dense", "Linear") and context.method_name == "__call__" else y


@pytest.mark.parametrize("intercepts", ["outside", "inside"])
@pytest.mark.parametrize("framework", ["linen", "haiku"])
def test_other_interceptors_run_once_wherever_they_stand(framework, intercepts):
    intercept = nn.intercept_methods if framework == "linen" else hk.intercept_methods
    dense = nn.Dense if framework == "linen" else hk.Linear

    def net(x):
        x = dense(6, name="first")(x)
        if intercepts == "outside":
            return dense(3, name="head")(x)
        with intercept(user_interceptor):
            return dense(3, name="head")(x)

    if framework == "linen":
        model: Any = nn.Module
        model = type("Net", (nn.Module,), {"__call__": nn.compact(lambda self, x: net(x))})()
        params, apply = model.init(KEY, X), lambda model, params: model.apply(params, X)
    else:
        model = hk.transform(net)
        params, apply = model.init(KEY, X), lambda model, params: model.apply(params, None, X)

    def loss(model):
        def of(params):
            if intercepts == "inside":
                return jnp.sum(apply(model, params) ** 2)
            with intercept(user_interceptor):
                return jnp.sum(apply(model, params) ** 2)

        return of

    check_doubled(loss, params, model, cv.attach(model, doubled, where="head"), "head")


def stacked(x):
    return hk.layer_stack(3)(lambda x: jnp.tanh(hk.Linear(6, name="dense")(x)))(x)


def hk_scanned(x):
    dense = hk.Linear(6, name="dense")
    return hk.scan(lambda x, _: (jnp.tanh(dense(x)), None), x, None, length=3)[0]


def hk_rematted(x):
    return hk.remat(hk.Linear(6, name="dense"))(x)


def hk_mapped(x):
    return hk.vmap(hk.Linear(6, name="dense"), split_rng=False)(x)


HAIKU = [stacked, hk_scanned, hk_rematted, hk_mapped]


@pytest.mark.parametrize("fn", HAIKU, ids=lambda fn: fn.__name__)
@pytest.mark.parametrize(("where", "chosen"), [("*dense", "dense"), (hk.Linear, "")])
def test_haiku_transforms(fn, where, chosen):
    model = hk.transform(lambda x: fn(hk.Linear(6, name="first")(x)))
    params = model.init(KEY, X)
    loss = lambda model: lambda params: jnp.sum(model.apply(params, None, X) ** 2)
    check_doubled(loss, params, model, cv.attach(model, doubled, where=where), chosen, exact=fn is not hk_mapped)


def test_haiku_methods_and_several_functions():
    def two():
        mlp, head = hk.nets.MLP([6, 3], name="mlp"), hk.Linear(3, name="head")
        return lambda x: head(mlp(x)), (mlp, lambda x: head(x[:, :6]))

    model = hk.multi_transform(two)
    params = model.init(KEY, X)
    attached = cv.attach(model, doubled, where="mlp*", must_match=False)
    loss = lambda model: lambda params: jnp.sum(model.apply[0](params, None, X) ** 2)
    own, found = jax.grad(loss(model))(params), jax.grad(loss(attached))(params)
    assert_close(found["mlp/~/linear_0"], jax.tree.map(lambda g: 4 * g, own["mlp/~/linear_0"]))  # MLP and its layer


class Layer(nnx.Module):
    """A dense layer and a method with a name."""

    def __init__(self, rngs):
        self.dense = nnx.Linear(6, 6, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.named(x)

    def named(self, x):
        return self.drop(jnp.tanh(self.dense(x)))


class NnxNet(nnx.Module):
    """Layers shared, called by a method, in a scan and under remat."""

    def __init__(self, rngs):
        self.first = self.other = Layer(rngs)
        self.stack = nnx.split_rngs(splits=3)(nnx.vmap(Layer, in_axes=0, out_axes=0))(rngs)
        self.layers = nnx.List([Layer(rngs)])

    def __call__(self, x):
        x = self.other(self.first.named(x))
        x = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.stack)
        return nnx.remat(lambda layer, x: layer(x))(self.layers[0], x)


@pytest.mark.parametrize(
    ("where", "chosen"),
    [("stack", "stack"), ("other", "first"), ("first/dense", "dense"), ("layers/0", "layers"), (Layer, "")],
)
def test_nnx_transforms_shared_modules_and_methods(where, chosen):
    model = NnxNet(nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)

    def loss(model):
        def of(params):
            graphdef, _, rest = nnx.split(model, nnx.Param, ...)
            return jnp.sum(nnx.merge(graphdef, params, rest, copy=True)(X) ** 2)

        return of

    if where == "first/dense":
        own, found = jax.grad(loss(model))(params), jax.grad(loss(cv.attach(model, doubled, where=where)))(params)
        assert_close(found["first"]["dense"]["kernel"][...], 2 * own["first"]["dense"]["kernel"][...])
        assert_close(found["layers"], own["layers"])
    else:
        check_doubled(loss, params, model, cv.attach(model, doubled, where=where), chosen)


class EquinoxNet(eqx.Module):
    """Layers in a scan, under checkpoint, and a method with a name."""

    stack: eqx.nn.Linear
    pair: list[eqx.nn.Linear]
    embed: eqx.nn.Embedding

    def __init__(self, key):
        keys = jax.random.split(key, 6)
        self.stack = eqx.filter_vmap(lambda key: eqx.nn.Linear(6, 6, key=key))(keys[:3])
        self.pair = [eqx.nn.Linear(6, 6, key=keys[3]), eqx.nn.Linear(6, 6, key=keys[4])]
        self.embed = eqx.nn.Embedding(3, 6, key=keys[5])

    def __call__(self, x):
        arrays, rest = eqx.partition(self.stack, eqx.is_array)
        x, _ = jax.lax.scan(lambda x, one: (jnp.tanh(eqx.combine(one, rest)(x)), None), x, arrays)
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(eqx.filter(one, eqx.is_array) for one in self.pair))
        static = eqx.filter(self.pair[0], eqx.is_array, inverse=True)
        x, _ = jax.lax.scan(lambda x, one: (jnp.tanh(eqx.combine(one, static)(x)), None), x, stacked)
        return eqx.filter_checkpoint(self.pair[1])(x) + self.embed(jnp.int32(1))


@pytest.mark.parametrize(
    ("where", "chosen"), [("stack", "stack"), (eqx.nn.Embedding, "embed"), ("pair/*", "pair"), (True, None)]
)
def test_equinox_loops_checkpoints_and_stacks_of_modules(where, chosen):
    model = EquinoxNet(KEY)
    attached = cv.attach(model, doubled, where=where)
    loss = lambda model: jnp.sum(model(X[0]) ** 2)
    own = jax.tree_util.tree_leaves_with_path(eqx.filter_grad(loss)(model))
    for grad in (eqx.filter_grad(loss), eqx.filter_jit(eqx.filter_grad(loss))):
        found = jax.tree_util.tree_leaves_with_path(grad(attached))
        assert [path for path, _ in found] == [path for path, _ in own]
        for (path, bar), (_, own_bar) in zip(found, own, strict=True):
            factor = 4 if chosen is None else 2 if chosen in jax.tree_util.keystr(path) else 1
            assert_close(bar, factor * own_bar)


def test_a_haiku_model_inside_of_a_linen_module_is_found_and_in_late_runs_too():
    inner = haiku_model()

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            params = self.param("inner", lambda key: inner.params)
            return nn.Dense(3)(inner.run(inner.model, params)[0]) + jnp.sum(x)

    model = Outer()
    params = model.init(KEY, X)
    loss = lambda model: lambda params: jnp.sum(model.apply(params, X) ** 2)
    attached = cv.attach(model, where=[(hk.Linear, doubled), (nn.Dense, doubled)])
    own = jax.grad(loss(model))(params)
    for around in (lambda loss: loss, jax.jit, jax.checkpoint):
        found = jax.grad(around(loss(attached)))(params)
        assert_close(found["params"]["inner"]["first"], jax.tree.map(lambda g: 2 * g, own["params"]["inner"]["first"]))
        assert_close(found["params"]["inner"]["norm"], own["params"]["inner"]["norm"])
        assert_close(found["params"]["Dense_0"], jax.tree.map(lambda g: 2 * g, own["params"]["Dense_0"]))


def test_a_rule_by_hand_around_an_attached_model_finds_its_rules_in_late_runs():
    made = linen_model()
    attached = cv.attach(made.model, doubled, where="head")
    by_hand = lambda model: doubled.lift(lambda params: made.run(model, params)[0])
    loss = lambda model: lambda params: jnp.sum(by_hand(model)(params) ** 2)
    # One by one, for the batch norm enlarges what the compiler rounds otherwise.
    bars = lambda model: one_by_one(jax.grad(jax.jit(loss(model))))(made.params)
    own, found = bars(made.model), bars(attached)
    assert_close(found["head"], jax.tree.map(lambda g: 2 * g, own["head"]))
    assert_close(found["first"], own["first"])
    with cv.rules_off():
        assert_same_bits(bars(attached), own)
