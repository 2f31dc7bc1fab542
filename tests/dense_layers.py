"""The dense and convolutional layers of every framework, called on a batch with or without a rule."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
from flax import nnx

import crossvjp as cv


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer.

    Args:
        variables: its parameters, in the framework's containers.
        run: `run(rule, variables, x)` calls it under a rule, or alone if the rule is `None`.
        x: the shape of a batch of inputs.
    """

    variables: Any
    run: Callable[..., Any]
    x: tuple[int, ...]

    def pull(self, rule: cv.Rule | None, x: Any, y_bar: Any) -> tuple[Any, Any]:
        """Gives the cotangents of the variables and of `x`."""
        return jax.vjp(lambda variables, x: self.run(rule, variables, x), self.variables, x)[1](y_bar)

    @property
    def kernel(self) -> Any:
        """The kernel, in the framework's layout."""
        return max(jax.tree.leaves(self.variables), key=lambda leaf: leaf.ndim)

    def with_kernel(self, kernel: Any) -> Layer:
        """Gives the layer with another kernel."""
        most = self.kernel.ndim
        changed = jax.tree.map(lambda leaf: kernel if leaf.ndim == most else leaf, self.variables)
        return dataclasses.replace(self, variables=changed)


def linen(make: Callable[[], Any], shape: tuple[int, ...]) -> Layer:
    class Net(nn.Module):
        rule: Any

        @nn.compact
        def __call__(self, x):
            layer = make()
            return self.rule(layer)(x) if self.rule else layer(x)

    variables = Net(None).init(jax.random.key(0), jax.numpy.zeros(shape))
    return Layer(variables, lambda rule, variables, x: Net(rule).apply(variables, x), shape)


def of_nnx(make: Callable[[nnx.Rngs], Any], shape: tuple[int, ...]) -> Layer:
    graphdef, state = nnx.split(make(nnx.Rngs(0)))

    def run(rule, state, x):
        layer = nnx.merge(graphdef, state, copy=True)
        return rule(layer)(x) if rule else layer(x)

    return Layer(state, run, shape)


def haiku(make: Callable[[], Any], shape: tuple[int, ...]) -> Layer:
    net = hk.transform(lambda rule, x: rule(make())(x) if rule else make()(x))
    params = net.init(jax.random.PRNGKey(0), None, jax.numpy.zeros(shape))
    return Layer(params, lambda rule, params, x: net.apply(params, None, rule, x), shape)


def equinox(make: Callable[[Any], Any], shape: tuple[int, ...]) -> Layer:
    """Equinox layers take one example, so the rule is put on their batched call."""
    params, static = eqx.partition(make(jax.random.key(0)), eqx.is_inexact_array)
    batched = lambda layer, x: jax.vmap(layer)(x)

    def run(rule, params, x):
        return (rule.lift(batched) if rule else batched)(eqx.combine(params, static), x)

    return Layer(params, run, shape)


DENSE = {
    "linen": linen(lambda: nn.Dense(3), (7, 5)),
    "linen without bias": linen(lambda: nn.Dense(3, use_bias=False), (7, 5)),
    "nnx": of_nnx(lambda rngs: nnx.Linear(5, 3, rngs=rngs), (7, 5)),
    "haiku": haiku(lambda: hk.Linear(3), (7, 5)),
    "equinox": equinox(lambda key: eqx.nn.Linear(5, 3, key=key), (7, 5)),
    "equinox without bias": equinox(lambda key: eqx.nn.Linear(5, 3, use_bias=False, key=key), (7, 5)),
}

CONVOLUTIONS = {
    "linen": linen(lambda: nn.Conv(3, (3, 3), strides=2), (2, 4, 4, 2)),
    "nnx": of_nnx(lambda rngs: nnx.Conv(2, 3, (3, 3), rngs=rngs), (2, 4, 4, 2)),
    "haiku, channels first": haiku(lambda: hk.Conv2D(3, 3, data_format="NCHW"), (2, 2, 4, 4)),
    "equinox": equinox(lambda key: eqx.nn.Conv2d(2, 3, 3, key=key), (2, 2, 4, 4)),
}
