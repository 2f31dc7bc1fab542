"""Effects inside a wrapped function: mutable arrays, callbacks, changes of structure; honoured, or refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import io_callback
from rules import by_custom_vjp, f, fwd, identity, unchanged

import crossvjp as cv
from crossvjp import ArgumentError, CotangentError, HandleError
from crossvjp.testing import assert_same_bits

W, X = jnp.array([2.0, 3.0]), jnp.array([1.0, -1.0])


def record(w, x, ref):
    """Writes a value that is not differentiated, and gives one that is."""
    ref[...] = jax.lax.stop_gradient(w * x)
    return jnp.sum(w * x)


def eager(loss, ref):
    return jax.grad(lambda w: loss(w, ref))(W)


def grad_jit(loss, ref):
    return jax.grad(jax.jit(loss))(W, ref)


def jit_grad(loss, ref):
    return jax.jit(jax.grad(loss))(W, ref)


def grad_remat(loss, ref):
    return jax.grad(lambda w: jax.jit(loss)(w, ref))(W)


each_transform = pytest.mark.parametrize("transform", [eager, grad_jit, jit_grad, grad_remat], ids=lambda t: t.__name__)


@each_transform
def test_a_mutable_array_among_the_inputs_is_written_once(transform):
    ref = jax.new_ref(jnp.zeros(2))
    assert_same_bits(transform(lambda w, ref: identity.lift(record)(w, X, ref), ref), X)
    assert_same_bits(ref[...], W * X)


@each_transform
def test_a_mutable_array_in_the_handle_is_written_once(transform):
    ref = jax.new_ref(jnp.zeros(2))
    rule = identity.lift(lambda held, x: record(held["w"], x, held["ref"]))
    assert_same_bits(transform(lambda w, ref: rule({"w": w, "ref": ref}, X), ref), X)
    assert_same_bits(ref[...], W * X)


@pytest.mark.parametrize("transform", [eager, grad_jit, jit_grad], ids=lambda t: t.__name__)
def test_a_mutable_array_counts_backward_passes(transform):
    """The backward function may write to one too: a channel out of it, where no vmap is around."""
    ref = jax.new_ref(jnp.zeros(()))

    def backward(residuals, y_bar):
        pullback, ref = residuals
        ref[...] += y_bar
        return pullback(y_bar).replace(inputs=(None, None))

    def forward(w, x, ref):
        y, pullback = cv.vjp(lambda w, x, ref: jnp.sum(w * x), w, x, ref)
        return y, (pullback, ref)

    call = cv.custom_vjp(lambda w, x, ref: jnp.sum(w * x), forward, backward)
    loss = lambda w, ref: 3 * call(w, X, ref)
    if transform is grad_jit and not jax.config.values.get("jax_custom_vjp3"):
        # Where JAX says what is differentiated, it does not see that the residual is an argument.
        with pytest.raises(ValueError, match="mutable array references cannot be returned"):
            transform(loss, ref)
        return
    assert_same_bits(transform(loss, ref), 3 * X)
    assert_same_bits(ref[...], jnp.array(3.0))


def test_a_traced_mutable_array_may_be_closed_over():
    ref = jax.new_ref(jnp.zeros(2))

    def loss(w, ref):
        def write(call, y_bar):
            ref[...] += y_bar
            return call.pullback(y_bar)

        def fn(w, x):
            ref[...] = jax.lax.stop_gradient(w * x)
            return jnp.sum(w * x)

        return cv.rule(write).lift(fn)(w, X)

    assert_same_bits(jax.jit(jax.grad(loss))(W, ref), X)
    assert_same_bits(ref[...], W * X + 1)


def test_a_mutable_array_can_be_no_output():
    with pytest.raises(
        ArgumentError, match=r"returns a Ref\{float32\[2\]\} at \['kept'\].*Return its value, ref\[...\]"
    ):
        identity.lift(lambda w, x, ref: {"kept": ref})(W, X, jax.new_ref(X))
    with pytest.raises(ArgumentError, match=r"returns a Ref\{float32\[2\]\} at its root"):
        jax.jit(identity.lift(lambda w, x: jax.new_ref(x)))(W, X)


def test_a_mutable_array_is_not_written_again_for_what_a_rule_does_not_speak_of():
    """The module's own derivative runs the function again, in the backward pass."""

    def fn(w, ref, *, x):
        ref[...] += 1.0
        return jnp.sum(w * x)

    ref = jax.new_ref(jnp.zeros(2))
    rule = cv.rule(lambda call, y_bar: (*call.pullback(y_bar).inputs, call.pullback(y_bar).variables))
    with pytest.raises(
        ArgumentError, match=r"a Ref\{float32\[2\]\} among its arguments.*write the mutable array a second"
    ):
        jax.grad(lambda x: rule.lift(fn)(W, ref, x=x))(X)
    ref = jax.new_ref(jnp.zeros(2))
    assert_same_bits(jax.grad(lambda x: identity.lift(fn)(W, ref, x=x))(X), W)  # it answers for the keyword
    assert_same_bits(ref[...], jnp.ones(2))


