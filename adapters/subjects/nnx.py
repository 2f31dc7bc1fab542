"""Flax NNX: a module that holds the one under test, and its own stream of keys."""

from __future__ import annotations

import jax
from flax import nnx

from crossvjp.testing import Subject
from crossvjp.testing.common import CLASSES, FEATURES, HIDDEN, MOMENTUM, RATE, batch, mlp_numbers


def subjects() -> list[Subject]:
    """Makes the subjects."""
    return [_mlp(), _block()]


class _Mlp(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(FEATURES, HIDDEN, rngs=rngs)
        self.second = nnx.Linear(HIDDEN, CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.second(nnx.tanh(self.first(x)))


class _Block(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(FEATURES, HIDDEN, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(HIDDEN, momentum=MOMENTUM, rngs=rngs)
        self.dropout = nnx.Dropout(RATE, rngs=rngs)

    def __call__(self, x):
        return self.dropout(nnx.tanh(self.norm(self.dense(x))))


class _Net(nnx.Module):
    def __init__(self, kind, rngs):
        self.inner = kind(rngs)
        self.rngs = rngs


def _runner(graphdef):
    def run(variables, rest, use, x):
        net = nnx.merge(graphdef, variables, rest, copy=True)
        out = use(net.inner, x)
        drawn = jax.random.normal(net.rngs.dropout())
        return out, (nnx.state(net, nnx.Not(nnx.Param)), drawn)

    return run


def _mlp():
    net = _Net(_Mlp, nnx.Rngs(0, dropout=1))
    numbers = mlp_numbers()
    for i, layer in ((1, net.inner.first), (2, net.inner.second)):
        layer.kernel.set_value(numbers[f"kernel_{i}"])
        layer.bias.set_value(numbers[f"bias_{i}"])
    graphdef, variables, rest = nnx.split(net, nnx.Param, ...)

    def common(variables):
        inner = nnx.to_pure_dict(variables)["inner"]
        return {
            f"{name}_{i}": inner[layer][name]
            for i, layer in ((1, "first"), (2, "second"))
            for name in ("kernel", "bias")
        }

    return Subject("nnx mlp", variables, rest, (batch(),), _runner(graphdef), common, "mlp")


def _block():
    graphdef, variables, rest = nnx.split(_Net(_Block, nnx.Rngs(0, dropout=1)), nnx.Param, ...)
    return Subject("nnx block", variables, rest, (batch(),), _runner(graphdef))
