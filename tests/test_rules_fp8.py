"""fp8 with delayed scaling is that of Flax, and keeps its scales right where plain overwriting does not."""

from __future__ import annotations

import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import fp8_ops
from twins import dense

import crossvjp as cv
from crossvjp.rules import DelayedScale, Fp8DelayedScaling
from crossvjp.testing import assert_close, assert_same_bits

LENGTH, RATE = 4, 0.01
NAMES = ("input", "kernel", "output_grad")
# Inputs and gradients of sizes that come and go: some are above all that was seen, and old ones are forgotten.
SIZES = ((1.0, 1.0), (30.0, 0.01), (0.1, 5.0), (2.0, 1.0), (2.0, 0.0), (2.0, 3.0), (0.0, 1.0), (500.0, 1e5))


def batch(size=1.0):
    return size * jax.random.normal(jax.random.key(3), (4, 3))


def layer():
    return {"w": jax.random.normal(jax.random.key(4), (3, 2)), "b": jnp.array([0.5, -0.25])}


def loss(y):
    return jnp.sqrt(1 + y**2).sum()


def descend(params, grads):
    return jax.tree.map(lambda w, g: w - RATE * g, params, grads)


def trained_by_flax(op):
    """Trains a layer with Flax's own op, whose scales and histories are overwritten with their gradients."""
    model = nn.Dense(2, dot_general_cls=lambda: op(amax_history_length=LENGTH))
    made = model.init(jax.random.key(0), batch())
    params, metas = {"kernel": layer()["w"], "bias": layer()["b"]}, made["_overwrite_with_gradient"]
    for size, weight in SIZES:
        of = lambda params, metas, x, weight: (
            weight * loss(model.apply({"params": params, "_overwrite_with_gradient": metas}, x))
        )
        value, (grads, metas) = jax.value_and_grad(of, (0, 1))(params, metas, batch(size), weight)
        params = descend(params, grads)
        (meta,) = metas.values()
        told = {name: (meta[f"{name}_scale"][0], meta[f"{name}_amax_history"]) for name in NAMES}
        yield value, {"w": params["kernel"], "b": params["bias"]}, told


def trained_by_rule():
    """Trains the same layer as plain parameters under the rule."""
    rule, params = Fp8DelayedScaling(*(DelayedScale.start(LENGTH) for _ in NAMES)), layer()
    for size, weight in SIZES:
        of = lambda params, rule, x, weight: weight * loss(rule.lift(dense)(params, x))
        value, (grads, seen) = jax.value_and_grad(of, (0, 1))(params, rule, batch(size), weight)
        params, (rule, _) = descend(params, grads), cv.settle(rule, seen)
        yield value, params, told_by(rule)


def told_by(rule):
    return {name: tuple(channel.value for channel in getattr(rule, name)) for name in NAMES}


# The second op multiplies the fp8 numbers and scales the product, which rounds at another place.
@pytest.mark.parametrize(
    ("op", "compare"),
    [(fp8_ops.Fp8DotGeneralOp, assert_same_bits), (fp8_ops.Fp8DirectDotGeneralOp, assert_close)],
    ids=["bit for bit", "products of fp8"],
)
def test_training_is_that_of_flax(op, compare):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Flax is giving up the op that rounds and scales back
        expected = list(trained_by_flax(op))
    for found, step in zip(trained_by_rule(), expected, strict=True):
        for part, same in zip(found, step, strict=True):
            compare(part, same)


X = batch()


def once(use, of):
    return use(of, X).sum()


def twice(use, of):
    return use(of, X).sum() + use(of, X).sum()


def in_vmap(use, of):
    return jax.vmap(lambda x: use(of, x).sum())(jnp.stack([X, X, X])).sum()


def in_scan(use, of):
    return jax.lax.scan(lambda total, x: (total + use(of, x).sum(), None), 0.0, jnp.stack([X, X, X]))[0]


def not_at_all(use, of):
    return 0 * X.sum()


def by_rule(of, x):
    return of.lift(dense)(layer(), x)


