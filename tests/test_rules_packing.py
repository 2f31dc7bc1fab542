"""Residuals in few bits: how many bytes they take, and that the gradient is right on average."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from memory_use import kept_bytes, temporary_bytes

import crossvjp as cv
from crossvjp.rules import PackResiduals

each_few_bits = pytest.mark.parametrize("bits", [8, 4, 2])


def network(weights, x):
    for w in weights:
        x = jnp.tanh(x @ w)
    return x


def arrays(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def pulled(fn, *primals, bar):
    y, pull = jax.vjp(fn, *primals)
    return y, pull(bar)


def relative(found, expected):
    squares = lambda tree: sum(jnp.sum(leaf.astype(jnp.float32) ** 2) for leaf in jax.tree.leaves(tree))
    return float(jnp.sqrt(squares(jax.tree.map(jnp.subtract, found, expected)) / squares(expected)))


def packed(bits, fn, key=0, group=256):
    return PackResiduals(bits, group).lift(fn, key=jax.random.key(key))


@pytest.mark.parametrize("bits", [16, 8, 4, 2])
def test_residuals_take_as_many_bits_as_said(bits):
    weights = [jax.ShapeDtypeStruct((64, 64), jnp.float32)] * 6
    x = jax.ShapeDtypeStruct((512, 64), jnp.float32)
    own = kept_bytes(network, weights, x)
    assert own >= 6 * 512 * 64 * 4
    # Of 32 bits. A group's minimum and step are 64 bits for 256 numbers. What is kept of the input is no argument any
    # more, but a packed copy.
    overhead = 0 if bits == 16 else 64 / 256
    expected = (own + 512 * 64 * 4) * (bits + overhead) / 32
    assert expected <= kept_bytes(packed(bits, network), weights, x) < 1.02 * expected


def test_the_packed_residuals_of_a_scan_take_less_memory_when_compiled():
    weights, x = jax.ShapeDtypeStruct((16, 64, 64), jnp.float32), jax.ShapeDtypeStruct((512, 64), jnp.float32)
    layer = lambda w, x: jnp.tanh(x @ w)

    def needs(fn):
        run = lambda weights, x: jnp.sum(jax.lax.scan(lambda x, w: (fn(w, x), None), x, weights)[0])
        return temporary_bytes(jax.grad(run), weights, x)

    assert needs(packed(8, layer)) < 0.5 * needs(layer)


@pytest.mark.parametrize("bits", [16, 8, 4, 2])
def test_packing_leaves_the_forward_pass_as_it_is(bits):
    *weights, x = arrays((16, 16), (16, 16), (32, 16))
    y, _ = pulled(packed(bits, network), weights, x, bar=x)
    assert jnp.array_equal(y, pulled(network, weights, x, bar=x)[0])
    assert jnp.array_equal(packed(bits, network)(weights, x), network(weights, x))


@each_few_bits
def test_the_mean_gradient_over_keys_is_the_gradient(bits):
    w, x, y_bar = arrays((6, 4), (16, 6), (16, 4))
    layer = lambda w, x: jnp.sin(x @ w)  # keeps its input, its kernel and a cosine; the pullback is linear in each
    _, expected = pulled(layer, w, x, bar=y_bar)
    draws = 4000
    keys = jax.random.split(jax.random.key(0), draws)
    bars = jax.vmap(lambda key: pulled(PackResiduals(bits, 16).lift(layer, key=key), w, x, bar=y_bar)[1])(keys)
    for bar, exact in zip(bars, expected, strict=True):
        deviation = jnp.std(bar, 0) / draws**0.5
        # 5 standard deviations of 120 numbers: one in 10000 tests; and the rounding of a mean in float32
        assert jnp.all(jnp.abs(jnp.mean(bar, 0) - exact) < 5 * deviation + 1e-5)


def test_fewer_bits_give_a_rougher_gradient():
    *weights, x, y_bar = arrays((16, 16), (16, 16), (64, 16), (64, 16))
    weights = [w / 4 for w in weights]
    _, expected = pulled(network, weights, x, bar=y_bar)
    errors = [relative(pulled(packed(bits, network), weights, x, bar=y_bar)[1], expected) for bits in (8, 4, 2)]
    assert 1e-4 < errors[0] < 0.02
    assert 10 < errors[1] / errors[0] < 30  # the step is 255 / 15 = 17 times as wide
    assert 3 < errors[2] / errors[1] < 8  # and 15 / 3 = 5 times


def test_bfloat16_residuals_need_no_key_and_are_right_to_8_bits():
    w, x, y_bar = arrays((16, 16), (64, 16), (64, 16))
    product = lambda w, x: x @ w
    bars = pulled(PackResiduals(16).lift(product), w, x, bar=y_bar)[1]
    assert 1e-4 < relative(bars, pulled(product, w, x, bar=y_bar)[1]) < 2**-9  # half a unit of 8 bits


@pytest.mark.parametrize(
    "numbers", [np.zeros(16), np.full(16, 0.3), np.repeat([-1.0, 2.0], 8)], ids=["0", "0.3", "two"]
)
@each_few_bits
def test_numbers_at_the_ends_of_their_group_are_kept_exactly(bits, numbers):
    x = jnp.asarray(numbers, jnp.float32)
    fn = lambda w: packed(bits, lambda w, x: w * x, group=16)(w, x)
    with jax.debug_nans(True):  # no step between equal numbers
        _, (bar,) = pulled(fn, jnp.ones(()), bar=jnp.eye(16)[3])
    np.testing.assert_allclose(bar, x[3], rtol=1e-6)  # min + step q rounds


def test_variables_and_small_arrays_are_kept_as_they_are():
    w, x, y_bar = arrays((8, 8), (4, 8), (4, 8))
    product = lambda w, x: x @ w
    found = lambda group: pulled(packed(2, product, group=group), w, x, bar=y_bar)[1]
    _, (w_bar, x_bar) = pulled(product, w, x, bar=y_bar)
    assert jnp.array_equal(found(32)[1], x_bar)  # from the kernel, which has 64 numbers
    assert relative(found(32)[0], w_bar) > 0.05  # from the input, which has 32
    assert jnp.array_equal(found(36)[0], w_bar)


def test_the_same_key_packs_the_same_under_remat():
    *weights, x, y_bar = arrays((16, 16), (16, 16), (64, 16), (64, 16))
    run = packed(2, network)
    for one, other in zip(
        *(jax.tree.leaves(pulled(fn, weights, x, bar=y_bar)) for fn in (run, jax.checkpoint(run))), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)  # fused otherwise
    assert (
        relative(pulled(run, weights, x, bar=y_bar)[1], pulled(packed(2, network, 1), weights, x, bar=y_bar)[1]) > 0.1
    )


def test_packing_into_few_bits_without_a_key_is_an_error():
    with pytest.raises(cv.ArgumentError, match="the call has no key"):
        jax.grad(lambda x: jnp.sum(PackResiduals(8).lift(network)([jnp.ones((16, 16))], x)))(jnp.ones((16, 16)))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"bits": 3}, r"`bits` of PackResiduals\(bits=3, group=256\) must be 16, 8, 4 or 2"),
        ({"group": 0}, "`group` of PackResiduals must be >= 4"),
        ({"group": 6}, "must be a multiple of 4"),
    ],
)
def test_packing_refuses_wrong_fields(wrong, message):
    with pytest.raises(cv.ArgumentError, match=message):
        PackResiduals(**wrong)
