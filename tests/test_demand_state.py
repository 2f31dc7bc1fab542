"""Users' needs about state, random keys and side channels; tests/test_demand.py has the table of all needs."""

from __future__ import annotations

from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from demand import OUTER, each_framework, each_keeper, each_outer, each_way, each_writing_keeper, gradients, scalar
from flax import nnx
from hosts import the_input
from rules import f, fwd, identity, unchanged

import crossvjp
from crossvjp.testing import assert_close

W, TOTAL, X = jnp.array(2.0), jnp.array(5.0), jnp.array(3.0)


def loss_of(keeper, use):
    """The output plus the square of the state after the call, which is `TOTAL + W * X` = 11."""

    def loss(w, total, x):
        y, after = keeper.run(use, w, total, x)
        return y + after**2

    return loss


def keeper_gradients(keeper, use, outer=OUTER["eager"]):
    """Differentiates the loss with respect to the parameter, the state before the call and the input."""
    grad = lambda loss: jax.grad(loss, argnums=(0, 1, 2))
    return [float(bar) for bar in outer(grad, loss_of(keeper, use))(W, TOTAL, X)]


def differentiated(run):
    return jax.value_and_grad(run, argnums=(0, 1), has_aux=True)


HAIKU_OUTER = {
    "eager": lambda run: run,
    "jit": jax.jit,
    "grad": differentiated,
    "grad_jit": lambda run: differentiated(jax.jit(run)),
    "grad_remat": lambda run: differentiated(jax.checkpoint(run)),
    "jit_grad": lambda run: jax.jit(differentiated(run)),
}


def haiku_that_draws_and_writes(use):
    """Uses a module, draws a key and sets state in the body of the rule, in a Haiku function."""

    def body(mdl, x):
        noise = jax.random.normal(hk.next_rng_key(), x.shape)
        hk.set_state("calls", hk.get_state("calls", (), init=jnp.zeros) + 1)
        return mdl(x + noise)

    def net(x):
        y = use(body)(hk.Linear(3), x)
        return y, jax.random.normal(hk.next_rng_key())

    transformed = hk.transform_with_state(net)
    key = jax.random.PRNGKey(1)
    params, state = transformed.init(key, the_input())

    def run(params, x):
        (y, drawn), after = transformed.apply(params, state, key, x)
        return jnp.sum(jnp.sin(y)), {"y": y, "drawn": drawn, "calls": after["~"]["calls"]}

    return run, params


BODIES = {
    "rule": lambda body: identity.lift(body),
    "custom_vjp": lambda body: crossvjp.custom_vjp(body, lambda mdl, x: crossvjp.vjp(body, mdl, x), unchanged),
}


@pytest.mark.parametrize("outer", HAIKU_OUTER)
@pytest.mark.parametrize("use", BODIES.values(), ids=BODIES)
def test_row_2_haiku_keys_state_and_modules_in_the_body_are_the_same_eager_and_staged(use, outer):
    run, params = haiku_that_draws_and_writes(use)
    own, _ = haiku_that_draws_and_writes(lambda body: body)
    got = HAIKU_OUTER[outer](run)(params, the_input())
    assert_close(got, HAIKU_OUTER[outer](own)(params, the_input()))
    _, aux = got[0] if "grad" in outer else got
    assert float(aux["calls"]) == 1.0


@pytest.mark.parametrize("use", BODIES.values(), ids=BODIES)
def test_row_2_haiku_keys_and_state_in_the_body_under_scan(use):
    def scanned(run):
        def loss(params, x):
            def step(total, shift):
                value, aux = run(params, x + shift)
                return total + value, aux

            return jax.lax.scan(step, 0.0, jnp.arange(3.0))

        return differentiated(loss)

    run, params = haiku_that_draws_and_writes(use)
    own, _ = haiku_that_draws_and_writes(lambda body: body)
    assert_close(scanned(run)(params, the_input()), scanned(own)(params, the_input()))


@each_outer
@each_keeper
def test_row_8_a_gradient_through_the_state_that_a_call_wrote_arrives(keeper, outer):
    expected = [3.0 + 22.0 * 3.0, 22.0, 2.0 + 22.0 * 2.0]
    assert keeper_gradients(keeper, identity.lift(f), outer) == expected
    assert keeper_gradients(keeper, f, outer) == expected


