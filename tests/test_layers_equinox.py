"""Every public layer of Equinox under the identity rule: bit for bit what it is without."""

from __future__ import annotations

import inspect
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import as_called
from rules import identity, plain

from crossvjp.testing import assert_close, assert_same_bits

# Rows with the rule inside `vmap` and the state unbatched. `jax.custom_vjp`, ours or written by hand, counts the
# cotangent of an unbatched output once per lane; the last test pins that, and the README says it.
UNBATCHED_STATE = [
    *(f"BatchNorm, {mode}, {where}" for mode in ("ema", "batch") for where in ("rule on the row", "inference")),
    "Sequential with state and dropout",
]

KEY = jax.random.key(0)
nn = eqx.nn


def array(*shape):
    """Makes fixed numbers with both signs."""
    return jnp.asarray(np.random.default_rng(len(shape)).normal(size=shape), jnp.float32)


V, M, S, G, C = array(3), array(4, 6), array(4, 7), array(4, 5, 5), array(4, 3, 3, 3)


over_tokens = lambda layer, x: jax.vmap(layer)(x)


def once(mdl, *args, **kwargs):
    """Calls a layer as it is."""
    return mdl(*args, **kwargs)


def over_batch(layer, x, state, **kwargs):
    """Calls a layer with state on each row of a batch."""
    run = lambda x, state: layer(x, state, **kwargs)
    return jax.vmap(run, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, state)


def scanned(layer, xs, state):
    """Runs a recurrent cell over a sequence."""

    def step(state, x):
        state = layer(x, state)
        return state, state

    return jax.lax.scan(step, state, xs)


class Within(eqx.Module):
    """Runs its layer in a transform, so that a rule stands around the transform."""

    transform: Any
    layer: Any

    def __call__(self, *inputs):
        return self.transform(self.layer, *inputs)


class Counter(nn.StatefulLayer):
    """Counts its calls and keeps the mean of what it saw."""

    seen: nn.StateIndex
    gain: jax.Array

    def __init__(self):
        self.seen = nn.StateIndex((jnp.array(0), jnp.zeros(())))
        self.gain = jnp.ones(3)

    def __call__(self, x, state, *, key=None):
        count, mean = state.get(self.seen)
        state = state.set(self.seen, (count + 1, 0.5 * (mean + jnp.mean(x))))
        return self.gain * x + mean, state


class Tied(eqx.Module):
    """Uses one table to embed and to decode."""

    shared: nn.Shared

    def __init__(self, key):
        layers = nn.Embedding(5, 3, key=key), nn.Linear(3, 5, key=key)
        self.shared = nn.Shared(layers, lambda pair: pair[1].weight, lambda pair: pair[0].weight)

    def __call__(self, token):
        embedding, linear = self.shared()
        return linear(jnp.tanh(embedding(token)))


class Block(eqx.Module):
    """Holds modules in a list and in a dict, a buffer, a function and a Python number."""

    layers: list[Any]
    named: dict[str, Any]
    counts: jax.Array
    activation: Any
    scale: float

    def __init__(self, key):
        self.layers = [nn.Linear(3, 4, key=key), nn.LayerNorm(4), nn.MLP(4, 3, 4, 1, key=key)]
        self.named = {"drop": nn.Dropout(0.5), "act": nn.PReLU()}
        self.counts, self.activation, self.scale = jnp.arange(3), jnp.tanh, 0.5

    def __call__(self, x, *, key):
        for layer in self.layers:
            x = self.activation(layer(x))
        return self.named["drop"](self.named["act"](x) * self.scale + self.counts.astype(x.dtype), key=key)


