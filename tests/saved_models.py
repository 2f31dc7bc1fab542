"""Small models of the four frameworks, named on the command line by `test_cli_migrate.py`."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
from flax import nnx

NOT_A_MODEL = 3
PAIR = (jnp.ones((2, 2)), jnp.ones(2))


def haiku() -> Any:
    return hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([4, 3])(x)))


class Linen(nn.Module):
    """The same in Linen."""

    width: int = 4

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.Dense(3)(nn.relu(nn.Dense(self.width)(x)))


class Nnx(nnx.Module):
    """The same in NNX, with a random stream."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.a, self.b = nnx.Linear(2, 4, rngs=rngs), nnx.Linear(4, 3, rngs=rngs)
        self.dropout = nnx.Dropout(0.0, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.b(self.dropout(nnx.relu(self.a(x))))


def equinox() -> Any:
    return eqx.nn.MLP(2, 3, 4, 1, key=jax.random.key(0))


def batched(mdl: Any, x: Any) -> Any:
    return jax.vmap(mdl)(x)


def doubled(mdl: Any, x: Any) -> Any:
    return (batched(mdl, x), batched(mdl, x))


def wide() -> Any:
    return Linen(5)


class Tanh(nn.Module):
    """Another function of the same parameters."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.Dense(3)(nn.tanh(nn.Dense(4)(x)))


def half_linen() -> Any:
    return nn.Sequential([nn.Dense(4, param_dtype=jnp.bfloat16), nn.relu, nn.Dense(3, param_dtype=jnp.bfloat16)])


def two() -> Any:
    return hk.without_apply_rng(hk.transform(lambda x: hk.Linear(2, name="second")(hk.Linear(2, name="first")(x))))


class Crossed(nn.Module):
    """Layers of one shape, whose names and order of calls say different things."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.Dense(2, name="first")(nn.Dense(2, name="second")(x))


class Deeper(nn.Module):
    """A layer more."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.LayerNorm()(nn.Dense(3)(nn.relu(nn.Dense(4)(x))))


def stateful_haiku() -> Any:
    def net(x: Any, is_training: bool) -> Any:
        return hk.BatchNorm(True, True, 0.9, eps=1e-5)(hk.Linear(3)(x), is_training)

    return hk.without_apply_rng(hk.transform_with_state(net))


class StatefulLinen(nn.Module):
    """The same in Linen."""

    @nn.compact
    def __call__(self, x: Any, is_training: bool) -> Any:
        return nn.BatchNorm(not is_training, momentum=0.9)(nn.Dense(3)(x))


def evaluating(mdl: Any, x: Any) -> Any:
    return mdl(x, False)


def training(mdl: Any, x: Any) -> Any:
    return mdl(x, True)


def failing() -> Any:
    raise RuntimeError("no weights today")
