"""Slow twins of the rules for memory: `crossvjp.rules._memory`, `_packing` and `_attention`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from twins import twin

import crossvjp as cv
from crossvjp.rules import (
    BlockwiseAttention,
    ChunkedCrossEntropy,
    ColumnRowSampling,
    Microbatch,
    OptimizerInBackward,
    PackResiduals,
    Recompute,
)

rng = np.random.default_rng(0)


@twin(Recompute())
def recompute(case):
    return case.y, *case.pull(case.y_bar)


@twin(Microbatch(parts=2))
def microbatch(case):
    (x,), w = case.inputs, case.variables["w"]
    halves = (slice(0, 2), slice(2, 4))
    bars = [(x[half].T @ case.y_bar[half], case.y_bar[half].sum(0)) for half in halves]
    y = np.concatenate([x[half] @ w + case.variables["b"] for half in halves])
    x_bar = np.concatenate([case.y_bar[half] @ w.T for half in halves])
    return y, (x_bar,), {"w": bars[0][0] + bars[1][0], "b": bars[0][1] + bars[1][1]}


HEAD = {"w": rng.normal(size=(3, 5))}
TOKENS = rng.normal(size=(6, 3)), np.array([0, 4, 2, 2, 1, 0])


def cross_entropy(p, hidden, labels):
    log_p = jax.nn.log_softmax(hidden @ p["w"])
    return -jnp.mean(jnp.take_along_axis(log_p, labels[:, None], 1))


@twin(ChunkedCrossEntropy(parts=3), cross_entropy, HEAD, TOKENS)
@twin(Microbatch(parts=3), cross_entropy, HEAD, TOKENS)
def chunked_cross_entropy(case):
    (hidden, labels), w = case.inputs, case.variables["w"]
    loss, hidden_bar, w_bar = 0.0, np.zeros_like(hidden), np.zeros_like(w)
    for i, (h, label) in enumerate(zip(hidden, labels, strict=True)):
        p = np.exp(h @ w) / np.sum(np.exp(h @ w))
        loss -= np.log(p[label]) / len(labels)
        logits_bar = case.y_bar * (p - np.eye(5)[label]) / len(labels)
        hidden_bar[i] = w @ logits_bar
        w_bar += np.outer(h, logits_bar)
    return loss, (hidden_bar, None), {"w": w_bar}


@twin(
    Microbatch(parts=3, scalars="sum"),
    lambda p, x: {"sum": jnp.sum(jnp.sin(x @ p["w"])), "each": x @ p["w"]},
    {"w": rng.normal(size=(3, 2))},
    (rng.normal(size=(6, 3)),),
)
def microbatch_of_sums(case):
    (x,), w = case.inputs, case.variables["w"]
    z_bar = case.y_bar["sum"] * np.cos(x @ w) + case.y_bar["each"]
    return {"sum": np.sum(np.sin(x @ w)), "each": x @ w}, (z_bar @ w.T,), {"w": x.T @ z_bar}


@twin(ColumnRowSampling(rows=3), key=0)
def column_row_sampling(case):
    (x,), batch = case.inputs, len(case.y_bar)
    drawn = np.asarray(jax.random.permutation(case.key, batch))[:3]
    w_bar, b_bar = np.zeros((3, 2)), np.zeros(2)
    for row in drawn:
        w_bar += batch / 3 * np.outer(x[row], case.y_bar[row])
        b_bar += batch / 3 * case.y_bar[row]
    return case.y, (case.y_bar @ case.variables["w"].T,), {"w": w_bar, "b": b_bar}


@twin(PackResiduals(bits=8, group=4), key=0)
@twin(PackResiduals(bits=4, group=4), key=0)
@twin(PackResiduals(bits=2, group=4), key=0)
def pack_residuals(case):
    """A dense layer keeps its input and its kernel; only the input is packed."""
    (x,), levels = case.inputs, 2**case.rule.bits - 1
    noise = np.asarray(jax.random.uniform(jax.random.split(case.key, 1)[0], (3, 4), float))
    packed = np.zeros(12)
    for group, numbers in enumerate(x.reshape(3, 4)):
        low, step = numbers.min(), (numbers.max() - numbers.min()) / levels
        for i, number in enumerate(numbers):
            q = min(np.floor((number - low) / step + noise[group, i]), levels)
            packed[4 * group + i] = low + step * q
    x_bar = case.y_bar @ case.variables["w"].T
    return case.y, (x_bar,), {"w": packed.reshape(x.shape).T @ case.y_bar, "b": case.y_bar.sum(0)}


@twin(PackResiduals(bits=16, group=4))
def pack_residuals_in_bfloat16(case):
    (x,) = case.inputs
    mantissa, exponent = np.frexp(x)
    rounded = np.ldexp(np.round(mantissa * 2**8) / 2**8, exponent)  # 8 significant bits
    x_bar = case.y_bar @ case.variables["w"].T
    return case.y, (x_bar,), {"w": rounded.T @ case.y_bar, "b": case.y_bar.sum(0)}


def attention(_, q, k, v):
    s = jnp.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(s), v)


def causal_attention(_, q, k, v):
    s = 0.9 * jnp.einsum("bqhd,bkhd->bhqk", q, k)
    p = jax.nn.softmax(jnp.where(jnp.tril(jnp.ones((4, 6), bool)), s, -jnp.inf))
    return jnp.einsum("bhqk,bkhd->bqhd", p, v)


QKV = rng.normal(size=(1, 4, 2, 3)), rng.normal(size=(1, 6, 2, 3)), rng.normal(size=(1, 6, 2, 5))


@twin(BlockwiseAttention(block=2), attention, {}, QKV)
@twin(BlockwiseAttention(block=3, causal=True, scale=0.9), causal_attention, {}, QKV)
def blockwise_attention(case):
    """The plain formula, one head and one query after the other."""
    q, k, v = case.inputs
    scale = case.rule.scale or 1 / np.sqrt(3)
    y, q_bar, k_bar, v_bar = np.zeros((1, 4, 2, 5)), np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for head in range(2):
        keys, values = k[0, :, head], v[0, :, head]
        for i in range(4):
            seen = i + 1 if case.rule.causal else 6
            p = np.exp(scale * keys[:seen] @ q[0, i, head])
            p /= p.sum()
            y[0, i, head] = p @ values[:seen]
            p_bar = values[:seen] @ case.y_bar[0, i, head]
            s_bar = (np.diag(p) - np.outer(p, p)) @ p_bar
            q_bar[0, i, head] = scale * s_bar @ keys[:seen]
            k_bar[0, :seen, head] += scale * np.outer(s_bar, q[0, i, head])
            v_bar[0, :seen, head] += np.outer(p, case.y_bar[0, i, head])
    return y, (q_bar, k_bar, v_bar), None


PARAMETERS = {"w": rng.normal(size=(3, 2)), "b": rng.normal(size=2)}


@twin(OptimizerInBackward(cv.Overwrite(PARAMETERS), 0.1), stops=("variables/*",))
def optimizer_in_backward(case):
    """The layer is linearised at the rule's parameters, whatever it was called on."""
    (x,) = case.inputs
    w, b = (np.asarray(case.rule.parameters.value[name], np.float64) for name in "wb")
    new = {"w": w - 0.1 * x.T @ case.y_bar, "b": b - 0.1 * case.y_bar.sum(0)}
    return case.y, (case.y_bar @ w.T,), None, {"parameters": case.rule.parameters._of(new, np.ones(()))}
