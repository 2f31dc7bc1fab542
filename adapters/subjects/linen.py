"""Flax Linen: submodules of a compact method."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax

from crossvjp.testing import Subject
from crossvjp.testing.common import CLASSES, HIDDEN, MOMENTUM, RATE, batch, mlp_numbers


def subjects() -> list[Subject]:
    """Makes the subjects."""
    return [_mlp(), _block()]


class _Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        hidden = nn.tanh(nn.Dense(HIDDEN)(x))
        return nn.Dense(CLASSES)(hidden)


class _Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(HIDDEN, use_bias=False)(x)
        x = nn.BatchNorm(use_running_average=False, momentum=MOMENTUM)(x)
        return nn.Dropout(RATE, deterministic=False)(nn.tanh(x))


class _Net(nn.Module):
    """Holds the module, so that it is called inside of another."""

    kind: Any
    use: Any

    @nn.compact
    def __call__(self, *args):
        out = self.use(self.kind(name="inner"), *args)
        return out, jax.random.normal(self.make_rng("dropout"))


def _mlp():
    numbers = mlp_numbers()
    layers = {f"Dense_{i - 1}": {"kernel": numbers[f"kernel_{i}"], "bias": numbers[f"bias_{i}"]} for i in (1, 2)}

    def common(variables):
        layers = variables["inner"]
        return {f"{name}_{i}": layers[f"Dense_{i - 1}"][name] for i in (1, 2) for name in ("kernel", "bias")}

    def run(variables, rest, use, x):
        return _Net(_Mlp, use).apply({"params": variables}, x, rngs={"dropout": rest})

    return Subject("linen mlp", {"inner": layers}, jax.random.key(2), (batch(),), run, common, "mlp")


def _block():
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    made = _Net(_Block, lambda mdl, x: mdl(x)).init(keys, batch())

    def run(variables, rest, use, x):
        collections = {"params": variables, "batch_stats": rest["batch_stats"]}
        (out, drawn), state = _Net(_Block, use).apply(
            collections, x, rngs={"dropout": rest["key"]}, mutable=["batch_stats"]
        )
        return out, (state, drawn)

    rest = {"batch_stats": made["batch_stats"], "key": jax.random.key(2)}
    return Subject("linen block", made["params"], rest, (batch(),), run)
