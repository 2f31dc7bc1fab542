"""Attention by blocks against plain attention: the gradient, and memory that grows with the length alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from memory_use import kept_bytes, temporary_bytes

import crossvjp as cv
from crossvjp.rules import BlockwiseAttention


def attention(q, k, v, causal=False, scale=None):
    s = jnp.einsum("...qhd,...khd->...hqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        s = jnp.where(jnp.tril(jnp.ones(s.shape[-2:], bool)), s, -jnp.inf)
    return jnp.einsum("...hqk,...khd->...qhd", jax.nn.softmax(s), v)


def arrays(queries=6, keys=8, batch=(2,), heads=3, features=(4, 4), dtype="float32"):
    rng = np.random.default_rng(0)
    lengths = ((queries, features[0]), (keys, features[0]), (keys, features[1]), (queries, features[1]))
    return [jnp.asarray(2 * rng.normal(size=(*batch, n, heads, d)), dtype) for n, d in lengths]


def pulled(fn, *qkv, bar):
    y, pull = jax.vjp(fn, *qkv)
    return y, pull(bar)


def assert_same(one, other, tolerance):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * float(jnp.max(jnp.abs(b))))


@pytest.mark.parametrize("causal", [False, True], ids=["all keys", "causal"])
@pytest.mark.parametrize("block", [1, 4, 100])
@pytest.mark.parametrize("shape", [{"batch": (), "features": (4, 5)}, {"queries": 8, "batch": (1, 2)}], ids=str)
def test_attention_by_blocks_has_the_gradient_of_autodiff(causal, block, shape):
    with jax.enable_x64(True):
        *qkv, y_bar = arrays(**shape, dtype="float64")
        plain = lambda q, k, v: attention(q, k, v, causal)
        found = pulled(BlockwiseAttention(block, causal)(plain), *qkv, bar=y_bar)
        assert_same(found, pulled(plain, *qkv, bar=y_bar), 1e-13)


@pytest.mark.parametrize("causal", [False, True], ids=["all keys", "causal"])
def test_attention_by_blocks_is_that_of_jax(causal):
    *qkv, y_bar = arrays()
    plain = lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=causal)
    found = pulled(BlockwiseAttention(4, causal)(plain), *qkv, bar=y_bar)
    assert_same(found, pulled(plain, *qkv, bar=y_bar), 1e-5)  # sums in another order, in float32


def test_second_derivatives_are_those_of_plain_attention():
    q, k, v, _ = arrays(queries=2, keys=4, batch=(), heads=1, features=(2, 2))
    hessian = lambda fn: jax.jit(jax.hessian(lambda k: jnp.sum(jnp.sin(fn(q, k, v)))))(k)
    assert_same(hessian(BlockwiseAttention(2)(attention)), hessian(attention), 1e-5)  # as above


def test_the_scale_of_the_scores_is_used():
    *qkv, y_bar = arrays()
    plain = lambda *qkv: attention(*qkv, scale=0.3)
    found = pulled(BlockwiseAttention(4, scale=0.3)(plain), *qkv, bar=y_bar)
    assert_same(found, pulled(plain, *qkv, bar=y_bar), 1e-5)  # as above


def test_attention_in_bfloat16_stays_in_bfloat16_and_sums_in_float32():
    *qkv, y_bar = arrays(queries=64, keys=512, dtype="bfloat16")
    found = pulled(BlockwiseAttention(32)(attention), *qkv, bar=y_bar)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype("bfloat16")}
    wide = [leaf.astype(jnp.float32) for leaf in qkv]
    expected = pulled(attention, *wide, bar=y_bar.astype(jnp.float32))
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), found)
    assert_same(narrow, expected, 2**-7)  # one rounding to 8 bits of what is added, and one of the result


def test_large_scores_do_not_overflow():
    *qkv, y_bar = arrays()
    qkv[0] *= 1e3
    q, k, v = qkv
    y, (q_bar, k_bar, v_bar) = pulled(BlockwiseAttention(2)(attention), *qkv, bar=y_bar)
    own_y, (own_q_bar, own_k_bar, own_v_bar) = pulled(attention, *qkv, bar=y_bar)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in (y, q_bar, k_bar, v_bar))
    assert_same((y, v_bar), (own_y, own_v_bar), 1e-2)  # scores of 1e4 round to 1e-3
    # Where one key takes all, what is left of a score's cotangent is the rounding of the sum that it is taken from.
    rounding = 2**-22 * float(jnp.max(jnp.sum(jnp.abs(y_bar), -1)) * jnp.max(jnp.abs(v)))
    for bar, own, factor in ((q_bar, own_q_bar, k), (k_bar, own_k_bar, q)):
        left = rounding * float(jnp.max(jnp.sum(jnp.abs(factor), axis=-3)))
        np.testing.assert_allclose(bar, own, rtol=0, atol=1e-2 * float(jnp.max(jnp.abs(own))) + left)


def needs(fn, length):
    qkv = [jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)] * 3
    return temporary_bytes(jax.grad(lambda *qkv: jnp.sum(fn(*qkv)), (0, 1, 2)), *qkv)


def test_the_memory_of_attention_by_blocks_grows_with_the_length_alone():
    by_blocks = BlockwiseAttention(64)(attention)
    assert needs(attention, 1024) > 3.5 * needs(attention, 512)
    assert needs(by_blocks, 1024) < 2.1 * needs(by_blocks, 512)
    assert needs(by_blocks, 1024) < needs(attention, 1024) / 4
    qkv = [jax.ShapeDtypeStruct((1, 512, 2, 16), jnp.float32)] * 3
    assert kept_bytes(by_blocks, *qkv) == 512 * 2 * 16 * 4 + 512 * 2 * 4  # the output, and the logarithms of sums


def without(part):
    shapes = {"q": (2, 6, 3, 4), "k": (2, 8, 3, 4), "v": (2, 8, 3, 4)} | part
    return [jnp.ones(shape) for shape in shapes.values()]


WRONG = {
    "a block that does not divide": (BlockwiseAttention(3), without({}), "must divide the number of keys, 8"),
    "other heads": (BlockwiseAttention(), without({"q": (2, 6, 1, 4)}), "with as many heads in each"),
    "other features": (BlockwiseAttention(), without({"k": (2, 8, 3, 5)}), r"\(2, 8, 3, 5\)"),
    "another number of values": (BlockwiseAttention(), without({"v": (2, 7, 3, 4)}), r"\(2, 7, 3, 4\)"),
    "another batch": (BlockwiseAttention(), without({"v": (1, 8, 3, 4)}), r"\(1, 8, 3, 4\)"),
    "two inputs": (BlockwiseAttention(), without({})[:2], "three arrays q, k, v"),
    "a bias": (BlockwiseAttention(), [*without({}), jnp.ones((6, 8))], "three arrays q, k, v"),
}


@pytest.mark.parametrize(("rule", "inputs", "message"), WRONG.values(), ids=WRONG)
def test_what_is_no_plain_attention_is_refused(rule, inputs, message):
    with pytest.raises(cv.ArgumentError, match=message):
        rule(lambda q, *rest: q)(*inputs)


def test_keywords_and_variables_are_refused():
    with pytest.raises(cv.ArgumentError, match=r"keywords \['mask'\]"):
        BlockwiseAttention()(lambda q, k, v, mask: q)(*without({}), mask=jnp.ones((6, 8), bool))
    with pytest.raises(cv.ArgumentError, match="1 variables"):
        BlockwiseAttention().lift(lambda w, q, k, v: w * q)(jnp.ones(()), *without({}))


def test_a_block_of_nothing_is_refused():
    with pytest.raises(cv.ArgumentError, match="`block` of BlockwiseAttention must be >= 1, but is 0"):
        BlockwiseAttention(0)