def by_overwriting(of, x):
    """The same in Flax's functions, whose gradients are the new scales and histories."""
    x = fp8_ops.in_qdq(jnp.float32, jnp.float8_e4m3fn, x, *of["input"])
    w = fp8_ops.in_qdq(jnp.float32, jnp.float8_e4m3fn, layer()["w"], *of["kernel"])
    return fp8_ops.out_qdq(jnp.float32, jnp.float8_e5m2, dense({"w": w, "b": 0.0}, x), *of["output_grad"])


BEFORE = 3.142
USES = {"once": once, "twice": twice, "in vmap": in_vmap, "in scan": in_scan, "not at all": not_at_all}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_scales_and_histories_are_those_of_one_step_however_often_the_layer_is_used(use):
    rule = Fp8DelayedScaling(
        *(DelayedScale(cv.Overwrite(jnp.array(2.0)), cv.Overwrite(jnp.array([BEFORE, 1.0]))) for _ in NAMES)
    )
    told = told_by(cv.settle(rule, jax.grad(lambda rule: use(by_rule, rule))(rule))[0])
    if use is not_at_all:
        assert_same_bits(told, told_by(rule))
        return
    amax = {"input": jnp.abs(X).max(), "kernel": jnp.abs(layer()["w"]).max(), "output_grad": 1.0}
    top = {"input": 448, "kernel": 448, "output_grad": 57344}
    for name in NAMES:
        scale, history = told[name]
        np.testing.assert_allclose(scale, BEFORE / top[name], rtol=1e-6)  # a mean of equal numbers
        np.testing.assert_allclose(history, [amax[name], BEFORE], rtol=1e-6)


# What they become, as multiples of what they should.
@pytest.mark.parametrize(
    ("use", "scales", "histories"),
    [(once, 1, 1), (twice, 2, 2), (in_vmap, 1, 3), (in_scan, 3, 3), (not_at_all, 0, 0)],
    ids=USES,
)
def test_plain_overwriting_goes_wrong_when_the_layer_is_not_used_just_once(use, scales, histories):
    of = {name: (jnp.array(2.0), jnp.array([BEFORE, 1.0])) for name in NAMES}
    scale, history = jax.grad(lambda of: use(by_overwriting, of))(of)["input"]
    np.testing.assert_allclose(scale, scales * BEFORE / 448, rtol=1e-6)
    np.testing.assert_allclose(history, [histories * jnp.abs(X).max(), histories * BEFORE], rtol=1e-6)


def test_of_several_uses_the_mean_is_told():
    rule = Fp8DelayedScaling()
    both = lambda rule: by_rule(rule, X).sum() + by_rule(rule, 3 * X).sum()
    told = told_by(cv.settle(rule, jax.grad(both)(rule))[0])
    np.testing.assert_allclose(told["input"][1][0], 2 * jnp.abs(X).max(), rtol=1e-6)


def test_the_input_is_kept_in_one_byte_an_entry():
    rule = Fp8DelayedScaling()
    kept = jax.eval_shape(lambda *args: jax.vjp(lambda rule, p, x: rule.lift(dense)(p, x), *args)[1], rule, layer(), X)
    of_its_size = [leaf.dtype for leaf in jax.tree.leaves(kept) if leaf.shape == X.shape]
    assert of_its_size == [jnp.float8_e4m3fn]


def test_something_infinite_changes_no_scale():
    rule = Fp8DelayedScaling(*(DelayedScale.start(LENGTH) for _ in NAMES))
    for x in (X, X.at[0, 0].set(jnp.inf), X):
        rule = cv.settle(rule, jax.grad(lambda rule, x=x: by_rule(rule, x).sum())(rule))[0]
    scale, history = told_by(rule)["input"]
    assert not np.isfinite(history).all()
    np.testing.assert_allclose(scale, jnp.abs(X).max() / 448, rtol=1e-6)


@pytest.mark.parametrize(
    ("fn", "variables", "count"),
    [(lambda p, x: x @ p["v"] @ p["w"], {"v": jnp.eye(3), "w": jnp.eye(3)}, 2), (lambda p, x: x * p, jnp.ones(3), 0)],
    ids=["two kernels", "no kernel"],
)
def test_what_has_not_one_kernel_is_refused(fn, variables, count):
    with pytest.raises(cv.ArgumentError, match=f"rounds one kernel.*but there are {count}"):
        Fp8DelayedScaling().lift(fn)(variables, X)
