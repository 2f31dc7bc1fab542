"""What the tests of users' needs share: representative hosts, gradients, and a module that writes state."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from hosts import HOSTS, Host, the_input

import crossvjp

# One kind of handle a framework, and both modes of NNX; tests/test_contract.py has all kinds.
FRAMEWORKS = [HOSTS[name] for name in ("linen compact", "nnx graph", "nnx tree", "haiku module", "equinox", "plain")]
each_framework = pytest.mark.parametrize("host", FRAMEWORKS, ids=str)

# Late runs of a rule's functions are those of `grad_jit`.
OUTER = {"eager": lambda grad, loss: grad(loss), "grad_jit": lambda grad, loss: grad(jax.jit(loss))}
each_outer = pytest.mark.parametrize("outer", OUTER.values(), ids=OUTER)

# Both ways to write a rule, each once and one of them late: the mechanism below them is the same.
WAYS = [("rule", OUTER["grad_jit"]), ("custom_vjp", OUTER["eager"])]
each_way = pytest.mark.parametrize(("how", "outer"), WAYS, ids=["rule-grad_jit", "custom_vjp-eager"])


def times(number: Any) -> Any:
    """Makes a function that multiplies every array of a tree."""
    return lambda tree: jax.tree.map(lambda leaf: number * leaf, tree)


def tripled(bar: Any) -> Any:
    """Triples the variables' cotangent."""
    return bar.replace(variables=times(3)(bar.variables))


@crossvjp.rule
def triple(call, y_bar):
    """Triples the parameters' gradient: nine times, if it acted twice, where a sign would hide that."""
    return tripled(call.pullback(y_bar))


def scalar(use: Any) -> Any:
    """Makes a scalar of a use's output, with weights of both signs."""
    return lambda mdl, *args, **kwargs: jnp.sum(jnp.sin(use(mdl, *args, **kwargs)) * jnp.array([1.0, -2.0, 3.0]))


def gradients(host: Host, use: Any, *args: Any, params: Any = None, outer: Any = OUTER["eager"]) -> Any:
    """Differentiates with respect to the parameters and the input."""
    loss = lambda params, x: host.run(params, scalar(use), x, *args)
    grad = lambda loss: jax.grad(loss, argnums=(0, 1))
    return outer(grad, loss)(host.params if params is None else params, the_input())


@dataclasses.dataclass(frozen=True)
class Keeper:
    """A module with a parameter `w` that gives `w * x` and adds it to a total, which is its state.

    Args:
        name: the framework.
        writes: whether the module writes its state; otherwise the state is an input and an output.
        run: `(use, w, total, x) -> (y, new_total)`, with `use(mdl, *args)` as `mdl(*args)`.
    """

    name: str
    writes: bool
    run: Callable[..., Any]

    def __repr__(self) -> str:
        return self.name


def linen_keeper() -> Keeper:
    """The state is a collection."""

    class Keep(nn.Module):
        @nn.compact
        def __call__(self, x):
            w = self.param("w", nn.initializers.ones, ())
            total = self.variable("state", "total", jnp.zeros, ())
            total.value = total.value + w * x
            return w * x

    class Net(nn.Module):
        use: Any

        @nn.compact
        def __call__(self, x):
            return self.use(Keep(), x)

    def run(use, w, total, x):
        variables = {"params": {"Keep_0": {"w": w}}, "state": {"Keep_0": {"total": total}}}
        out: Any = Net(use).apply(variables, x, mutable=["state"])
        return out[0], out[1]["state"]["Keep_0"]["total"]

    return Keeper("linen", True, run)


class Total(nnx.Variable):
    """The state of the NNX module."""


def nnx_keeper(*, graph: bool) -> Keeper:
    """The state is a Variable."""

    class Keep(nnx.Module):
        def __init__(self, w, total):
            self.w = nnx.Param(w)
            self.total = Total(total)

        def __call__(self, x):
            self.total.set_value(self.total.get_value() + self.w.get_value() * x)
            return self.w.get_value() * x

    def run(use, w, total, x):
        with nnx.set_graph_mode(graph), nnx.set_graph_updates(graph):
            keep = Keep(w, total)
            y = use(keep, x)
            return y, keep.total.get_value()

    return Keeper(f"nnx {'graph' if graph else 'tree'}", True, run)


def haiku_keeper() -> Keeper:
    """The state is Haiku's."""

    class Keep(hk.Module):
        def __call__(self, x):
            w = hk.get_parameter("w", (), init=jnp.ones)
            hk.set_state("total", hk.get_state("total", (), init=jnp.zeros) + w * x)
            return w * x

    transformed = hk.transform_with_state(lambda use, x: use(Keep(), x))

    def run(use, w, total, x):
        y, state = transformed.apply({"keep": {"w": w}}, {"keep": {"total": total}}, None, use, x)
        return y, state["keep"]["total"]

    return Keeper("haiku", True, run)


def equinox_keeper() -> Keeper:
    """The state is an `eqx.nn.State`."""

    class Keep(eqx.Module):
        w: Any
        total: eqx.nn.StateIndex

        def __init__(self, w, total):
            self.w = w
            self.total = eqx.nn.StateIndex(total)

        def __call__(self, x, state):
            return self.w * x, state.set(self.total, state.get(self.total) + self.w * x)

    def run(use, w, total, x):
        keep, state = eqx.nn.make_with_state(Keep)(w, total)
        y, state = use(keep, x, state)
        return y, state.get(keep.total)

    return Keeper("equinox", False, run)


def plain_keeper() -> Keeper:
    """The state is an array."""

    def keep(w, x, total):
        return w * x, total + w * x

    return Keeper("plain", False, lambda use, w, total, x: use(jax.tree_util.Partial(keep, w), x, total))


KEEPERS = [linen_keeper(), nnx_keeper(graph=True), nnx_keeper(graph=False), haiku_keeper()]
KEEPERS += [equinox_keeper(), plain_keeper()]
each_keeper = pytest.mark.parametrize("keeper", KEEPERS, ids=str)
each_writing_keeper = pytest.mark.parametrize("keeper", [keeper for keeper in KEEPERS if keeper.writes], ids=str)
