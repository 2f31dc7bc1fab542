"""`Rule`, `rule` and `static`: rules as pytrees, with traced and static fields."""

from __future__ import annotations

import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hosts import HOSTS, Host, the_input
from rules import sign_gradient

import crossvjp
from crossvjp import Rule


class Scale(Rule):
    """Scales the parameters' gradient."""

    factor: Any = 1.0
    how: str = crossvjp.static(default="all")

    def backward(self, call, y_bar):
        """Scales all of it."""
        assert self.how == "all"
        bar = call.pullback(y_bar)
        return bar.replace(variables=jax.tree.map(lambda leaf: self.factor * leaf, bar.variables))


def product(w, x):
    return jnp.sum(w * x)


W = jnp.array([1.0, 2.0])


@pytest.fixture(params=sorted(HOSTS))
def host(request: pytest.FixtureRequest) -> Host:
    """Each kind of handle in turn."""
    return HOSTS[request.param]


def test_a_rule_is_a_frozen_hashable_dataclass_that_prints_and_pickles():
    rule = Scale(2.0)
    assert repr(rule) == "Scale(factor=2.0, how='all')"
    assert rule == Scale(2.0)
    assert hash(rule) == hash(Scale(2.0))
    assert pickle.loads(pickle.dumps(rule)) == rule
    with pytest.raises(AttributeError, match="cannot assign to field"):
        rule.factor = 3.0  # pyright: ignore[reportAttributeAccessIssue]  the mistake under test


def test_data_fields_are_leaves_and_static_fields_are_not():
    assert jax.tree.leaves(Scale(2.0, "some")) == [2.0]
    assert jax.tree.map(lambda leaf: leaf + 1, Scale(2.0, "some")) == Scale(3.0, "some")
    assert jax.tree.structure(Scale(1.0)) == jax.tree.structure(Scale(2.0))
    assert jax.tree.structure(Scale(1.0, "some")) != jax.tree.structure(Scale(1.0))


@pytest.mark.parametrize("factor", [3.0, np.float32(3.0), jnp.array(3.0)], ids=["python", "numpy", "jax"])
def test_a_field_scales_the_gradient(host, factor):
    loss = lambda wrap: lambda params: host.run(params, lambda mdl, x: wrap(mdl)(x).sum(), the_input())
    bar = jax.grad(loss(Scale(factor)))(host.params)
    own = jax.grad(loss(lambda mdl: mdl))(host.params)
    jax.tree.map(np.testing.assert_array_equal, bar, jax.tree.map(lambda leaf: 3 * leaf, own))


def test_a_field_may_be_traced_by_jit_scan_vmap_and_grad():
    grad = lambda factor: jax.grad(Scale(factor).lift(product))(W, the_input())
    expected = 3 * the_input()
    np.testing.assert_array_equal(jax.jit(grad)(3.0), expected)
    np.testing.assert_array_equal(jax.vmap(grad)(jnp.array([3.0, 6.0])), jnp.stack([expected, 2 * expected]))
    _, stacked = jax.lax.scan(lambda carry, factor: (carry, grad(factor)), 0, jnp.array([3.0, 6.0]))
    np.testing.assert_array_equal(stacked, jnp.stack([expected, 2 * expected]))
    value_bar = jax.grad(lambda factor: Scale(factor).lift(product)(W, the_input()))(3.0)
    assert float(value_bar) == 0.0  # the output does not depend on the rule
    meta = jax.grad(lambda factor: grad(factor)[0])(3.0)
    assert float(meta) == 1.0  # the gradient does


def test_a_rule_may_be_an_argument_of_jit():
    traces = []

    @jax.jit
    def grad(rule, w):
        traces.append(rule)
        return jax.grad(rule.lift(product))(w, the_input())

    np.testing.assert_array_equal(grad(Scale(2.0), W), 2 * the_input())
    np.testing.assert_array_equal(grad(Scale(5.0), W), 5 * the_input())
    assert len(traces) == 1


def test_a_rule_sees_the_variables_inputs_keywords_and_output_of_its_call():
    seen = {}

    @crossvjp.rule
    def look(call, y_bar):
        seen.update(variables=call.variables, inputs=call.inputs, keywords=call.keywords, output=call.output)
        return call.pullback(y_bar)

    def fn(mdl, x, *, scale):
        return mdl["w"] * x * scale

    jax.grad(lambda w: look.lift(fn)({"w": w}, the_input(), scale=2.0).sum())(W)
    np.testing.assert_array_equal(seen["variables"]["w"], W)
    np.testing.assert_array_equal(seen["inputs"][0], the_input())
    assert seen["keywords"] == {"scale": 2.0}
    np.testing.assert_array_equal(seen["output"], W * the_input() * 2)


def test_a_rule_may_act_on_some_of_the_variables():
    fn = lambda mdl, x: jnp.sum(mdl["a"] * x) + jnp.sum(mdl["b"] * x)
    lifted = Scale(3.0).lift(fn, grad_vars=lambda path, leaf: path == ("a",))
    bar = jax.grad(lifted)({"a": W, "b": W}, the_input())
    np.testing.assert_array_equal(bar["a"], 3 * the_input())
    np.testing.assert_array_equal(bar["b"], the_input())


def test_a_rule_may_return_the_documented_tuple_and_none():
    half = crossvjp.rule(lambda call, y_bar: (None, call.pullback(y_bar).variables))
    w_bar, x_bar = jax.grad(half.lift(product), argnums=(0, 1))(W, the_input())
    np.testing.assert_array_equal(w_bar, the_input())
    np.testing.assert_array_equal(x_bar, jnp.zeros(2))


def test_the_rules_repr_stands_in_its_errors():
    wrong = crossvjp.rule(lambda call, y_bar: (None, jnp.zeros(5)))
    with pytest.raises(crossvjp.CotangentError, match=r"<lambda>'s cotangent of `variables` must be float32\[2\]"):
        jax.grad(wrong.lift(product))(W, the_input())
    assert repr(sign_gradient) == "sign_gradient"


def test_a_rule_class_without_backward_cant_be_built():
    class Unfinished(Rule):
        """Lacks `backward`."""

    with pytest.raises(TypeError, match="abstract"):
        Unfinished()  # pyright: ignore[reportAbstractUsage]  the mistake under test


def test_the_rule_is_not_run_for_an_output_that_nothing_depends_on():
    """A normalising rule would make NaN of a zero cotangent."""
    normalise = crossvjp.rule(
        lambda call, y_bar: call.pullback(jax.tree.map(lambda leaf: leaf / jnp.linalg.norm(leaf), y_bar))
    )
    loss = lambda w: jnp.sum(w) + 0.0 * jax.lax.stop_gradient(normalise.lift(lambda w, x: w * x)(w, the_input())).sum()
    np.testing.assert_array_equal(jax.grad(loss)(W), jnp.ones(2))


def test_a_cotangent_is_cast_to_its_primals_dtype():
    widen = crossvjp.rule(lambda call, y_bar: jax.tree.map(lambda leaf: leaf.astype(jnp.float32), call.pullback(y_bar)))
    w = W.astype(jnp.bfloat16)
    step = lambda carry, x: (carry + widen.lift(product)(w, x), None)
    bar = jax.grad(lambda w: jax.lax.scan(step, jnp.bfloat16(0), jnp.ones((3, 2), jnp.bfloat16))[0] + w.sum())(w)
    assert bar.dtype == jnp.bfloat16
    eager = jax.grad(widen.lift(product))(w, jnp.ones(2, jnp.bfloat16))
    assert eager.dtype == jnp.bfloat16