def test_debug_callbacks_run():
    seen = []

    def fn(w, x):
        jax.debug.callback(lambda value: seen.append(float(value)), jnp.sum(x))
        return jnp.sum(w * x)

    jax.block_until_ready(jax.jit(jax.grad(identity.lift(fn)))(W, 2 * X + 1))
    jax.effects_barrier()
    assert set(seen) == {2.0}


def test_a_callback_that_has_no_derivative_is_refused_as_by_jax():
    def fn(w, x):
        return jnp.sum(w * io_callback(lambda x: x, jax.ShapeDtypeStruct((2,), jnp.float32), x))

    refused = (ValueError, NotImplementedError)  # JAX's: the second where its coming custom_vjp refuses any effect
    with pytest.raises(refused, match=r"IO callbacks do not support JVP|Effects not supported"):
        jax.grad(identity.lift(fn))(W, X)


class Changing(nnx.Module):
    """Changes itself in one way when it is called."""

    def __init__(self, change):
        self.dense = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
        self.scale = nnx.Param(jnp.ones(2))
        self.calls = 0
        self.mode = "first"
        self.spare = nnx.Param(jnp.ones(2))
        self._change = change

    def __call__(self, x):
        self._change(self)
        return self.dense(x) * self.scale[...]


def count(mdl):
    mdl.calls += 1


def switch(mdl):
    mdl.mode = "second"


def delete(mdl):
    del mdl.spare


def share(mdl):
    mdl.other = mdl.scale


def grow(mdl):
    mdl.head = nnx.Linear(2, 2, rngs=nnx.Rngs(1))


def retype(mdl):
    mdl.scale = nnx.BatchStat(jnp.ones(2))


def annotate(mdl):
    mdl.scale.set_metadata("tag", "new")


@pytest.mark.parametrize("wrap", [identity, by_custom_vjp], ids=["rule", "custom_vjp"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (count, r"at calls, from 0 to 1\. Under a rule a call may write Variables"),
        (switch, r"at mode, from 'first' to 'second'"),
        (delete, r"at spare, from a Param.* to nothing"),
        (share, r"at other, from nothing to a Param shared with scale"),
        (grow, r"at head, from nothing to a Linear"),
        (retype, r"at scale, from a Param with.* to a BatchStat"),
        (annotate, r"at scale, from a Param with .* to a Param with .*'tag': 'new'"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_nnx_a_change_that_cant_be_carried_over_is_refused_by_its_path(wrap, change, message):
    mdl = Changing(change)
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(mdl)))
    with pytest.raises(HandleError, match=message):
        nnx.grad(lambda mdl: wrap(mdl)(X).sum())(mdl)
    with pytest.raises(HandleError, match=message):
        wrap(mdl)(X)
    assert mdl.calls == 0
    assert set(vars(mdl)) == set(vars(Changing(change)))
    assert_same_bits(nnx.to_pure_dict(nnx.state(mdl)), before)


def test_nnx_new_and_written_variables_are_carried_over():
    def learn(mdl):
        mdl.seen = nnx.BatchStat(mdl.scale[...] + 1)
        mdl.scale[...] = mdl.scale[...] * 2

    mdl, own = Changing(learn), Changing(learn)
    assert_same_bits(identity(mdl)(X), own(X))
    assert_same_bits(nnx.to_pure_dict(nnx.state(mdl)), nnx.to_pure_dict(nnx.state(own)))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda bar: float("nan"), r"has a leaf at its root where `variables` has none"),
        (lambda bar: {**bar, "w": float("nan")}, r"must be float32\[2\] at \['w'\], but is float32\[\]"),
        (lambda bar: {**bar, "more": bar["w"]}, r"has a leaf at \['more'\] where `variables` has none"),
        (lambda bar: {**bar, "w": jax.random.key(0)}, r"must be float32\[2\] at \['w'\], but is key<fry>\[\]"),
        (
            lambda bar: {**bar, "w": jax.random.split(jax.random.key(0))},
            r"float32\[2\] at \['w'\], but is key<fry>\[2\]",
        ),
        (lambda bar: {**bar, "w": np.array(["a", "b"])}, r"must be float32\[2\] at \['w'\], but is of type ndarray"),
        (lambda bar: {**bar, "w": np.array([None, None])}, r"must be float32\[2\] at \['w'\], but is of type ndarray"),
        (
            lambda bar: {**bar, "w": jax.new_ref(bar["w"])},
            r"must be float32\[2\] at \['w'\], but is Ref\{float32\[2\]\}",
        ),
    ],
)
def test_a_cotangent_that_is_none_names_its_path(wrong, message):
    call = cv.custom_vjp(
        lambda held, x: jnp.sum(held["w"] * x),
        lambda held, x: cv.vjp(lambda held, x: jnp.sum(held["w"] * x), held, x),
        lambda pullback, y_bar: cv.Cotangents(pullback(y_bar).inputs, wrong(pullback(y_bar).variables)),
    )
    with pytest.raises(CotangentError, match=message):
        jax.grad(lambda w: call({"w": w}, X))(W)


def test_the_pieces_of_this_file_are_right_without_a_mistake():
    call = cv.custom_vjp(f, fwd, unchanged)
    assert_same_bits(jax.grad(lambda w: call(jax.tree_util.Partial(lambda w, x: jnp.sum(w * x), w), X))(W), X)
