"""Channels out of the backward pass: three kinds, in every use, as the variable of every framework."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import crossvjp as cv
from crossvjp.adapters.nnx import ChannelVariable

W, X = jnp.ones(4), jnp.arange(4.0)
XS = jnp.stack([X, X, X])


class Probe(cv.Rule):
    """Sends the norm of the cotangent that flows in."""

    tap: cv.Channel

    def backward(self, call, y_bar):
        return call.pullback(y_bar).with_fields(tap=self.tap.emit(jnp.linalg.norm(y_bar)))


def once(tap, w, scale=1.0, x=X):
    return scale * jnp.sum(Probe(tap).lift(lambda w, x: jnp.sin(w * x))(w, x))


USES = {  # what is sent is 2 for each unit of scale, four ones having the norm 2: the sum, the count
    "one use": (lambda tap: once(tap, W), 2.0, 1),
    "two uses": (lambda tap: once(tap, W) + once(tap, W, 2.0), 6.0, 2),
    "scan": (lambda tap: jax.lax.scan(lambda c, _: (c + once(tap, W), None), 0.0, None, length=3)[0], 6.0, 3),
    "vmap": (lambda tap: jnp.sum(jax.vmap(lambda s, x: once(tap, W, s, x))(jnp.array([1.0, 2.0, 3.0]), XS)), 12.0, 3),
    "remat": (lambda tap: jax.checkpoint(once)(tap, W), 2.0, 1),
    "a branch that is not taken": (lambda tap: jax.lax.cond(W[0] > 5, lambda: once(tap, W), lambda: 0.0), 0.0, 0),
    "none": (lambda tap: jnp.sum(W), 0.0, 0),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("around", [lambda run: run, jax.jit], ids=["eager", "jit"])
def test_a_sum_has_the_sum_and_the_count(use, around):
    loss, total, count = USES[use]
    bar = around(jax.grad(loss))(cv.Sum())
    settled = cv.Sum().settle(bar)
    np.testing.assert_allclose([settled.value, settled.count], [total, count], rtol=1e-6)
    np.testing.assert_allclose(settled.mean, total / max(count, 1), rtol=1e-6)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("around", [lambda run: run, jax.jit], ids=["eager", "jit"])
def test_an_overwrite_has_the_mean_of_what_was_sent_or_the_old_value(use, around):
    loss, total, count = USES[use]
    old = cv.Overwrite(9.0)
    settled = old.settle(around(jax.grad(loss))(old))
    np.testing.assert_allclose(settled.value, total / count if count else 9.0, rtol=1e-6)
    assert float(settled.count) == 0


def test_plain_overwriting_is_wrong_in_all_uses_but_one():
    wrong = {name: float(jax.grad(loss)(cv.Overwrite(9.0)).value) for name, (loss, _, _) in USES.items()}
    right = {name: total / count if count else 9.0 for name, (_, total, count) in USES.items()}
    assert [name for name in USES if wrong[name] == pytest.approx(right[name])] == ["one use", "remat"]


@pytest.mark.parametrize(
    "loss",
    [
        lambda taps, scales: jax.lax.scan(lambda c, ts: (c + once(ts[0], W, ts[1]), None), 0.0, (taps, scales))[0],
        lambda taps, scales: jnp.sum(jax.vmap(lambda tap, scale, x: once(tap, W, scale, x))(taps, scales, XS)),
    ],
    ids=["scan", "vmap"],
)
def test_a_stack_keeps_steps_and_lanes_apart(loss):
    bar = jax.jit(jax.grad(loss))(cv.Stack(3), jnp.array([1.0, 2.0, 3.0]))
    np.testing.assert_allclose(bar.value, [2.0, 4.0, 6.0], rtol=1e-6)
    np.testing.assert_array_equal(bar.count, jnp.ones(3))


def test_a_channel_carries_a_tree():
    class Moments(cv.Rule):
        tap: cv.Channel

        def backward(self, call, y_bar):
            bar = call.pullback(y_bar)
            return bar.with_fields(tap=self.tap.emit({"mean": jnp.mean(y_bar), "w_bar": bar.variables}))

    tap = cv.Sum({"mean": jnp.zeros(()), "w_bar": jnp.zeros(4)})
    bar = jax.grad(lambda tap: 3 * jnp.sum(Moments(tap).lift(lambda w, x: w * x)(W, X)))(tap)
    np.testing.assert_allclose(bar.value["mean"], 3.0)
    np.testing.assert_allclose(bar.value["w_bar"], 3 * X)


def test_the_parts_of_a_channel_count_alike_where_only_some_differ_between_lanes():
    class Sends(cv.Rule):
        state: cv.Overwrite

        def backward(self, call, y_bar):
            sent = {"a": y_bar, "b": self.state.value["b"] + 1, "c": y_bar}
            return call.pullback(y_bar).with_fields(state=self.state.emit(sent))

    def loss(rule):
        return jnp.sum(jax.vmap(rule(jnp.sin))(jnp.arange(4.0)) * jnp.arange(1.0, 5.0))

    rule = Sends(cv.Overwrite({"a": 7.0, "b": 0.0, "c": 7.0}))
    found = cv.settle(rule, jax.grad(loss)(rule))[0].state.value
    assert {name: float(leaf) for name, leaf in found.items()} == {"a": 2.5, "b": 1.0, "c": 2.5}


@pytest.mark.parametrize("around", [lambda run: run, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize(("kind", "expected"), [(cv.Sum(), 6.0), (cv.Overwrite(9.0), 2.0)], ids=["sum", "overwrite"])
def test_a_mutable_channel_is_written_without_being_differentiated(kind, expected, around):
    tap = kind.to_refs()
    loss = around(lambda w: jax.lax.scan(lambda c, _: (c + once(tap, w), None), 0.0, None, length=3)[0])
    w_bar = jax.grad(loss)(W)
    np.testing.assert_allclose(w_bar, jax.grad(lambda w: 3 * jnp.sum(jnp.sin(w * X)))(W), rtol=1e-6)
    np.testing.assert_allclose(tap.to_arrays().value, expected, rtol=1e-6)


def test_a_mutable_channel_is_written_once_under_remat():
    tap = cv.Sum().to_refs()
    jax.block_until_ready(jax.grad(jax.checkpoint(lambda w: jnp.sin(once(tap, w, 0.5))))(W))
    np.testing.assert_allclose(tap.to_arrays().value, np.abs(np.cos(once(cv.Sum(), W, 0.5))), rtol=1e-5)
    assert float(tap.to_arrays().count) == 1


def test_a_mutable_channel_under_vmap_is_an_error_of_jax():
    tap = cv.Sum().to_refs()
    with pytest.raises(Exception, match="vmapped value on an unbatched array reference"):
        jax.grad(lambda w: jnp.sum(jax.vmap(lambda x: once(tap, w, 1.0, x))(XS)))(W)


def test_a_channel_that_nobody_differentiates_costs_nothing():
    plain = lambda w: jnp.sum(cv.rule(lambda c, y: c.pullback(y)).lift(lambda w, x: jnp.sin(w * x))(w, X))
    programs = [jax.jit(jax.grad(loss)).lower(W).compile() for loss in (plain, lambda w: once(cv.Sum(), w))]
    costs: list[Any] = [program.cost_analysis() for program in programs]
    assert costs[0]["flops"] == costs[1]["flops"]
    assert costs[0]["bytes accessed"] == costs[1]["bytes accessed"]


@pytest.mark.parametrize("value", [jnp.array(1), np.arange(3), {"n": jnp.array(True)}, 2, "x"], ids=repr)
def test_a_channel_of_another_type_than_floating_is_an_error(value):
    with pytest.raises(cv.ArgumentError, match=r"must be of floating arrays.*integers have none. Carry it as a float"):
        cv.Overwrite(value)
    with pytest.raises(cv.ArgumentError, match="must be of floating arrays"):
        cv.Sum(value)


@pytest.mark.parametrize("make", [lambda: cv.Overwrite({}), lambda: cv.Sum(None)])
def test_a_channel_of_nothing_is_an_error(make):
    with pytest.raises(cv.ArgumentError, match="must have a floating array, but has no leaf"):
        make()


@pytest.mark.parametrize("length", [0, -1, 1.0, True])
def test_a_stack_has_at_least_one_place(length):
    with pytest.raises(cv.ArgumentError, match=f"`length` must be an integer >= 1, but is {length!r}"):
        cv.Stack(length)


def test_a_stack_of_mutable_arrays_is_an_error():
    with pytest.raises(cv.ArgumentError, match="told apart by scan or vmap"):
        cv.Stack(2).to_refs()


@pytest.mark.parametrize(
    ("value", "message"),
    [(jnp.ones(3), r"must send float32\[\] at its root, but got shape \[3\]"), ({"a": 1.0}, "can't send PyTreeDef")],
)
def test_what_is_sent_must_look_like_the_channel(value, message):
    with pytest.raises(cv.ArgumentError, match=message):
        cv.Sum().emit(value)


class Linen(nn.Module):
    """Two layers, each with a channel."""

    @nn.compact
    def __call__(self, x):
        norm, last = cv.channel(self, "norm", cv.Sum()), cv.channel(self, "last", cv.Overwrite(7.0))
        return Probe(last)(nn.Dense(4))(Probe(norm)(nn.Dense(4))(x))


class Haiku(hk.Module):
    """Two layers, each with a channel."""

    def __call__(self, x):
        norm, last = cv.channel(self, "norm", cv.Sum()), cv.channel(self, "last", cv.Overwrite(7.0))
        return Probe(last)(hk.Linear(4))(Probe(norm)(hk.Linear(4))(x))


class Nnx(nnx.Module):
    """Two layers, each with a channel."""

    def __init__(self):
        self.first, self.second = (nnx.Linear(4, 4, rngs=nnx.Rngs(0)) for _ in range(2))
        self.channels()

    def channels(self):
        return cv.channel(self, "norm", cv.Sum()), cv.channel(self, "last", cv.Overwrite(7.0))

    def __call__(self, x):
        norm, last = self.channels()
        return Probe(last)(self.second)(Probe(norm)(self.first)(x))


class Equinox(eqx.Module):
    """Two layers, each with a channel."""

    first: eqx.nn.Linear
    second: eqx.nn.Linear
    norm: cv.Channel
    last: cv.Channel

    def __call__(self, x):
        norm, last = cv.channel(self, "norm", cv.Sum()), cv.channel(self, "last", cv.Overwrite(7.0))
        return Probe(last)(self.second)(Probe(norm)(self.first)(x))


def linen():
    variables = Linen().init(jax.random.key(0), X)
    return variables, lambda held: Linen().apply(held, X)


def haiku():
    transformed = hk.without_apply_rng(hk.transform(lambda x: Haiku()(x)))
    return transformed.init(jax.random.key(0), X), lambda held: transformed.apply(held, X)


def graph():
    graphdef, state, rest = nnx.split(Nnx(), (nnx.Param, ChannelVariable), ...)
    return state, lambda held: nnx.merge(graphdef, held, rest)(X)


def equinox():
    first, second = (eqx.nn.Linear(4, 4, key=jax.random.key(i)) for i in range(2))
    model = Equinox(first, second, cv.Sum(), cv.Overwrite(7.0))
    arrays, static = eqx.partition(model, eqx.is_inexact_array)
    return arrays, lambda held: eqx.combine(held, static)(X)


def plain():
    def run(held):
        norm, last = cv.channel(held, "norm", cv.Sum()), cv.channel(held, "last", cv.Overwrite(7.0))
        y = Probe(norm).lift(lambda w, x: x @ w)(held["first"], X)
        return Probe(last).lift(lambda w, x: x @ w)(held["second"], y)

    w = jnp.sin(jnp.arange(16.0)).reshape(4, 4)
    return {"first": w, "second": w.T, "norm": cv.Sum(), "last": cv.Overwrite(7.0)}, run


MODELS = {"linen": linen, "haiku": haiku, "nnx": graph, "equinox": equinox, "plain": plain}


def named(tree):
    return {path.split("/")[-1]: found for path, found in cv.channels(tree).items()}


@pytest.mark.parametrize("framework", MODELS)
@pytest.mark.parametrize("around", [lambda run: run, jax.jit], ids=["eager", "jit"])
def test_a_channel_is_a_variable_of_each_framework(framework, around):
    held, run = MODELS[framework]()
    loss = lambda held: 3 * jnp.sum(run(held))
    bars = around(jax.grad(loss))(held)
    sent = named(bars)
    assert float(sent["last"].value) == pytest.approx(6.0)
    assert float(sent["norm"].count) == 1
    new, rest = cv.settle(held, bars)
    assert jax.tree.structure(new) == jax.tree.structure(held)
    assert float(named(new)["last"].value) == pytest.approx(6.0)
    assert float(named(new)["norm"].value) == pytest.approx(float(sent["norm"].value))
    assert not any(map(jnp.any, jax.tree.leaves(named(rest))))
    stepped = optax.apply_updates(new, jax.tree.map(lambda g: -0.1 * g, rest))
    assert float(named(stepped)["last"].value) == pytest.approx(6.0)
    others = [jnp.any(a != b) for a, b in zip(jax.tree.leaves(stepped), jax.tree.leaves(new), strict=True)]
    assert any(others)


def test_an_nnx_module_is_updated_with_settled_channels():
    model = Nnx()
    chosen = (nnx.Param, ChannelVariable)
    bars = nnx.grad(lambda model: 3 * jnp.sum(model(X)), argnums=nnx.DiffState(0, chosen))(model)
    nnx.update(model, cv.settle(nnx.state(model, chosen), bars)[0])
    last = vars(model)["last"]  # made by `channel`
    assert float(last.get_value().value) == pytest.approx(6.0)


def test_linen_runs_without_channels_where_none_are_given():
    variables = Linen().init(jax.random.key(0), X)
    run: Any = Linen().apply
    bars = jax.grad(lambda params: jnp.sum(run({"params": params}, X)))(variables["params"])
    expected = jax.grad(lambda v: jnp.sum(run(v, X)))(variables)["params"]
    jax.tree.map(np.testing.assert_array_equal, bars, expected)


@pytest.mark.parametrize(
    ("mdl", "message"),
    [
        ({"w": W}, "dict has no channel 'norm'.*Give it an entry 'norm'"),
        (eqx.nn.Linear(4, 4, key=jax.random.key(0)), "Linear has no channel 'norm'.*Give it a field 'norm'"),
        ({"norm": W}, "'norm' of this dict must be a channel, but is"),
    ],
    ids=["dict", "equinox", "array"],
)
def test_a_channel_that_is_not_there_is_an_error(mdl, message):
    with pytest.raises(cv.ArgumentError, match=message):
        cv.channel(mdl, "norm", cv.Sum())


def test_a_channel_is_made_of_a_channel():
    with pytest.raises(cv.ArgumentError, match="`initial` must be a Sum, an Overwrite or a Stack"):
        cv.channel({"w": W}, "norm", 0.0)  # pyright: ignore[reportArgumentType]  on purpose


def test_settling_needs_the_gradients_of_the_channels():
    with pytest.raises(cv.ArgumentError, match="differentiate with respect to the channels too"):
        cv.settle({"w": W, "norm": cv.Sum()}, {"w": W})
