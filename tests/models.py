"""One network as an unedited model of each framework: layers named first, norm, twice (called twice) and head."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
from flax import nnx

Paths = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Model:
    """An unedited model.

    Args:
        model: as `attach` takes it.
        params: what is differentiated.
        run: `(model, params) -> (output, state after the call)`.
        dense: the class of its dense layers.
        sample: what `sites` calls it with.
    """

    model: Any
    params: Any
    run: Callable[[Any, Any], tuple[Any, Any]]
    dense: type
    sample: tuple[Any, ...]

    def value_and_grad(
        self,
        model: Any,
        around: Callable[[Any], Any] = lambda loss: loss,
        how: Callable[[Any], Any] = lambda grad: grad,
    ) -> tuple[Any, Any, Paths]:
        """Gives the output, the state after the call, and the gradients by the names of their layers.

        Args:
            model: the model, with or without rules.
            around: put around the loss.
            how: put around its gradient.
        """

        def loss(params: Any) -> Any:
            y, state = self.run(model, params)
            return jnp.sum(jnp.sin(y)), (y, state)

        (_, (y, state)), bars = how(jax.value_and_grad(around(loss), has_aux=True))(self.params)
        return y, state, layers_of(bars)


def layers_of(tree: Any) -> Paths:
    """Sorts the leaves of a tree of gradients by the layers that they belong to."""
    found: Paths = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        text = jax.tree_util.keystr(path)
        layer = next(name for name in ("first", "norm", "twice", "head") if name in text)
        found.setdefault(layer, []).append(leaf)
    return found


def x_of(*shape: int) -> Any:
    """Makes an input."""
    return jax.random.normal(jax.random.key(7), shape)


class LinenNet(nn.Module):
    """The network in Linen."""

    @nn.compact
    def __call__(self, x, train=True):
        x = nn.BatchNorm(use_running_average=not train, name="norm")(nn.Dense(6, name="first")(x))
        twice = nn.Dense(6, name="twice")
        x = twice(jax.nn.relu(twice(x)))
        return nn.Dense(3, name="head")(nn.Dropout(0.5, deterministic=not train)(x))


def linen() -> Model:
    """Makes the Linen model."""
    model, x = LinenNet(), x_of(4, 5)
    held = model.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, x)

    def run(model, params):
        state = {"batch_stats": held["batch_stats"]}
        keys = {"dropout": jax.random.key(2)}
        return model.apply({"params": params, **state}, x, rngs=keys, mutable=["batch_stats"])

    return Model(model, held["params"], run, nn.Dense, (x,))


def haiku_net(x):
    """The network in Haiku."""
    x = hk.BatchNorm(True, True, 0.9, name="norm")(hk.Linear(6, name="first")(x), True)
    twice = hk.Linear(6, name="twice")
    x = hk.dropout(hk.next_rng_key(), 0.5, twice(jax.nn.relu(twice(x))))
    return hk.Linear(3, name="head")(x)


def haiku() -> Model:
    """Makes the Haiku model."""
    model, x = hk.transform_with_state(haiku_net), x_of(4, 5)
    params, state = model.init(jax.random.key(0), x)
    return Model(model, params, lambda model, params: model.apply(params, state, jax.random.key(2), x), hk.Linear, (x,))


class NnxNet(nnx.Module):
    """The network in NNX."""

    def __init__(self, rngs):
        self.first = nnx.Linear(5, 6, rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.twice = nnx.Linear(6, 6, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        x = self.norm(self.first(x))
        return self.head(self.drop(self.twice(jax.nn.relu(self.twice(x)))))


def nnx_model() -> Model:
    """Makes the NNX model."""
    model, x = NnxNet(nnx.Rngs(0)), x_of(4, 5)

    def run(model, params):
        graphdef, _, rest = nnx.split(model, nnx.Param, ...)
        module = nnx.merge(graphdef, params, rest, copy=True)
        y = module(x)
        # Keys have no bits to compare, and don't change; their counters do.
        return y, nnx.to_pure_dict(nnx.state(module, nnx.Not(nnx.Any(nnx.Param, nnx.RngKey))))

    return Model(model, nnx.state(model, nnx.Param), run, nnx.Linear, (x,))


class EquinoxNet(eqx.Module):
    """The network in Equinox."""

    first: eqx.nn.Linear
    norm: eqx.nn.SpectralNorm
    twice: eqx.nn.Linear
    drop: eqx.nn.Dropout
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 5)
        self.first = eqx.nn.Linear(5, 6, key=keys[0])
        self.norm = eqx.nn.SpectralNorm(eqx.nn.Conv1d(6, 6, 1, key=keys[1]), "weight", key=keys[2])
        self.twice = eqx.nn.Linear(6, 6, key=keys[3])
        self.drop = eqx.nn.Dropout(0.5)
        self.head = eqx.nn.Linear(6, 3, key=keys[4])

    def __call__(self, x, state, key):
        x, state = self.norm(self.first(x)[:, None], state)
        x = self.drop(self.twice(jax.nn.relu(self.twice(x[:, 0]))), key=key)
        return self.head(x), state


def equinox() -> Model:
    """Makes the Equinox model."""
    model, state = eqx.nn.make_with_state(EquinoxNet)(jax.random.key(0))
    x, leaves, treedef = x_of(5), *jax.tree.flatten(state)
    fresh = lambda: jax.tree.unflatten(treedef, leaves)  # a State may be used once
    params = eqx.filter(model, eqx.is_inexact_array)

    def run(model, params):
        # The parameters in the model's own classes, which `attach` may have exchanged.
        held, rest = eqx.partition(model, eqx.is_inexact_array)
        held = jax.tree.unflatten(jax.tree.structure(held), jax.tree.leaves(params))
        y, after = eqx.combine(held, rest)(x, fresh(), jax.random.key(2))
        return y, jax.tree.leaves(after)

    return Model(model, params, run, eqx.nn.Linear, (x, fresh(), jax.random.key(2)))


def function() -> Model:
    """Makes the model that is a function, which runs the Linen network inside."""
    inner, x = linen(), x_of(4, 5)
    apply = lambda params, x: inner.run(inner.model, params)
    return Model(apply, inner.params, lambda apply, params: apply(params, x), nn.Dense, (inner.params, x))


MODELS: dict[str, Callable[[], Model]] = {
    "linen": linen,
    "nnx": nnx_model,
    "haiku": haiku,
    "equinox": equinox,
    "function": function,
}
