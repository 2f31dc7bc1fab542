"""Every public layer of Flax NNX under the identity rule: bit for bit the layer alone."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from rules import identity, plain

from crossvjp.testing import assert_same_bits

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (4, 6))
SEQUENCE = jax.random.normal(KEY, (2, 5, 6))
IMAGE = jax.random.normal(KEY, (2, 6, 6, 4))
IDS = jnp.array([[0, 3, 3], [1, 6, 0]])
LENGTHS = jnp.array([3, 5])
CAUSAL = nnx.make_causal_mask(jnp.ones((2, 5)))
CARRY = (X[:, :3], jnp.cos(X[:, :3]))
DRAW = {"dropout_rate": 0.5, "deterministic": False}


class Row(NamedTuple):
    """A layer, the arguments of its call, and whether it runs under `nnx.capture`."""

    make: Callable[[nnx.Rngs], Any]
    args: tuple[Any, ...] = (X,)
    kwargs: Mapping[str, Any] = MappingProxyType({})
    captures: bool = False


class Block(nnx.Module):
    """Modules in the containers of NNX, one held twice, with state, randomness and a count of its own."""

    def __init__(self, rngs):
        dense = nnx.Linear(6, 6, rngs=rngs)
        self.layers = nnx.List([dense, nnx.BatchNorm(6, rngs=rngs), dense])
        self.more = nnx.Dict[Any]({"drop": nnx.Dropout(0.5, rngs=rngs), "tied": dense.bias})
        self.calls = nnx.Variable(jnp.array(0))
        self.rngs = rngs

    def __call__(self, x):
        for layer in self.layers:
            x = jnp.tanh(layer(x)) + self.more["tied"]
        self.calls[...] += 1
        return {"out": self.more["drop"](x), "noise": x + self.rngs.params.normal((6,)), "calls": self.calls[...]}


class Observed(nnx.Module):
    """Sows and perturbs hidden values, in a child too."""

    def __init__(self, rngs, depth=1):
        self.dense = nnx.Linear(6, 6, rngs=rngs)
        self.child = Observed(rngs, depth - 1) if depth else nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        self.sow(nnx.Intermediate, "seen", x)
        return self.child(self.perturb("hidden", jnp.tanh(self.dense(x))))


def decoding(rngs: nnx.Rngs) -> nnx.Module:
    """Makes an attention layer with its cache."""
    layer = nnx.MultiHeadAttention(2, 6, decode=True, rngs=rngs)
    layer.init_cache((2, 5, 6))
    return layer


pool = functools.partial(nnx.max_pool, window_shape=(2, 2), strides=(2, 2))
mean = functools.partial(nnx.avg_pool, window_shape=(3, 3), padding="SAME", count_include_pad=False)
mask = jnp.arange(54.0).reshape(3, 6, 3) % 2

ROWS = {
    "Linear": Row(lambda rngs: nnx.Linear(6, 3, rngs=rngs)),
    "Linear without bias, in bfloat16": Row(
        lambda rngs: nnx.Linear(6, 3, use_bias=False, dtype=jnp.bfloat16, rngs=rngs)
    ),
    "LinearGeneral over two axes": Row(
        lambda rngs: nnx.LinearGeneral((5, 6), (2, 3), axis=(-2, -1), rngs=rngs), (SEQUENCE,)
    ),
    "LinearGeneral with a batch axis": Row(
        lambda rngs: nnx.LinearGeneral(6, 3, batch_axis={0: 2}, rngs=rngs), (SEQUENCE,)
    ),
    "Einsum": Row(lambda rngs: nnx.Einsum("bti,ijk->btjk", (6, 2, 3), (2, 3), rngs=rngs), (SEQUENCE,)),
    "Conv": Row(lambda rngs: nnx.Conv(4, 3, (3, 3), rngs=rngs), (IMAGE,)),
    "Conv, strided, dilated, grouped": Row(
        lambda rngs: nnx.Conv(
            4, 6, (3, 3), (2, 1), padding="CIRCULAR", kernel_dilation=2, feature_group_count=2, rngs=rngs
        ),
        (IMAGE,),
    ),
    "Conv, causal": Row(lambda rngs: nnx.Conv(6, 3, (3,), padding="CAUSAL", rngs=rngs), (SEQUENCE,)),
    "Conv with a mask": Row(lambda rngs: nnx.Conv(6, 3, (3,), mask=mask, rngs=rngs), (SEQUENCE,)),
    "ConvTranspose": Row(lambda rngs: nnx.ConvTranspose(4, 3, (3, 3), (2, 2), rngs=rngs), (IMAGE,)),
    "ConvTranspose, circular": Row(
        lambda rngs: nnx.ConvTranspose(6, 3, (3,), (2,), padding="CIRCULAR", transpose_kernel=True, rngs=rngs),
        (SEQUENCE,),
    ),
    "Embed": Row(lambda rngs: nnx.Embed(7, 3, rngs=rngs), (IDS,)),
    "BatchNorm": Row(lambda rngs: nnx.BatchNorm(6, rngs=rngs)),
    "BatchNorm with a mask": Row(
        lambda rngs: nnx.BatchNorm(6, rngs=rngs), (X, False), {"mask": jnp.arange(4)[:, None] < 3}
    ),
    "BatchNorm by running averages": Row(lambda rngs: nnx.BatchNorm(6, use_running_average=True, rngs=rngs)),
    "LayerNorm": Row(lambda rngs: nnx.LayerNorm(6, rngs=rngs)),
    "RMSNorm": Row(lambda rngs: nnx.RMSNorm(6, rngs=rngs)),
    "GroupNorm": Row(lambda rngs: nnx.GroupNorm(4, 2, rngs=rngs), (IMAGE,)),
    "InstanceNorm": Row(lambda rngs: nnx.InstanceNorm(4, rngs=rngs), (IMAGE,)),
    "SpectralNorm": Row(lambda rngs: nnx.SpectralNorm(nnx.Linear(6, 3, rngs=rngs), rngs=rngs)),
    "SpectralNorm of Conv, two steps": Row(
        lambda rngs: nnx.SpectralNorm(nnx.Conv(4, 3, (3, 3), rngs=rngs), n_steps=2, rngs=rngs), (IMAGE,)
    ),
    "SpectralNorm, frozen": Row(
        lambda rngs: nnx.SpectralNorm(nnx.Linear(6, 3, rngs=rngs), rngs=rngs), (X,), {"update_stats": False}
    ),
    "WeightNorm": Row(lambda rngs: nnx.WeightNorm(nnx.Linear(6, 3, rngs=rngs), rngs=rngs)),
    "WeightNorm of Conv": Row(lambda rngs: nnx.WeightNorm(nnx.Conv(4, 3, (3, 3), rngs=rngs), rngs=rngs), (IMAGE,)),
    "MultiHeadAttention": Row(
        lambda rngs: nnx.MultiHeadAttention(2, 6, decode=False, rngs=rngs), (SEQUENCE,), {"mask": CAUSAL}
    ),
    "MultiHeadAttention with dropout and sow": Row(
        lambda rngs: nnx.MultiHeadAttention(2, 6, decode=False, broadcast_dropout=False, rngs=rngs, **DRAW),
        (SEQUENCE,),
        {"sow_weights": True},
        captures=True,
    ),
    "MultiHeadAttention across": Row(
        lambda rngs: nnx.MultiHeadAttention(2, 6, in_kv_features=4, normalize_qk=True, rngs=rngs, **DRAW),
        (SEQUENCE, IMAGE[:, 0], IMAGE[:, 1]),
        {"decode": False},
    ),
    "MultiHeadAttention, decoding": Row(decoding, (SEQUENCE[:, :1],)),
    "LSTMCell": Row(lambda rngs: nnx.LSTMCell(6, 3, rngs=rngs), (CARRY, X)),
    "OptimizedLSTMCell": Row(lambda rngs: nnx.OptimizedLSTMCell(6, 3, rngs=rngs), (CARRY, X)),
    "GRUCell": Row(lambda rngs: nnx.GRUCell(6, 3, rngs=rngs), (CARRY[0], X)),
    "SimpleCell": Row(lambda rngs: nnx.SimpleCell(6, 3, residual=True, rngs=rngs), (CARRY[0], X)),
    "RNN": Row(lambda rngs: nnx.RNN(nnx.GRUCell(6, 3, rngs=rngs), rngs=rngs), (SEQUENCE,)),
    "RNN in reverse, by lengths, with carry": Row(
        lambda rngs: nnx.RNN(nnx.LSTMCell(6, 3, rngs=rngs), reverse=True, keep_order=True, return_carry=True),
        (SEQUENCE,),
        {"seq_lengths": LENGTHS, "initial_carry": (SEQUENCE[:, 0, :3], SEQUENCE[:, 1, :3])},
    ),
    "Bidirectional": Row(
        lambda rngs: nnx.Bidirectional(
            nnx.RNN(nnx.OptimizedLSTMCell(6, 3, rngs=rngs)), nnx.RNN(nnx.GRUCell(6, 2, rngs=rngs)), rngs=rngs
        ),
        (SEQUENCE,),
    ),
    "Dropout": Row(lambda rngs: nnx.Dropout(0.5, rngs=rngs)),
    "Dropout of rows, by a given key": Row(
        lambda rngs: nnx.Dropout(0.5, broadcast_dims=(1,)), (X,), {"rngs": KEY, "deterministic": False}
    ),
    "LoRA": Row(lambda rngs: nnx.LoRA(6, 2, 3, rngs=rngs, b_initializer=nnx.initializers.normal())),
    "LoRA on a base": Row(lambda rngs: nnx.LoRA(6, 2, 3, base_module=nnx.Linear(6, 3, rngs=rngs), rngs=rngs)),
    "LoRALinear": Row(lambda rngs: nnx.LoRALinear(6, 3, lora_rank=2, rngs=rngs)),
    "PReLU": Row(lambda rngs: nnx.PReLU()),
    "Sequential with pooling": Row(
        lambda rngs: nnx.Sequential(nnx.Conv(4, 3, (3, 3), rngs=rngs), pool, nnx.gelu, mean), (IMAGE,)
    ),
    "Sequential of Sequential, with state": Row(
        lambda rngs: nnx.Sequential(
            nnx.Linear(6, 5, rngs=rngs), nnx.Sequential(nnx.BatchNorm(5, rngs=rngs), nnx.Dropout(0.5, rngs=rngs))
        )
    ),
    "a block of lists, dicts and shared modules": Row(Block),
    "sow and perturb": Row(Observed, captures=True),
    "Sequential under capture": Row(
        lambda rngs: nnx.Sequential(Observed(rngs), nnx.Linear(6, 3, rngs=rngs)), captures=True
    ),
}

WITHOUT_ROW = {
    nnx.Module: "abstract",
    nnx.RNNCellBase: "abstract",
}


def measured(row: Row, wrap: Any) -> Any:
    """Gives outputs, captures, all state, and the gradients with respect to every float, perturbations too.

    The layer runs twice: the second call shows state and counters that the first left.
    """
    graphdef, state = nnx.split(row.make(nnx.Rngs(0, dropout=1)))

    def captured(wrap, state, args, kwargs, init=None):
        layer = nnx.merge(graphdef, state, copy=True)
        twice = lambda layer: [wrap(layer)(*args, **kwargs) for _ in range(2)]
        if not row.captures:
            return twice(layer), [{}], nnx.state(layer)
        outs, *seen = nnx.capture(twice, nnx.Perturbation, nnx.Intermediate, init=init)(layer)
        return outs, seen, nnx.state(layer)

    def loss(floats):
        given = eqx.combine(floats, rest)
        outs, seen, after = captured(wrap, *given)
        leaves = [jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(outs[0]) if eqx.is_inexact_array(leaf)]
        return functools.reduce(operator.add, leaves), (outs, seen, after)

    shapes = jax.eval_shape(lambda: captured(plain, state, row.args, row.kwargs)[1][0])
    perturbations = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.5, leaf.dtype), shapes)
    floats, rest = eqx.partition((state, row.args, row.kwargs, perturbations), eqx.is_inexact_array)
    return jax.value_and_grad(loss, has_aux=True)(floats)


@pytest.mark.parametrize("name", ROWS)
def test_the_identity_rule_leaves_every_layer_as_it_is(name):
    row = ROWS[name]
    wrapped, alone = (measured(row, wrap) for wrap in (identity, plain))
    assert jax.tree.structure(wrapped) == jax.tree.structure(alone)
    assert_same_bits(wrapped, alone)


def test_every_public_layer_has_a_row_or_a_reason():
    layers = [nnx.eval_shape(lambda row=row: row.make(nnx.Rngs(0))) for row in ROWS.values()]
    held = {type(part) for layer in layers for _, part in nnx.iter_modules(layer)}
    public = {cls for _, cls in inspect.getmembers(nnx, inspect.isclass) if issubclass(cls, nnx.Module)}
    assert public - held == WITHOUT_ROW.keys()
