"""Gradient transformations in the backward pass, against the same ones outside."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hosts import HOSTS, the_input
from twins import dense

import crossvjp as cv
from crossvjp import rules

KEYS = jax.random.split(jax.random.key(4), 4)
PARAMS = {"w": jax.random.normal(KEYS[0], (3, 2)), "b": jax.random.normal(KEYS[1], (2,))}
X = jax.random.normal(KEYS[2], (5, 4, 3))  # five steps' batches


def loss_of(layer):
    return lambda p, x: jnp.mean(jnp.sin(layer(p, x)) ** 2)


def outside(tx: Any, steps: int = 5) -> Any:
    """Trains as usual: the transformation gets the gradient of the loss."""
    params, state = PARAMS, tx.init(PARAMS)
    for x in X[:steps]:
        updates, state = tx.update(jax.grad(loss_of(dense))(params, x), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def inside(tx: Any, steps: int = 5, wrap: Any = lambda step: step) -> Any:
    """Trains under the rule: the gradient of the loss is the step."""

    @wrap
    def step(params, rule, x):
        grads, sent = jax.grad(lambda p, rule: loss_of(rule.lift(dense))(p, x), argnums=(0, 1))(params, rule)
        return optax.apply_updates(params, grads), cv.settle(rule, sent)[0]

    params, rule = PARAMS, rules.Optax.of(tx, cv.variables(PARAMS))
    for x in X[:steps]:
        params, rule = step(params, rule, x)
    return params, rule.current()


def assert_same(found, expected, rtol=0.0):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        if jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
            one, other = jax.random.key_data(one), jax.random.key_data(other)
        np.testing.assert_allclose(one, other, rtol=rtol, atol=rtol)


STATEFUL = {
    "adam": optax.adam(0.1),
    "adamw, which needs the weights": optax.adamw(0.1, weight_decay=0.1),
    "momentum": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "chain": optax.chain(optax.clip_by_global_norm(0.01), optax.scale_by_adam(), optax.scale_by_learning_rate(0.1)),
    "schedule": optax.sgd(optax.exponential_decay(0.1, 2, 0.5)),
    "hyperparameters": optax.inject_hyperparams(optax.adam)(learning_rate=optax.linear_schedule(0.1, 0.0, 4)),
    "key": optax.chain(optax.add_noise(0.1, 0.55, key=3), optax.sgd(0.1)),
    "flags": optax.apply_if_finite(optax.adam(0.1), 3),
    "part": optax.masked(optax.adam(0.1), {"w": True, "b": False}),
    "low precision": optax.sgd(0.1, momentum=0.9, accumulator_dtype=jnp.bfloat16),
    "every second step": optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(),
}


@pytest.mark.parametrize("name", STATEFUL)
def test_five_steps_in_the_backward_pass_are_those_outside(name):
    found, expected = inside(STATEFUL[name]), outside(STATEFUL[name])
    assert_same(found, expected)
    assert np.any(found[0]["w"] != PARAMS["w"])


def test_a_compiled_step_is_traced_once():
    traces = []

    def wrap(step):
        def counted(*args):
            traces.append(args)
            return step(*args)

        return jax.jit(counted)

    assert_same(inside(STATEFUL["adam"], wrap=wrap), outside(STATEFUL["adam"]), rtol=1e-5)  # compiled
    assert len(traces) == 1


STATELESS = {
    "clip": optax.clip(0.01),
    "global norm": optax.clip_by_global_norm(0.01),
    "adaptive clipping": optax.adaptive_grad_clip(0.01),
    "centralize": optax.centralize(),
}


@pytest.mark.parametrize("name", STATELESS)
def test_a_transformation_without_a_state_needs_none(name):
    tx, grad = STATELESS[name], jax.grad(loss_of(dense))(PARAMS, X[0])
    expected: Any = tx.update(grad, tx.init(PARAMS), PARAMS)[0]
    assert_same(jax.grad(loss_of(rules.Optax(tx).lift(dense)))(PARAMS, X[0]), expected)
    assert_same(jax.grad(loss_of(rules.Optax.of(tx, PARAMS).lift(dense)))(PARAMS, X[0]), expected)
    assert np.any(expected["w"] != grad["w"])


def test_a_state_that_is_not_given_is_an_error():
    with pytest.raises(cv.ArgumentError, match=r"keeps a state, but was given none. Make the rule by Optax.of\(tx"):
        jax.grad(loss_of(rules.Optax(optax.adam(0.1)).lift(dense)))(PARAMS, X[0])


def counter(first):
    """A transformation whose state is a whole number, or several, and that adds one."""
    init = lambda params: first
    update = lambda updates, state, params=None: (updates, jax.tree.map(lambda n: n + n.dtype.type(1), state))
    return optax.GradientTransformation(init, update)


# Beside each number that a single float32 does not have.
@pytest.mark.parametrize("first", [jnp.int32(2**24), jnp.int32(2**31 - 7), jnp.int32(-(2**31)), jnp.uint32(2**32 - 7)])
def test_whole_numbers_leave_the_backward_pass_exactly(first):
    _, state = inside(counter(first), steps=2)
    assert state.dtype == first.dtype
    assert int(state) == int(first) + 2


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16"])
def test_small_whole_numbers_do_too(dtype):
    first = jnp.array([np.iinfo(dtype).min, np.iinfo(dtype).max - 2], dtype)
    _, state = inside(counter(first), steps=2)
    assert_same(state, first + jnp.array(2, dtype))


def test_numbers_of_64_bits_do_too():
    with jax.enable_x64(True):
        first = {"n": jnp.array([2**53 + 1, -(2**62)], jnp.int64), "f": jnp.array(1 / 3, jnp.float64)}
        _, state = inside(counter(first), steps=1)
        assert_same(state, {"n": first["n"] + 1, "f": first["f"] + 1})


def sent_and_settled(run: Any) -> Any:
    rule = rules.Optax.of(optax.adam(0.1), PARAMS)
    return cv.settle(rule, jax.grad(run)(rule))[0].current()


def test_a_state_stays_where_the_module_is_not_used():
    run = lambda rule: jnp.sum(PARAMS["w"]) + 0.0 * jnp.sum(rule.lift(dense)(PARAMS, X[0]).astype(int))
    assert_same(sent_and_settled(run), optax.adam(0.1).init(PARAMS))


def test_two_uses_advance_the_state_by_one_step_of_their_mean():
    run = lambda rule: sum(loss_of(rule.lift(dense))(PARAMS, x) for x in X[:2])
    tx = optax.adam(0.1)
    states: Any = [tx.update(jax.grad(loss_of(dense))(PARAMS, x), tx.init(PARAMS))[1] for x in X[:2]]
    found = sent_and_settled(run)
    assert int(found[0].count) == 1
    jax.tree.map(
        lambda f, a, b: np.testing.assert_allclose(f, (a + b) / 2, rtol=1e-6),
        found[0]._replace(count=1),
        *(state[0]._replace(count=1) for state in states),
    )


@pytest.mark.parametrize("around", ["vmap", "scan"])
def test_a_use_in_each_lane_or_step_advances_the_state_by_one_step_of_their_mean(around):
    def run(rule):
        one = lambda x: loss_of(rule.lift(dense))(PARAMS, x)
        if around == "vmap":
            return jnp.sum(jax.vmap(one)(X))
        return jnp.sum(jax.lax.scan(lambda carry, x: (carry, one(x)), 0, X)[1])

    found = sent_and_settled(run)[0]
    grads = [jax.grad(loss_of(dense))(PARAMS, x) for x in X]
    assert int(found.count) == 1
    np.testing.assert_allclose(found.mu["w"], 0.1 * np.mean([g["w"] for g in grads], 0), rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(found.nu["w"], 0.001 * np.mean([g["w"] ** 2 for g in grads], 0), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("name", sorted(HOSTS))
def test_adam_in_the_backward_pass_of_any_framework_is_adam_outside(name):
    host, tx = HOSTS[name], optax.adam(0.1)
    loss = lambda params, wrap: host.run(params, lambda mdl, x: jnp.sum(jnp.sin(wrap(mdl)(x))), the_input())
    rule = host.run(host.params, lambda mdl, _: rules.Optax.of(tx, cv.variables(mdl)), the_input())
    found = expected = host.params
    state = tx.init(expected)
    for _ in range(3):
        updates, state = tx.update(jax.grad(loss)(expected, lambda mdl: mdl), state, expected)
        expected = optax.apply_updates(expected, updates)
        grads, sent = jax.grad(loss, argnums=(0, 1))(found, rule)
        found, rule = optax.apply_updates(found, grads), cv.settle(rule, sent)[0]
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(lambda f, e: np.testing.assert_allclose(f, e, rtol=1e-5), found, expected)  # float32
