"""Rules with a forward pass of their own: what it may run, what it returns, and what becomes of the state."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from five import five
from helpers import is_coming

import crossvjp as cv

P = {"w": jnp.array([[0.2, -1.4], [0.7, 0.4], [-0.1, 2.0]]), "b": jnp.array([0.5, -0.5])}
X = jnp.array([[1.0, -2.0, 0.5], [0.1, 0.3, 3.0]])


def dense(p, x):
    return x @ p["w"] + p["b"]


class SignWeights(cv.Rule):
    """Computes with the signs of the variables, and passes the gradient to the variables themselves."""

    def forward(self, call):
        return call(jax.tree.map(jnp.sign, call.variables), *call.inputs)

    def backward(self, call, y_bar):
        _, pullback = call.vjp_at(jax.tree.map(jnp.sign, call.variables), *call.inputs)
        return pullback(y_bar)


class Rounded(cv.Rule):
    """Rounds to a learned step, which is a field."""

    step: float = 1.0

    def forward(self, call):
        (x,) = call.inputs
        return jnp.round(x / self.step) * self.step, cv.Residuals(rest=jnp.round(x / self.step) - x / self.step)

    def backward(self, call, y_bar):
        return cv.Cotangents((y_bar,), None).with_fields(step=jnp.sum(y_bar * call.residuals.rest))


@pytest.mark.parametrize("subject", five(P, dense, (X,)), ids=lambda subject: subject.name)
@pytest.mark.parametrize("around", [lambda run: run, jax.jit, jax.checkpoint], ids=["eager", "jit", "remat"])
def test_a_rules_forward_pass_is_what_is_computed_with_and_without_a_gradient(subject, around):
    use = SignWeights()
    run = around(lambda held: subject.run(held, subject.rest, lambda mdl, *args: use(mdl)(*args), *subject.inputs)[0])
    expected, pullback = jax.vjp(dense, jax.tree.map(jnp.sign, P), X)
    y_bar = jnp.cos(expected)
    y, own_pullback = jax.vjp(run, subject.variables)
    np.testing.assert_allclose(run(subject.variables), expected, rtol=1e-6)
    np.testing.assert_allclose(y, expected, rtol=1e-6)
    found = subject.common(own_pullback(y_bar)[0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, pullback(y_bar)[0])


@pytest.mark.parametrize("around", [lambda run: run, jax.jit, jax.checkpoint], ids=["eager", "jit", "remat"])
def test_a_learned_field_gets_the_cotangent_that_the_rule_gives_it(around):
    run = around(lambda step, x: jnp.sum(Rounded(step)(lambda x: x)(x)))
    step_bar, x_bar = jax.grad(run, argnums=(0, 1))(0.7, X)
    np.testing.assert_allclose(step_bar, jnp.sum(jnp.round(X / 0.7) - X / 0.7), rtol=1e-6)
    np.testing.assert_array_equal(x_bar, jnp.ones_like(X))


def test_residuals_reach_the_backward_pass_lane_by_lane_under_vmap_and_step_by_step_in_scan():
    one = lambda step, x: jnp.sum(Rounded(step)(lambda x: x)(x))
    steps = jnp.array([0.7, 1.3])
    expected = jnp.array([jax.grad(one)(step, x) for step, x in zip(steps, X, strict=True)])
    np.testing.assert_allclose(jax.vmap(jax.grad(one))(steps, X), expected, rtol=1e-6)
    scanned = jax.grad(lambda steps: jax.lax.scan(lambda c, sx: (c + one(*sx), None), 0.0, (steps, X))[0])(steps)
    np.testing.assert_allclose(scanned, expected, rtol=1e-6)


def test_a_forward_pass_may_run_the_module_on_parts_of_its_inputs():
    class ByRows(cv.Rule):
        def forward(self, call):
            return jnp.concatenate([call(call.variables, x[None]) for x in call.inputs[0]])

        def backward(self, call, y_bar):
            return call.pullback(y_bar)

    y, pullback = jax.vjp(lambda p: ByRows().lift(dense)(p, X), P)
    np.testing.assert_allclose(y, dense(P, X), rtol=1e-6)
    np.testing.assert_allclose(pullback(jnp.ones((2, 2)))[0]["b"], 2 * jnp.ones(2), rtol=1e-6)


def test_an_output_of_another_shape_is_an_error_that_names_both():
    class Wrong(cv.Rule):
        def forward(self, call):
            return call.inputs[0]

        def backward(self, call, y_bar):
            return call.pullback(y_bar)

    with pytest.raises(cv.ArgumentError, match=r"like that of dense, float32\[2, 2\], but returned float32\[2, 3\]"):
        Wrong().lift(dense)(P, X)


def test_a_pair_without_residuals_is_an_error_that_says_where_they_go():
    class Wrong(cv.Rule):
        def forward(self, call):
            return call(call.variables, *call.inputs), {"x": call.inputs[0]}

        def backward(self, call, y_bar):
            return call.pullback(y_bar)

    with pytest.raises(cv.ArgumentError, match=r"goes into Residuals: return \(y, Residuals"):
        Wrong().lift(dense)(P, X)


@pytest.mark.parametrize("name", ["output", "residuals", "pullback"])
def test_what_only_the_backward_pass_has_is_an_error_in_the_forward_pass(name):
    class Wrong(cv.Rule):
        def forward(self, call):
            return call.pullback(None) if name == "pullback" else getattr(call, name)

        def backward(self, call, y_bar):
            return call.pullback(y_bar)

    with pytest.raises(cv.ArgumentError, match=rf"`call.{name}` is there in `backward` only.*vjp_at"):
        Wrong().lift(dense)(P, X)


def test_a_residual_that_was_not_kept_is_an_error_that_lists_those_that_were():
    class Wrong(cv.Rule):
        def forward(self, call):
            return call(call.variables, *call.inputs), cv.Residuals(mask=X)

        def backward(self, call, y_bar):
            return call.pullback(y_bar * call.residuals.scale)

    with pytest.raises(AttributeError, match=r"kept mask, but no 'scale': return \(y, Residuals\(scale="):
        jax.grad(lambda p: jnp.sum(Wrong().lift(dense)(p, X)))(P)


def test_a_differentiated_field_that_the_backward_pass_is_silent_about_is_an_error():
    class Silent(cv.Rule):
        step: float = 1.0

        def forward(self, call):
            return call.inputs[0] * self.step

        def backward(self, call, y_bar):
            return (y_bar, None)

    use = lambda step: jnp.sum(Silent(step)(lambda x: x)(X))
    if is_coming():  # it does not say what is differentiated
        assert jax.grad(use)(2.0) == 0
    else:
        with pytest.raises(cv.CotangentError, match=r"field 'step' is differentiated.*with_fields\(step="):
            jax.grad(use)(2.0)
    assert jax.grad(lambda step: use(jax.lax.stop_gradient(step)))(2.0) == 0


def test_a_cotangent_of_a_field_that_the_rule_does_not_have_is_an_error():
    wrong = cv.rule(lambda call, y_bar: call.pullback(y_bar).with_fields(scale=1.0))
    with pytest.raises(cv.CotangentError, match=r"cotangent for its field 'scale', but its fields .* are \[\]"):
        jax.grad(lambda p: jnp.sum(wrong.lift(dense)(p, X)))(P)


def test_a_cotangent_of_a_field_must_have_the_fields_shape():
    class Wrong(cv.Rule):
        step: float = 1.0

        def backward(self, call, y_bar):
            return call.pullback(y_bar).with_fields(step=jnp.ones(3))

    with pytest.raises(cv.CotangentError, match=r"the field `step` must be float32\[\].*but is float32\[3\]"):
        jax.grad(lambda step: jnp.sum(Wrong(step).lift(dense)(P, X)))(jnp.array(2.0))


class NetOfLinen(nn.Module):
    """A layer with running statistics, under a rule."""

    use: Any

    @nn.compact
    def __call__(self, x):
        return self.use(nn.BatchNorm(use_running_average=False, momentum=0.0))(x)


class Doubled(cv.Rule):
    """Runs the module on twice its input, as often as it is told."""

    how: str = cv.static(default="once")

    def forward(self, call):
        (x,) = call.inputs
        if self.how == "never":
            return 2 * x
        if self.how == "in a loop":
            return jax.lax.fori_loop(0, 3, lambda _, y: call(call.variables, 2 * x), x)
        return call(call.variables, 2 * x)

    def backward(self, call, y_bar):
        return call.pullback(y_bar)


@pytest.mark.parametrize(("how", "factor"), [("once", 2), ("never", 1), ("in a loop", 1)])
@pytest.mark.parametrize("around", [lambda run: run, jax.jit], ids=["eager", "jit"])
def test_the_state_is_that_of_the_last_run_outside_of_loops_or_else_of_a_plain_one(how, factor, around):
    run: Any = NetOfLinen(Doubled(how)).apply
    variables: Any = NetOfLinen(lambda mdl: mdl).init(jax.random.key(0), X)

    @around
    def loss(params):
        y, state = run({**variables, "params": params}, X, mutable=["batch_stats"])
        return jnp.sum(y), state["batch_stats"]["BatchNorm_0"]["mean"]

    expected = factor * X.mean(axis=0)
    np.testing.assert_allclose(loss(variables["params"])[1], expected, rtol=1e-6)
    np.testing.assert_allclose(jax.grad(loss, has_aux=True)(variables["params"])[1], expected, rtol=1e-6)


def test_dropout_masks_are_the_same_in_every_run_of_the_module():
    class Twice(cv.Rule):
        def forward(self, call):
            return call(call.variables, *call.inputs) + call(call.variables, *call.inputs)

        def backward(self, call, y_bar):
            return call.pullback(2 * y_bar)

    def net(x):
        return Twice().lift(lambda mdl, x: mdl(x) * hk.dropout(hk.next_rng_key(), 0.5, jnp.ones((2, 2))))(
            mdl := hk.Linear(2), x
        ) + 0 * mdl(x)

    transformed = hk.transform(net)
    params = transformed.init(jax.random.key(0), X)
    y: Any = transformed.apply(params, jax.random.key(1), X)
    assert set(np.unique(np.asarray(y) == 0)) == {False, True}  # kept at 4 or dropped in both, never in one
    single: Any = hk.transform(lambda x: hk.Linear(2)(x)).apply(params, None, X)
    np.testing.assert_allclose(np.where(y == 0, 0, y / 4), np.where(y == 0, 0, single), rtol=1e-6)


def test_a_rule_runs_an_equinox_module_at_other_variables():
    linear: Any = eqx.nn.Linear(3, 2, key=jax.random.key(0))
    y = SignWeights()(linear)(X[0])
    np.testing.assert_allclose(y, jnp.sign(linear.weight) @ X[0] + jnp.sign(linear.bias), rtol=1e-6)


def test_variables_of_another_structure_are_an_error():
    class Wrong(cv.Rule):
        def forward(self, call):
            return call({"w": call.variables["w"]}, *call.inputs)

        def backward(self, call, y_bar):
            return call.pullback(y_bar)

    with pytest.raises(cv.ArgumentError, match=r"structure of `call\.variables`"):
        Wrong().lift(dense)(P, X)
