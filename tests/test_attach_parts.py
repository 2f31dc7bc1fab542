"""Attached models as parts of others, inside of wrappers, and reached by other ways than their `__call__`."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from models import x_of

import crossvjp as cv
from crossvjp.extend import Same
from crossvjp.testing import assert_close

KEY = jax.random.key(0)
X = x_of(4, 6)


class Times(cv.Rule):
    """Multiplies the gradient of the parameters."""

    factor: Any = 2.0

    def backward(self, call, y_bar):
        """Scales it."""
        bar = call.pullback(y_bar)
        return bar.replace(variables=jax.tree.map(lambda g: self.factor * g, bar.variables))


def times(factor: float, tree: Any) -> list[Any]:
    """Gives the leaves of a tree, multiplied."""
    return [factor * leaf for leaf in jax.tree.leaves(tree)]


class LinenPart(nn.Module):
    """Two layers."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(6, name="head")(nn.Dense(6, name="body")(x))


class LinenOuter(nn.Module):
    """Those and another one."""

    part: nn.Module

    @nn.compact
    def __call__(self, x):
        return nn.Dense(6, name="head")(self.part(x))


class NnxPart(nnx.Module):
    """Two layers."""

    def __init__(self):
        self.head = nnx.Linear(6, 6, rngs=nnx.Rngs(0))
        self.body = nnx.Linear(6, 6, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.head(self.body(x))


class NnxOuter(nnx.Module):
    """Those and another one."""

    def __init__(self, part):
        self.part = part
        self.head = nnx.Linear(6, 6, rngs=nnx.Rngs(2))

    def __call__(self, x):
        return self.head(self.part(x))


def eqx_linear(seed: int) -> eqx.nn.Linear:
    """Makes a layer."""
    return eqx.nn.Linear(6, 6, key=jax.random.key(seed))


class EquinoxPart(eqx.Module):
    """Two layers."""

    head: eqx.nn.Linear
    body: eqx.nn.Linear

    def __call__(self, x):
        return self.encode(x)

    def encode(self, x):
        return self.head(self.body(x))


class EquinoxOuter(eqx.Module):
    """Those and another one."""

    part: EquinoxPart
    head: eqx.nn.Linear

    def __call__(self, x):
        return self.head(self.part(x))


def linen_bars(model: Any) -> Any:
    """Gives the gradients by layer."""
    params = LinenOuter(LinenPart()).init(KEY, X)
    return jax.grad(lambda params: jnp.sum(model.apply(params, X) ** 2))(params)["params"]


def nnx_bars(model: Any) -> Any:
    """Gives the gradients by layer."""
    return nnx.to_pure_dict(nnx.grad(lambda model: jnp.sum(model(X) ** 2))(model))


def equinox_bars(model: Any) -> Any:
    """Gives the gradients by layer."""
    bars = eqx.filter_grad(lambda model: jnp.sum(model(X[0]) ** 2))(model)
    part = {"head": bars.part.head, "body": bars.part.body}
    return jax.tree.map(lambda layer: [layer.weight, layer.bias], {"part": part, "head": bars.head}, is_leaf=_is_layer)


def _is_layer(node: Any) -> bool:
    return isinstance(node, eqx.nn.Linear)


PARTS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], Callable[[Any], Any]]] = {
    "linen": (LinenPart, LinenOuter, linen_bars),
    "nnx": (NnxPart, NnxOuter, nnx_bars),
    "equinox": (
        lambda: EquinoxPart(eqx_linear(0), eqx_linear(1)),
        lambda p: EquinoxOuter(p, eqx_linear(2)),
        equinox_bars,
    ),
}


@pytest.mark.parametrize("name", sorted(PARTS))
def test_an_attached_part_keeps_its_rules_when_others_are_attached_to_the_whole(name):
    part, outer, bars_of = PARTS[name]
    own = bars_of(outer(part()))
    attached = outer(cv.attach(part(), Times(), where="head"))
    once = cv.attach(attached, Times(3.0), where="head")
    twice = cv.attach(once, Times(5.0), where="part/head")
    for model, of_head, of_part in ((attached, 1, 2), (once, 3, 2), (twice, 3, 10)):
        bars = bars_of(copy.deepcopy(model))
        assert_close(jax.tree.leaves(bars["head"]), times(of_head, own["head"]))
        assert_close(jax.tree.leaves(bars["part"]["head"]), times(of_part, own["part"]["head"]))
        assert_close(bars["part"]["body"], own["part"]["body"])
    with pytest.raises(cv.ArgumentError, match=r"'head' of class \w+ has two rules"):
        bars_of(cv.attach(once, Times(5.0), where="head"))


class Waiting(nnx.Module):
    """A layer that stops in the middle of a call, in one thread."""

    def __init__(self):
        self.dense = nnx.Linear(6, 3, rngs=nnx.Rngs(0))

    def __call__(self, x):
        if threading.current_thread().name == "slow":
            ENTERED.set()
            assert GO_ON.wait(60)
        return self.dense(x)


ENTERED, GO_ON = threading.Event(), threading.Event()


def test_a_thread_without_rules_does_not_take_them_from_the_nnx_model_of_another():
    attached = cv.attach(Waiting(), Times(), where="")
    bars = nnx.grad(lambda model: jnp.sum(model(X)))

    def without_rules():
        with cv.rules_off():
            attached(X)

    own = bars(cv.detach(attached))
    slow = threading.Thread(target=without_rules, name="slow")
    slow.start()
    assert ENTERED.wait(60)
    during = bars(attached)
    GO_ON.set()
    slow.join()
    assert_close(jax.tree.leaves(during), times(2, own))
    assert_close(jax.tree.leaves(bars(attached)), times(2, own))


