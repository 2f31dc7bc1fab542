"""Plain JAX: parameters in a dict, their function as a `Partial`."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from crossvjp.testing import Subject
from crossvjp.testing.common import HIDDEN, MOMENTUM, RATE, batch, mlp, mlp_numbers


def subjects() -> list[Subject]:
    """Makes the subjects."""
    return [_mlp(), _mlp(jnp.bfloat16), _block()]


def _mlp(dtype=jnp.float32):
    def run(variables, rest, use, x):
        return use(jax.tree_util.Partial(mlp, variables), x), ()

    name = "plain mlp" if dtype == jnp.float32 else f"plain mlp in {jnp.dtype(dtype).name}"
    numbers = {name: number.astype(dtype) for name, number in mlp_numbers().items()}
    common = (lambda variables: variables) if dtype == jnp.float32 else None
    return Subject(name, numbers, (), (batch().astype(dtype),), run, common, "mlp")


def _block():
    def block(params, x, mean, key):
        x = x @ params["w"]
        batch_mean, var = x.mean(0), x.var(0)
        x = params["scale"] * (x - batch_mean) * jax.lax.rsqrt(var + 1e-5) + params["offset"]
        kept = jax.random.bernoulli(key, 1 - RATE, x.shape)
        return jnp.where(kept, jnp.tanh(x) / (1 - RATE), 0), MOMENTUM * mean + (1 - MOMENTUM) * batch_mean

    def run(variables, rest, use, x):
        first, second = jax.random.split(rest["key"])
        return use(jax.tree_util.Partial(block, variables), x, rest["mean"], first), jax.random.normal(second)

    w = jax.random.normal(jax.random.key(0), (batch().shape[1], HIDDEN))
    params = {"w": w, "scale": jnp.ones(HIDDEN), "offset": jnp.zeros(HIDDEN)}
    return Subject("plain block", params, {"mean": jnp.zeros(HIDDEN), "key": jax.random.key(2)}, (batch(),), run)