@each_keeper
def test_row_8_a_rule_on_the_output_leaves_the_gradient_through_written_state_alone(keeper):
    tenfold = crossvjp.rule(lambda call, y_bar: call.pullback(jax.tree.map(lambda leaf: 10 * leaf, y_bar)))
    own_part = 1 if keeper.writes else 10  # where the state is an output, the rule has its cotangent too
    expected = [10 * 3.0 + own_part * 22.0 * 3.0, own_part * 22.0, 10 * 2.0 + own_part * 22.0 * 2.0]
    assert keeper_gradients(keeper, tenfold.lift(f)) == expected


class AnswersForState(crossvjp.Rule):
    """Gives 100 times the cotangent of the state to the parameter."""

    def backward(self, call, y_bar, updates_bar=None):
        """Keeps the input's own cotangent, of the output alone."""
        return answer_for_state(call.pullback, y_bar, updates_bar)


def answer_for_state(pullback, y_bar, updates_bar):
    (state_bar,) = jax.tree.leaves(updates_bar)
    bar = pullback(y_bar)
    return bar.replace(variables=jax.tree.map(lambda leaf: leaf + 100 * state_bar, bar.variables))


ANSWERING = {"rule": AnswersForState().lift(f), "custom_vjp": crossvjp.custom_vjp(f, fwd, answer_for_state)}


@each_outer
@pytest.mark.parametrize("use", ANSWERING.values(), ids=ANSWERING)
@each_writing_keeper
def test_row_8_a_rule_that_asks_for_it_gets_the_cotangent_of_the_state_and_answers_for_it(keeper, use, outer):
    assert keeper_gradients(keeper, use, outer) == [3.0 + 100 * 22.0, 22.0, 2.0]


def record(mdl, x, *state):
    """Runs the module, which writes its state; keeps what a hand-written backward pass needs."""
    return mdl(x, *state), (crossvjp.variables(mdl), x)


def by_hand(residuals, y_bar):
    variables, x = residuals
    (w,) = jax.tree.leaves(variables)
    bar, *state_bar = y_bar if isinstance(y_bar, tuple) else (y_bar,)
    return bar * w, *state_bar, jax.tree.map(lambda _: 7 * bar * x, variables)


@each_outer
@each_keeper
def test_row_9_a_statistic_recorded_in_the_forward_function_is_there_once_after_the_call(keeper, outer):
    use = crossvjp.custom_vjp(f, record, by_hand)

    def loss(w, x):
        return keeper.run(use, w, TOTAL, x)

    grad = lambda loss: jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    (y, after), (w_bar, x_bar) = outer(grad, loss)(W, X)
    assert (float(y), float(after)) == (6.0, 11.0)
    assert (float(w_bar), float(x_bar)) == (21.0, 2.0)
    assert float(keeper.run(use, W, TOTAL, X)[1]) == 11.0


def test_row_9_a_statistic_that_fn_does_not_record_is_an_error_under_jit():
    class Layer(nnx.Module):
        def __init__(self):
            self.amax = nnx.BatchStat(jnp.array(0.0))

    def forward(mdl, x):
        mdl.amax.set_value(jnp.max(jnp.abs(x)))
        return 2 * x, None

    use = crossvjp.custom_vjp(lambda mdl, x: 2 * x, forward, lambda residuals, y_bar: (2 * y_bar, None))
    with pytest.raises(crossvjp.ArgumentError, match=r"The forward function \S+ must write the same state as \S+\."):
        jax.grad(jax.jit(lambda x: use(Layer(), x)))(X)