class Containers(nnx.Module):
    """Layers in all that NNX can hold, and a child that knows its parent."""

    def __init__(self):
        layer = lambda: nnx.Linear(6, 6, rngs=nnx.Rngs(0))
        self.by_name = nnx.Dict(a=layer())
        self.chain = nnx.Sequential(layer(), jax.nn.relu, layer())
        self.plain = nnx.data({"z": (layer(),)})
        self.child = Child(self, layer())

    def __call__(self, x):
        return self.child(self.plain["z"][0](self.chain(self.by_name["a"](x))))


class Child(nnx.Module):
    """A layer that counts its calls."""

    def __init__(self, parent, dense):
        self.parent, self.dense, self.calls = parent, dense, nnx.Variable(jnp.zeros(()))

    def __call__(self, x):
        self.calls[...] += 1
        return self.dense(x)


def test_nnx_modules_are_found_in_tuples_dicts_and_cycles():
    model = Containers()
    attached = cv.attach(model, where=[(Child, None), (nnx.Linear, Times())])
    bars = nnx.grad(lambda model: jnp.sum(model(X) ** 2))
    assert_close(jax.tree.leaves(bars(attached)), times(2, bars(model)))
    again, calls = cv.attach(model, Times(), where=Child), model.child.calls[...]
    assert_close(jax.tree.leaves(bars(again)["child"]), times(2, bars(model)["child"]))
    assert again.child.calls[...] == calls + 1
    found = [row.path for row in cv.sites(attached, X) if row.rule is not None]
    assert found == ["by_name/a", "chain/layers/0", "chain/layers/2", "plain/z/0", "child/dense"]


@pytest.mark.parametrize("where", [EquinoxPart, eqx.nn.Linear, "__self__/head"], ids=str)
def test_a_bound_method_of_an_equinox_module_is_a_model(where):
    part = EquinoxPart(eqx_linear(0), eqx_linear(1))
    bars = eqx.filter_grad(lambda encode: jnp.sum(encode(X[0]) ** 2))
    own = bars(part.encode).__self__
    attached = cv.attach(part.encode, Times(), where=where)
    found = bars(attached).__self__
    assert_close(jax.tree.leaves(found.head), times(2, own.head))
    assert_close(jax.tree.leaves(found.body), times(1 if isinstance(where, str) else 2, own.body))
    assert_close(jax.tree.leaves(bars(cv.detach(attached))), jax.tree.leaves(own))


class LinenNet(nn.Module):
    """A network with a method beside `__call__`."""

    def setup(self):
        self.head, self.body = nn.Dense(3), nn.Dense(6)

    def encode(self, x):
        return self.head(self.body(x))

    def __call__(self, x):
        return self.encode(x)


METHODS = {
    "a name": "encode",
    "a function of the class": LinenNet.encode,
    "a method of the plain model": LinenNet().encode,
    "a function": lambda model, x: model.head(model.body(x)),
}


@pytest.mark.parametrize("how", sorted(METHODS))
def test_whatever_linens_apply_gets_as_method_runs_under_the_rules(how):
    model, method = LinenNet(), METHODS[how]
    params = model.init(KEY, X)
    attached = cv.attach(model, Times(), where="head")
    bars = lambda model: jax.grad(lambda params: jnp.sum(model.apply(params, X, method=method) ** 2))(params)["params"]
    own, found = bars(model), bars(attached)
    assert_close(jax.tree.leaves(found["head"]), times(2, own["head"]))
    assert_close(found["body"], own["body"])
    assert_close(attached.init(KEY, X, method=method), params)


WRAPPERS = {"without_apply_rng": hk.without_apply_rng, "jit": lambda pair: pair._replace(apply=jax.jit(pair.apply))}


@pytest.mark.parametrize("how", sorted(WRAPPERS))
def test_a_haiku_pair_around_an_attached_one_can_be_detached_and_attached_to(how):
    model = hk.transform(lambda x: hk.Linear(3, name="head")(hk.Linear(6, name="body")(x)))
    params = model.init(KEY, X)
    around = WRAPPERS[how](cv.attach(model, Times(), where="head"))
    keys = () if how == "without_apply_rng" else (None,)
    bars = lambda pair: jax.grad(lambda params: jnp.sum(pair.apply(params, *keys, X) ** 2))(params)
    own = bars(WRAPPERS[how](model))
    for pair, of_head, of_body in (
        (around, 2, 1),
        (cv.attach(around, Times(3.0), where="body"), 2, 3),
        (cv.detach(around), 1, 1),
    ):
        found = bars(pair)
        assert_close(jax.tree.leaves(found["head"]), times(of_head, own["head"]))
        assert_close(jax.tree.leaves(found["body"]), times(of_body, own["body"]))


def test_a_site_whose_module_is_gone_is_not_taken_for_one_that_came_in_its_place():
    class Empty:
        pass

    gone = Empty()
    site, address = Same(gone), id(gone)
    assert site == Same(gone) != Same(Empty())
    del gone
    held = [Empty()]
    while id(held[-1]) != address and len(held) < 10_000:
        held.append(Empty())
    assert id(held[-1]) == address
    assert hash(Same(held[-1])) == hash(site)
    assert Same(held[-1]) != site


def test_a_function_around_an_attached_one_is_not_taken_for_it():
    attached = cv.attach(lambda w: w**2, Times(), where=True)

    @functools.wraps(attached)
    def threefold(w):
        return 3 * attached(w)

    for around, factor in ((threefold, 3.0), (jax.jit(attached), 1.0)):
        assert_close(jax.grad(around)(2.0), jnp.float32(8.0 * factor))
        plain = cv.detach(around)
        assert_close(jnp.stack([plain(2.0), jax.grad(plain)(2.0)]), jnp.full(2, 4.0 * factor))