# One, two and three spatial dimensions.
SPATIAL = {
    "Conv": lambda cls: cls(4, 2, 2, stride=2, padding=1, key=KEY),
    "ConvTranspose": lambda cls: cls(4, 2, 2, stride=2, output_padding=1, key=KEY),
    **{f"{kind}Pool": lambda cls: cls(2, 2, padding=1) for kind in ("Avg", "Max")},
    **{f"Adaptive{kind}Pool": lambda cls: cls(2) for kind in ("Avg", "Max")},
}
SPATIAL_ROWS = {
    f"{kind}{dims}d": (lambda make=make, cls=f"{kind}{dims}d": make(getattr(nn, cls)), once, x)
    for dims, x in ((1, S), (2, G), (3, C))
    for kind, make in SPATIAL.items()
}
ATTENTION = {f"use_{part}_bias": True for part in ("query", "key", "value", "output")}
CONV = nn.Conv2d(4, 2, 2, key=KEY)
STATEFUL = [nn.Linear(3, 4, key=KEY), nn.BatchNorm(4, "batch", mode="ema"), nn.Dropout(0.5)]
MASK = jnp.tril(jnp.ones((4, 4), bool))
MODES: tuple[Any, ...] = ("ema", "batch")
BATCH_NORMS = {
    f"BatchNorm, {mode}, {where}": (make, run, M)
    for mode in MODES
    for where, make, run in (
        ("rule on the row", lambda mode=mode: nn.BatchNorm(6, "batch", mode=mode), over_batch),
        ("rule on the batch", lambda mode=mode: Within(over_batch, nn.BatchNorm(6, "batch", mode=mode)), once),
        ("inference", lambda mode=mode: nn.BatchNorm(6, "batch", mode=mode, inference=True), over_batch),
    )
}
# name: (what makes the layer, how it is called, *inputs, {keywords}); state is the last argument of layers that have it
ROWS: dict[str, tuple[Any, ...]] = {
    "Linear": (lambda: nn.Linear(3, 2, key=KEY), once, V),
    "Linear without bias": (lambda: nn.Linear(3, "scalar", use_bias=False, key=KEY), once, V),
    "Linear over tokens": (lambda: nn.Linear(6, 2, key=KEY), over_tokens, M),
    "Conv": (lambda: nn.Conv(2, 4, 6, 3, dilation=2, padding="SAME", padding_mode="REFLECT", key=KEY), once, G),
    "ConvTranspose": (lambda: nn.ConvTranspose(2, 4, 6, 3, groups=2, key=KEY), once, G),
    "Conv, depthwise": (lambda: nn.Conv(2, 4, 8, 2, groups=4, use_bias=False, key=KEY), once, G),
    **SPATIAL_ROWS,
    "Pool": (lambda: nn.Pool(-jnp.inf, jax.lax.max, 2, 2), once, G),
    "AdaptivePool": (lambda: nn.AdaptivePool(2, 2, jnp.mean), once, G),
    "LayerNorm": (lambda: nn.LayerNorm((4, 6)), once, M),
    "RMSNorm": (lambda: nn.RMSNorm(6), over_tokens, M),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), once, G),
    **BATCH_NORMS,
    "WeightNorm": (lambda: nn.WeightNorm(nn.Linear(3, 2, key=KEY)), once, V),
    "WeightNorm of a convolution": (lambda: nn.WeightNorm(CONV, axis=None), once, G),
    "SpectralNorm": (lambda: nn.SpectralNorm(nn.Linear(3, 2, key=KEY), "weight", key=KEY), once, V),
    "SpectralNorm of a convolution": (lambda: nn.SpectralNorm(CONV, "weight", 2, key=KEY), once, G),
    "Embedding": (lambda: nn.Embedding(5, 3, key=KEY), once, jnp.array(2)),
    "Embedding over tokens": (lambda: nn.Embedding(5, 3, key=KEY), over_tokens, jnp.array([2, 0, 2])),
    "RotaryPositionalEmbedding": (lambda: nn.RotaryPositionalEmbedding(6), once, M),
    "MultiheadAttention": (lambda: nn.MultiheadAttention(2, 6, **ATTENTION, key=KEY), once, M, M + 1, 2 * M),
    "MultiheadAttention with mask and dropout": (
        *(lambda: nn.MultiheadAttention(2, 6, dropout_p=0.5, key=KEY), once),
        *(M, M, M, {"mask": MASK, "key": KEY}),
    ),
    "GRUCell": (lambda: nn.GRUCell(3, 2, key=KEY), once, V, V[:2]),
    "GRUCell scanned, rule on the step": (lambda: nn.GRUCell(6, 2, key=KEY), scanned, M, V[:2]),
    "GRUCell scanned, rule on the loop": (lambda: Within(scanned, nn.GRUCell(6, 2, key=KEY)), once, M, V[:2]),
    "LSTMCell": (lambda: nn.LSTMCell(3, 2, key=KEY), once, V, (V[:2], V[1:])),
    "LSTMCell scanned, rule on the step": (lambda: nn.LSTMCell(6, 2, key=KEY), scanned, M, (V[:2], V[1:])),
    "LSTMCell scanned, rule on the loop": (
        lambda: Within(scanned, nn.LSTMCell(6, 2, key=KEY)),
        once,
        M,
        (V[:2], V[1:]),
    ),
    "Dropout": (lambda: nn.Dropout(0.5), once, M, {"key": KEY}),
    "Dropout at inference": (lambda: nn.Dropout(0.5, inference=True), once, M),
    "PReLU": (lambda: nn.PReLU(), once, M),
    "PReLU per channel": (lambda: nn.PReLU(array(6)), once, M),
    "Identity": (lambda: nn.Identity(), once, M),
    "Lambda": (lambda: nn.Lambda(jnp.tanh), once, M),
    "MLP": (lambda: nn.MLP(3, 2, 4, 2, key=KEY), once, V),
    "MLP with a learned activation": (lambda: nn.MLP(3, 2, 4, 2, activation=nn.PReLU(), key=KEY), once, V),
    "Sequential": (lambda: nn.Sequential([nn.Linear(3, 4, key=KEY), nn.Lambda(jax.nn.relu)]), once, V),
    "Sequential with state and dropout": (lambda: nn.Sequential(STATEFUL), over_batch, M[:, :3], {"key": KEY}),
    "StatefulLayer": (Counter, once, V),
    "Shared": (lambda: nn.Shared([nn.PReLU(), nn.PReLU()], lambda pair: pair[1], lambda pair: pair[0]), once),
    "Shared weights": (lambda: Tied(KEY), once, jnp.array(2)),
    "a block of modules": (lambda: Block(KEY), once, V, {"key": KEY}),
    "a bound method of a block": (lambda: Block(KEY).__call__, once, V, {"key": KEY}),
}