@each_outer
@each_keeper
def test_row_10_the_gradient_of_a_state_may_be_its_new_value(keeper, outer):
    """The fp8 convention: the training step overwrites such variables by their "gradient"."""

    def backward(pullback, y_bar):
        bar = pullback(y_bar)
        if not keeper.writes:
            return bar.replace(inputs=(bar.inputs[0], jax.tree.map(lambda leaf: 0 * leaf + 42, bar.inputs[1])))
        new = lambda path, leaf: 0 * leaf + 42 if "total" in jax.tree_util.keystr(path) else leaf
        return bar.replace(variables=jax.tree_util.tree_map_with_path(new, bar.variables))

    forward = lambda mdl, *args: crossvjp.vjp(f, mdl, *args, grad_vars=True)
    use = crossvjp.custom_vjp(f, forward, backward, grad_vars=True)
    loss = lambda w, total, x: keeper.run(use, w, total, x)[0]
    grad = lambda loss: jax.grad(loss, argnums=(0, 1, 2))
    assert [float(bar) for bar in outer(grad, loss)(W, TOTAL, X)] == [3.0, 42.0, 2.0]


REACHED = {"closed over": OUTER["eager"], "an input": lambda grad, loss: jax.jit(grad(loss))}


@pytest.mark.parametrize(("how", "outer"), REACHED.items(), ids=REACHED)
@each_framework
def test_row_10_a_mutable_array_is_written_to_in_the_backward_pass(host, how, outer):
    def forward(mdl, x, stash):
        y, pullback = crossvjp.vjp(f, mdl, x)
        return y, (pullback, stash)

    def backward(residuals, y_bar):
        pullback, given = residuals
        (given if how == "an input" else stash)[...] = y_bar
        bar = pullback(y_bar)
        return bar.inputs[0], None, bar.variables

    use = crossvjp.custom_vjp(lambda mdl, x, stash: mdl(x), forward, backward)
    loss = lambda params, stash: host.run(params, scalar(use), the_input(), stash)
    stash = jax.new_ref(jnp.zeros(3))
    params_bar = outer(jax.grad, loss)(host.params, stash if how == "an input" else None)
    assert_close(params_bar, gradients(host, f)[0])
    y = host.run(host.params, f, the_input())
    np.testing.assert_allclose(stash[...], jnp.cos(y) * jnp.array([1.0, -2.0, 3.0]), rtol=1e-5)


@each_way
@each_framework
def test_row_23_metrics_leave_the_backward_pass_as_the_gradient_of_an_input_that_nothing_uses(host, how, outer):
    fn = lambda mdl, x, sink: mdl(x)

    def backward(pullback, y_bar):
        bar = pullback(y_bar)
        norm = jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(bar.variables)))
        return bar.replace(inputs=(bar.inputs[0], {"norm": norm, "largest": jnp.abs(y_bar).max()}))

    by_functions = crossvjp.custom_vjp(fn, lambda mdl, *args: crossvjp.vjp(fn, mdl, *args), backward)
    measured: Any = {"custom_vjp": by_functions, "rule": crossvjp.rule(lambda c, b: backward(c.pullback, b)).lift(fn)}

    def loss(params, sink):
        y = host.run(params, measured[how], the_input(), sink)
        return jnp.sum(y * jnp.array([1.0, -2.0, 3.0]))

    sink = {"norm": jnp.zeros(()), "largest": jnp.zeros(())}
    grad = lambda loss: jax.grad(loss, argnums=(0, 1))
    params_bar, metrics = outer(grad, loss)(host.params, sink)
    own = jax.grad(lambda params: jnp.sum(host.run(params, f, the_input()) * jnp.array([1.0, -2.0, 3.0])))(host.params)
    assert_close(params_bar, own)
    expected = np.sqrt(sum(np.sum(leaf**2) for leaf in jax.tree.leaves(own)))
    np.testing.assert_allclose(metrics["norm"], expected, rtol=1e-6)
    assert float(metrics["largest"]) == 3.0


@each_framework
def test_row_23_metrics_of_every_step_of_a_scan_add_up_in_the_sink(host):
    count = crossvjp.rule(lambda call, y_bar: call.pullback(y_bar).replace(inputs=(None, jnp.ones(()))))
    use = count.lift(lambda mdl, x, sink: mdl(x))

    def loss(sink):
        step = lambda total, shift: (total + host.run(host.params, use, the_input() + shift, sink).sum(), None)
        return jax.lax.scan(step, 0.0, jnp.arange(4.0))[0]

    assert float(jax.grad(loss)(jnp.zeros(()))) == 4.0
