"""Every public layer of Flax Linen under the identity rule: bit for bit the layer alone."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from rules import identity, plain

from crossvjp.testing import assert_same_bits

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (4, 6))
SEQUENCE = jax.random.normal(KEY, (2, 5, 6))
IMAGE = jax.random.normal(KEY, (2, 6, 6, 4))
IDS = jnp.array([[0, 3, 3], [1, 6, 0]])
LENGTHS = jnp.array([3, 5])
CAUSAL = nn.make_causal_mask(jnp.ones((2, 5)))
CARRY = (X[:, :3], jnp.cos(X[:, :3]))
CONTRACT = (((1,), (0,)), ((), ()))
DRAW = {"dropout_rate": 0.5, "deterministic": False}


class Row(NamedTuple):
    """A layer and the arguments of its call."""

    make: Callable[[], Any]
    args: tuple[Any, ...] = (X,)
    kwargs: Mapping[str, Any] = MappingProxyType({})


class Block(nn.Module):
    """Submodules of `setup`, one of them used twice, with state and randomness."""

    def setup(self):
        self.dense = nn.Dense(6)
        self.layers = {"norm": [nn.BatchNorm(use_running_average=False)], "drop": (nn.Dropout(0.5),)}

    def __call__(self, x):
        x = self.layers["norm"][0](self.dense(nn.relu(self.dense(x))))
        self.sow("intermediates", "hidden", x)
        return self.layers["drop"][0](x, deterministic=False)


class Shared(nn.Module):
    """Holds a layer that its parent made, and a child of its own."""

    layer: nn.Module

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(self.layer(self.layer(x)))


class Perturbed(nn.Module):
    """Perturbs a hidden value, counts its calls, draws a key and applies a module by `BatchApply`."""

    @nn.compact
    def __call__(self, x):
        x = self.perturb("hidden", nn.Dense(3)(x))
        count = self.variable("count", "calls", lambda: jnp.zeros(()))
        count.value += 1
        return nn.BatchApply(nn.Dense(2))(x[None]) + jax.random.normal(self.make_rng("dropout"), (2,))


pool = functools.partial(nn.max_pool, window_shape=(2, 2), strides=(2, 2))
mean = functools.partial(nn.avg_pool, window_shape=(3, 3), padding="SAME", count_include_pad=False)
boxed = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "out"))

ROWS = {
    "Dense": Row(lambda: nn.Dense(3)),
    "Dense without bias, in bfloat16": Row(lambda: nn.Dense(3, use_bias=False, dtype=jnp.bfloat16)),
    "Dense with boxed parameters": Row(lambda: nn.Dense(3, kernel_init=boxed)),
    "DenseGeneral over two axes": Row(lambda: nn.DenseGeneral((2, 3), axis=(-2, -1)), (SEQUENCE,)),
    "DenseGeneral with a batch axis": Row(lambda: nn.DenseGeneral(3, batch_dims=(0,)), (SEQUENCE,)),
    "Einsum": Row(lambda: nn.Einsum((6, 2, 3), "bti,ijk->btjk", use_bias=True), (SEQUENCE,)),
    "Conv": Row(lambda: nn.Conv(3, (3, 3)), (IMAGE,)),
    "Conv, strided, dilated, grouped": Row(
        lambda: nn.Conv(6, (3, 3), (2, 1), "CIRCULAR", kernel_dilation=2, feature_group_count=2), (IMAGE,)
    ),
    "Conv, causal": Row(lambda: nn.Conv(3, (3,), padding="CAUSAL"), (SEQUENCE,)),
    "Conv with a mask": Row(lambda: nn.Conv(3, (3,), mask=jnp.arange(54.0).reshape(3, 6, 3) % 2), (SEQUENCE,)),
    "ConvLocal": Row(lambda: nn.ConvLocal(3, (3, 3)), (IMAGE,)),
    "ConvTranspose": Row(lambda: nn.ConvTranspose(3, (3, 3), (2, 2)), (IMAGE,)),
    "ConvTranspose, circular": Row(
        lambda: nn.ConvTranspose(3, (3,), (2,), padding="CIRCULAR", transpose_kernel=True), (SEQUENCE,)
    ),
    "Embed": Row(lambda: nn.Embed(7, 3), (IDS,)),
    "Embed.attend": Row(lambda: nn.Embed(7, 6).attend),
    "BatchNorm": Row(lambda: nn.BatchNorm(), (X,), {"use_running_average": False}),
    "BatchNorm with a mask": Row(lambda: nn.BatchNorm(False), (X,), {"mask": jnp.arange(4)[:, None] < 3}),
    "BatchNorm by running averages": Row(lambda: nn.BatchNorm(True)),
    "LayerNorm": Row(lambda: nn.LayerNorm()),
    "RMSNorm": Row(lambda: nn.RMSNorm()),
    "GroupNorm": Row(lambda: nn.GroupNorm(2), (IMAGE,)),
    "InstanceNorm": Row(lambda: nn.InstanceNorm(), (IMAGE,)),
    "SpectralNorm": Row(lambda: nn.SpectralNorm(nn.Dense(3)), (X,), {"update_stats": True}),
    "SpectralNorm of Conv, two steps": Row(
        lambda: nn.SpectralNorm(nn.Conv(3, (3, 3)), n_steps=2), (IMAGE,), {"update_stats": True}
    ),
    "SpectralNorm, frozen": Row(lambda: nn.SpectralNorm(nn.Dense(3)), (X,), {"update_stats": False}),
    "WeightNorm": Row(lambda: nn.WeightNorm(nn.Dense(3))),
    "WeightNorm of all parameters": Row(lambda: nn.WeightNorm(nn.Conv(3, (3, 3)), variable_filter=None), (IMAGE,)),
    "MultiHeadAttention": Row(lambda: nn.MultiHeadAttention(2, qkv_features=4), (SEQUENCE,), {"mask": CAUSAL}),
    "MultiHeadAttention with dropout and sow": Row(
        lambda: nn.MultiHeadAttention(2, broadcast_dropout=False, **DRAW), (SEQUENCE,), {"sow_weights": True}
    ),
    "MultiHeadDotProductAttention across": Row(
        lambda: nn.MultiHeadDotProductAttention(2, normalize_qk=True, **DRAW), (SEQUENCE, IMAGE[:, 0], IMAGE[:, 0])
    ),
    "MultiHeadDotProductAttention, decoding": Row(
        lambda: nn.MultiHeadDotProductAttention(2, decode=True), (SEQUENCE[:, :1],)
    ),
    "SelfAttention": Row(lambda: nn.SelfAttention(2, **DRAW), (SEQUENCE,), {"mask": CAUSAL}),
    "LSTMCell": Row(lambda: nn.LSTMCell(3), (CARRY, X)),
    "OptimizedLSTMCell": Row(lambda: nn.OptimizedLSTMCell(3), (CARRY, X)),
    "ConvLSTMCell": Row(lambda: nn.ConvLSTMCell(3, (3, 3)), ((jnp.sin(IMAGE[..., :3]), IMAGE[..., 1:]), IMAGE)),
    "GRUCell": Row(lambda: nn.GRUCell(3), (CARRY[0], X)),
    "MGUCell": Row(lambda: nn.MGUCell(3), (CARRY[0], X)),
    "SimpleCell": Row(lambda: nn.SimpleCell(3, residual=True), (CARRY[0], X)),
    "RNN": Row(lambda: nn.RNN(nn.GRUCell(3)), (SEQUENCE,)),
    "RNN in reverse, by lengths, with carry": Row(
        lambda: nn.RNN(nn.LSTMCell(3), reverse=True, keep_order=True, return_carry=True),
        (SEQUENCE,),
        {"seq_lengths": LENGTHS, "initial_carry": (SEQUENCE[:, 0, :3], SEQUENCE[:, 1, :3])},
    ),
    "Bidirectional": Row(lambda: nn.Bidirectional(nn.RNN(nn.OptimizedLSTMCell(3)), nn.RNN(nn.GRUCell(2))), (SEQUENCE,)),
    "Dropout": Row(lambda: nn.Dropout(0.5), (X,), {"deterministic": False}),
    "Dropout of rows": Row(lambda: nn.Dropout(0.5, broadcast_dims=(1,), deterministic=False)),
    "PReLU": Row(lambda: nn.PReLU()),
    "Sequential with pooling": Row(lambda: nn.Sequential([nn.Conv(3, (3, 3)), pool, nn.gelu, mean]), (IMAGE,)),
    "Sequential of Sequential, with state": Row(
        lambda: nn.Sequential([nn.Dense(5), nn.Sequential([nn.BatchNorm(False), nn.Dropout(0.5, deterministic=False)])])
    ),
    "Fp8DirectDotGeneralOp": Row(lambda: nn.Fp8DirectDotGeneralOp(4), (X, X.T, CONTRACT)),
    "Fp8DirectDotGeneralOp in Dense": Row(lambda: nn.Dense(3, dot_general_cls=nn.Fp8DirectDotGeneralOp)),
    "Fp8DotGeneralOp": Row(lambda: nn.Fp8DotGeneralOp(4), (X, X.T, CONTRACT)),
    "NANOOFp8DotGeneralOp": Row(lambda: nn.NANOOFp8DotGeneralOp(4), (X, X.T, CONTRACT)),
    "Fp8Einsum": Row(lambda: nn.Fp8Einsum(4), ("ij,jk->ik", X, X.T)),
    "a block of setup modules": Row(Block),
    "a bound method": Row(lambda: Block().__call__),
    "a module that holds another's": Row(lambda: Shared(nn.Dense(6))),
    "perturb, variables and keys": Row(Perturbed),
}

WITHOUT_ROW = {
    nn.Module: "abstract",
    nn.RNNCellBase: "abstract",
}


class Net(nn.Module):
    """Calls the wrapped layer twice: the second call shows state and counters that the first left."""

    wrap: Any
    make: Callable[[], Any]

    @nn.compact
    def __call__(self, *args, **kwargs):
        layer = self.make()
        return tuple(self.wrap(layer)(*args, **kwargs) for _ in range(2))


def initial(row: Row) -> Any:
    """Makes the variables of the layer alone."""
    init = Net(plain, row.make).init
    return jax.jit(lambda: init({"params": KEY, "dropout": KEY}, *row.args, **row.kwargs))()


def measured(row: Row, wrap: Any, variables: Any) -> Any:
    """Gives outputs, updates and the gradients with respect to every float among variables and arguments."""
    floats, rest = eqx.partition((variables, row.args, row.kwargs), eqx.is_inexact_array)

    def loss(floats):
        variables, args, kwargs = eqx.combine(floats, rest)
        rngs = {"dropout": jax.random.key(1)}
        outs, updates = Net(wrap, row.make).apply(variables, *args, rngs=rngs, mutable=nn.DenyList("params"), **kwargs)
        leaves = [jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(outs[0]) if eqx.is_inexact_array(leaf)]
        return functools.reduce(operator.add, leaves), (outs, updates)

    return jax.value_and_grad(loss, has_aux=True)(floats)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.filterwarnings("ignore:SelfAttention will be deprecated", "ignore:The Fp8DotGeneralOp is deprecated")
def test_the_identity_rule_leaves_every_layer_as_it_is(name):
    row = ROWS[name]
    variables = initial(row)
    wrapped, alone = (measured(row, wrap, variables) for wrap in (identity, plain))
    assert jax.tree.structure(wrapped) == jax.tree.structure(alone)
    assert_same_bits(wrapped, alone)


@pytest.mark.filterwarnings("ignore:SelfAttention will be deprecated", "ignore:The Fp8DotGeneralOp is deprecated")
def test_every_public_layer_has_a_row_or_a_reason():
    ran: set[type] = set()

    def note(next_fun, args, kwargs, context):
        ran.add(type(context.module))
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(note):
        for row in ROWS.values():
            jax.eval_shape(lambda row=row: initial(row))
    public = {cls for _, cls in inspect.getmembers(nn, inspect.isclass) if issubclass(cls, nn.Module)}
    assert public - ran == WITHOUT_ROW.keys()