NOT_IN_THE_TABLE = {
    "StatefulLayer": "abstract; the table has one derived from it",
    "StateIndex": "names a value in the state and is not called",
}

WITH_STATE = [
    *BATCH_NORMS,
    *(name for name in ROWS if name.startswith(("SpectralNorm", "Stateful", "Sequential with"))),
]
# Rows under `vmap`: the parameters' gradient is the sum over lanes of the rule's cotangents, where the plain layer has
# one matrix product or one sum; measured: up to 2e-7 of the largest gradient.
SUMMED_IN_ANOTHER_ORDER = ["Linear over tokens", *UNBATCHED_STATE]
is_state = lambda part: isinstance(part, nn.State)


def sum_of_sines(tree):
    """Reduces all floating leaves to one number, nonlinearly."""
    floats = [leaf for leaf in jax.tree.leaves(tree) if eqx.is_inexact_array(leaf)]
    return sum((jnp.sum(jnp.sin(leaf)) for leaf in floats), start=jnp.zeros(()))


def run(name, wrap, through_state=False):
    """Runs a row with and without differentiation; gives outputs, state and the gradients of all floating arrays."""
    make, call, *inputs = ROWS[name]
    kwargs = inputs.pop() if inputs and isinstance(inputs[-1], dict) else {}
    mdl, state = nn.make_with_state(make)()
    state = jax.tree.map(lambda leaf: leaf + 1 if eqx.is_inexact_array(leaf) else leaf, state)  # zeros hide much
    assert bool(jax.tree.leaves(state)) == (name in WITH_STATE)
    floats, rest = eqx.partition((mdl, [*inputs, state] if name in WITH_STATE else inputs), eqx.is_inexact_array)

    def loss(floats):
        mdl, inputs = eqx.combine(floats, rest)
        out = call(wrap(mdl), *inputs, **kwargs)
        parts = jax.tree.leaves(out, is_leaf=is_state)
        seen = [part for part in parts if through_state or not is_state(part)]
        return sum_of_sines(seen), eqx.filter(out, eqx.is_array)

    (value, out), grads = as_called(jax.value_and_grad(loss, has_aux=True))(floats)
    return (value, out, as_called(loss)(floats)), grads


@pytest.mark.parametrize("name", ROWS)
def test_a_layer_under_the_identity_rule_is_the_layer_bit_for_bit(name):
    (out, grads), (plain_out, plain_grads) = run(name, identity), run(name, plain)
    assert_same_bits(out, plain_out)
    if name in SUMMED_IN_ANOTHER_ORDER:
        assert_close(grads, plain_grads, rtol=1e-6)
    elif jax.tree.leaves(plain_grads):
        assert_same_bits(grads, plain_grads)


@pytest.mark.parametrize("name", [name for name in WITH_STATE if name not in UNBATCHED_STATE])
def test_a_gradient_through_the_state_is_the_layers(name):
    assert_same_bits(run(name, identity, True), run(name, plain, True))


def test_under_vmap_the_cotangent_of_an_unbatched_output_counts_once_per_lane_as_with_jax_custom_vjp():
    def call(w, x, s):
        return x * w * s, s

    by_hand = jax.custom_vjp(call)
    by_hand.defvjp(lambda *args: jax.vjp(call, *args), lambda pullback, bars: pullback(bars))

    def grad(fn):
        def loss(s):
            lanes = jax.vmap(lambda x, s: fn(jnp.float32(3), x, s), in_axes=(0, None), out_axes=(0, None))
            y, after = lanes(jnp.arange(4.0), s)
            return y.sum() + after

        return float(jax.grad(loss)(jnp.float32(2)))

    assert grad(call) == 18 + 1
    assert grad(by_hand) == grad(identity.lift(call)) == 18 + 4


def test_every_public_module_with_parameters_state_or_randomness_is_in_the_table():
    public = {cls for _, cls in inspect.getmembers(nn, inspect.isclass) if issubclass(cls, eqx.Module)}
    wrapped = {type(row[0]()) for row in ROWS.values()}
    assert {cls.__name__ for cls in public - wrapped} == set(NOT_IN_THE_TABLE)
