"""JAX's coming `custom_vjp`, which `JAX_CUSTOM_VJP3=1` chooses: ours has the same results under it, and what it lacks.

`make coming` runs the suite in that mode; here each test sets its own. A test of what it
lacks that fails after an upgrade of JAX says that something was mended, here or in `core/_one_call.py`.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import custom_vjp_of
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.experimental import io_callback
from rules import identity

import crossvjp as cv
from crossvjp.testing import _one_by_one, assert_close, checking_leaks, one_by_one

W, X = jnp.array(0.7), jnp.arange(1.0, 4.0)
Function = Callable[[Any, Any], Any]


@pytest.fixture
def coming() -> Iterator[None]:
    """The coming implementation."""
    with custom_vjp_of("coming"):
        yield


@pytest.fixture(params=["today", "coming"])
def mode(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each implementation in turn."""
    with custom_vjp_of(request.param):
        yield request.param


def fn(w, x):
    return jnp.sin(w * x)


def bars(w, x, y_bar):
    """Gives twice the gradient of `fn`; `w` may have fewer axes than `x`."""
    bar = 2 * y_bar * jnp.cos(w * x)
    w_bar = bar * x
    return w_bar if w_bar.ndim == jnp.ndim(w) else w_bar.sum(), bar * w


def by_hand() -> Function:
    """The rule as a `jax.custom_vjp` written by hand."""
    rule = jax.custom_vjp(fn)
    rule.defvjp(lambda w, x: (fn(w, x), (w, x)), lambda kept, y_bar: bars(kept[0], kept[1], y_bar))
    return rule


def of_one_tree() -> Function:
    """The same with one argument, a tuple."""
    rule = jax.custom_vjp(lambda both: fn(*both))
    rule.defvjp(lambda both: (fn(*both), both), lambda kept, y_bar: (bars(kept[0], kept[1], y_bar),))
    return lambda w, x: rule((w, x))


def with_symbolic_zeros() -> Function:
    """The same with symbolic zeros; its gradient is zero in what is not differentiated."""

    def forward(w, x):
        return fn(w.value, x.value), (w.value, x.value, jnp.array([w.perturbed, x.perturbed]))

    def backward(kept, y_bar):
        assert not isinstance(y_bar, SymbolicZero)
        w, x, perturbed = kept
        return tuple(jnp.where(able, bar, 0) for able, bar in zip(perturbed, bars(w, x, y_bar), strict=True))

    rule = jax.custom_vjp(fn)
    rule.defvjp(forward, backward, symbolic_zeros=True)
    return rule


@cv.rule
def doubled(call, y_bar):
    """Doubles the gradient."""
    bar = call.pullback(y_bar)
    twice = jax.tree.map(lambda leaf: 2 * leaf, (bar.inputs, bar.variables))
    return bar.replace(inputs=twice[0], variables=twice[1])


def optimised(custom_vjp: Any) -> Function:
    """The same with `optimize_remat`."""
    rule = custom_vjp(fn)
    rule.defvjp(lambda w, x: (fn(w, x), (w, x)), lambda kept, y_bar: bars(kept[0], kept[1], y_bar), optimize_remat=True)
    return rule


def ours() -> Function:
    """The same as a rule of ours."""
    return doubled.lift(fn)


def summed(function: Function) -> Function:
    return lambda w, x: function(w, x).sum()


def scanned(function: Function) -> Function:
    return lambda w, x: lax.scan(lambda total, x: (total + function(w, x), None), 0.0, x)[0]


def mapped(function: Function) -> Function:
    return lambda w, x: jax.vmap(function, (None, 0))(w, x).sum()


def looped(function: Function) -> Function:
    return lambda w, x: lax.fori_loop(0, 3, lambda _, x: function(w, x), x).sum()


def chosen(function: Function) -> Function:
    return lambda w, x: lax.cond(w > 0, function, lambda w, x: w * x, w, x).sum()


def gradient(loss: Function) -> Function:
    return jax.grad(loss, argnums=(0, 1))


def squared_gradient(loss: Function) -> Function:
    return lambda w, x: jax.grad(loss)(w, x) ** 2


TRANSFORMS: dict[str, Callable[[Function], Function]] = {
    "eager": lambda f: f,
    "jit": jax.jit,
    "while": lambda f: lambda w, x: lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, f(w, c[1])), (0, x))[1],
    "grad": lambda f: gradient(summed(f)),
    "jit_grad": lambda f: jax.jit(gradient(summed(f))),
    "grad_jit": lambda f: gradient(jax.jit(summed(f))),
    "vmap_grad": lambda f: jax.vmap(gradient(f), (None, 0)),
    "grad_vmap": lambda f: gradient(mapped(f)),
    "grad_vmap_vmap": lambda f: gradient(mapped(lambda w, x: jax.vmap(f, (0, None))(w * jnp.ones(2), x))),
    "grad_scan": lambda f: gradient(scanned(f)),
    "jit_grad_scan": lambda f: jax.jit(gradient(scanned(f))),
    "grad_fori": lambda f: gradient(looped(f)),
    "grad_cond": lambda f: gradient(chosen(f)),
    "remat": lambda f: gradient(jax.checkpoint(summed(f))),
    "jit_remat": lambda f: jax.jit(gradient(jax.checkpoint(summed(f)))),
    "grad_jit_remat": lambda f: gradient(jax.jit(jax.checkpoint(summed(f)))),
    "remat_that_saves_all": lambda f: gradient(
        jax.checkpoint(summed(f), policy=jax.checkpoint_policies.everything_saveable)
    ),
    "scan_remat": lambda f: gradient(scanned(jax.checkpoint(f))),
    "remat_scan": lambda f: gradient(jax.checkpoint(scanned(f))),
    "vmap_remat": lambda f: jax.vmap(gradient(jax.checkpoint(f)), (None, 0)),
    "second_order": lambda f: gradient(squared_gradient(summed(f))),
    "second_order_jit": lambda f: gradient(jax.jit(squared_gradient(jax.jit(summed(f))))),
    "second_order_vmap": lambda f: gradient(squared_gradient(mapped(f))),
    "second_order_scan": lambda f: gradient(squared_gradient(scanned(f))),
    "second_order_remat": lambda f: gradient(squared_gradient(jax.checkpoint(summed(f)))),
    "hessian": lambda f: jax.jacrev(jax.jacrev(f)),
    "rule_in_rule": lambda f: gradient(lambda w, x: f(w, f(w, x)).sum()),
    "forward_over_reverse": lambda f: lambda w, x: jax.jvp(jax.grad(summed(f)), (w, x), (w, x)),
}
each_transform = pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
FORWARD_ALONE = [TRANSFORMS[name] for name in ("eager", "jit", "while")]
UNDER_REMAT = [transform for name, transform in TRANSFORMS.items() if "remat" in name]
NO_WORDS = r"^\s*(-+\s*For simplicity|$)"  # but for what JAX adds to every message


@functools.cache
def by_hand_today(transform: Any) -> Any:
    """The reference of each transform."""
    with custom_vjp_of("today"):
        return transform(by_hand())(W, X)


@each_transform
def test_a_rule_gives_in_either_mode_what_it_gives_by_hand_today(mode, transform):
    # To rounding: the rule linearises `fn` where the other one multiplies by cos.
    assert_close(transform(ours())(W, X), by_hand_today(transform), rtol=1e-5)


@each_transform
def test_the_comparison_catches_the_functions_own_gradient(coming, transform):
    plain = transform(fn)(W, X)
    if transform in FORWARD_ALONE:
        assert_close(plain, by_hand_today(transform))
        return
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_close(plain, by_hand_today(transform), rtol=1e-5)


@each_transform
@pytest.mark.parametrize("make", [by_hand, of_one_tree, with_symbolic_zeros], ids=lambda make: make.__name__)
def test_by_hand_trees_and_symbolic_zeros_fail_under_remat_alone(coming, make, transform):
    if make is by_hand or transform not in UNDER_REMAT:
        assert_close(transform(make())(W, X), by_hand_today(transform))
        return
    # This is why ours has one argument an array and, in this mode, no symbolic zeros.
    error, words = {
        of_one_tree: (ValueError, "safe_zip"),
        with_symbolic_zeros: (NotImplementedError, NO_WORDS),  # JAX's: its coming implementation lacks them under remat
    }[make]
    with pytest.raises(error, match=words):
        transform(make())(W, X)
    with custom_vjp_of("today"):
        assert_close(transform(make())(W, X), by_hand_today(transform))


@pytest.mark.parametrize("custom_vjp", [jax.custom_vjp, cv.custom_vjp], ids=["by_hand", "ours"])
@pytest.mark.parametrize(
    ("name", "lacks"),
    [("remat", ""), ("scan_remat", ""), ("vmap_remat", "for vmap support"), ("second_order_remat", "for jvp support")],
)
def test_optimize_remat_works_but_for_vmap_and_second_order_in_the_coming_mode(mode, custom_vjp, name, lacks):
    run = TRANSFORMS[name](optimised(custom_vjp))
    if mode == "today" or not lacks:
        assert_close(run(W, X), by_hand_today(TRANSFORMS[name]))
        return
    with pytest.raises(NotImplementedError, match=f"{lacks}, .*OptRemat"):  # JAX's: OptRemat is its own
        run(W, X)


@pytest.mark.parametrize("name", ["grad", "grad_jit", "remat"])
def test_symbolic_zeros_of_ours_work_in_either_mode_but_tell_nothing_in_the_coming_one(mode, name):
    seen = []

    def forward(w, x):
        seen.append((w.perturbed, x.perturbed))
        return fn(w.value, x.value), (w.value, x.value)

    rule = cv.custom_vjp(fn)
    rule.defvjp(forward, lambda kept, y_bar: bars(kept[0], kept[1], y_bar), symbolic_zeros=True)
    bar, _ = TRANSFORMS[name](lambda w, x: rule(w, lax.stop_gradient(x)))(W, X)
    assert_close(bar, by_hand_today(TRANSFORMS[name])[0])
    assert {*seen} == {(True, mode == "coming")}


def test_a_rule_is_told_that_all_is_differentiated_in_the_coming_mode(mode):
    seen = []

    @cv.rule
    def look(call, y_bar):
        seen.append(call.perturbed)
        return call.pullback(y_bar)

    jax.grad(summed(look.lift(fn)))(W, X)
    assert {(told.variables, told.inputs) for told in seen} == {(True, (mode == "coming",))}


@pytest.mark.parametrize("make", [by_hand, ours], ids=lambda make: make.__name__)
def test_remat_around_a_vmap_of_a_rule_works_today_alone(mode, make):
    remat = gradient(jax.checkpoint(mapped(make())))
    if mode == "today":
        assert_close(remat(W, X), gradient(mapped(make()))(W, X))
        return
    with pytest.raises(TypeError, match="can't apply forward-mode autodiff"):
        remat(W, X)


@pytest.mark.parametrize("make", [by_hand, ours], ids=lambda make: make.__name__)
def test_jvp_and_linearize_raise_by_hand_and_under_a_rule(mode, make):
    with pytest.raises(TypeError, match="can't apply forward-mode autodiff"):
        jax.jvp(make(), (W, X), (W, X))
    words = {"today": "can't apply forward-mode autodiff", "coming": "must implement `lin` and `linearized`"}[mode]
    with pytest.raises((TypeError, NotImplementedError), match=words):  # JAX's coming one raises the second
        jax.linearize(make(), W, X)[1](W, X)


def own_gradient(function: Any) -> Any:
    """Writes by hand the rule that changes nothing."""
    rule = jax.custom_vjp(function)
    rule.defvjp(lambda *args: jax.vjp(function, *args), lambda pullback, y_bar: pullback(y_bar))
    return rule


@pytest.mark.parametrize("wrap", [own_gradient, identity.lift], ids=["by_hand", "ours"])
def test_an_eager_call_is_compiled_in_the_coming_mode(mode, wrap):
    """So it rounds as compiled programs do, and Python can't branch on its values."""
    branching = wrap(lambda w, x: w * x if x.sum() > 0 else x)
    if mode == "today":
        assert_close(branching(W, X), W * X)
        return
    with pytest.raises(jax.errors.TracerBoolConversionError, match="Attempted boolean conversion"):
        branching(W, X)


@pytest.mark.parametrize("wrap", [own_gradient, identity.lift], ids=["by_hand", "ours"])
def test_an_eager_call_by_hand_gives_a_constant_truth_value_as_pythons_in_the_coming_mode(mode, wrap):
    """`eqx.nn.BatchNorm` writes one into its state, where ours leaves an array."""
    constant = wrap(lambda w, x: (w * x, jnp.array(True)))(W, X)[1]
    by_hand = {"today": jax.Array, "coming": bool}[mode]
    assert isinstance(constant, by_hand if wrap is own_gradient else jax.Array)


@pytest.mark.parametrize("wrap", [own_gradient, identity.lift], ids=["by_hand", "ours"])
def test_a_traced_value_may_be_closed_over_by_hand_today_alone_and_under_a_rule(mode, wrap):
    def loss(wrap):
        return lambda w, factor: wrap(lambda w, x: fn(w, x) * factor)(w, X).sum()

    run = jax.jit(jax.grad(loss(wrap)))
    if mode == "today" or wrap is not own_gradient:
        assert_close(run(W, 3 * W), jax.grad(loss(lambda function: function))(W, 3 * W))
        return
    with pytest.raises(jax.errors.UnexpectedTracerError, match="closed over a DynamicJaxprTracer"):
        run(W, 3 * W)


def test_a_traced_module_must_be_an_input_in_the_coming_mode(mode):
    layer = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(layer)

    def loss(as_input):
        def run(w, state):
            outer = nnx.merge(graphdef, state)
            closing = identity.lift(lambda w, x: w * outer(x))
            taking = identity.lift(lambda w, x, outer: w * outer(x))
            return (taking(w, X[:2], outer) if as_input else closing(w, X[:2])).sum()

        return jax.jit(jax.grad(run))

    assert_close(loss(as_input=True)(W, state), layer(X[:2])[0])
    if mode == "today":
        assert_close(loss(as_input=False)(W, state), layer(X[:2])[0])
        return
    with pytest.raises(jax.errors.UnexpectedTracerError, match="closed over a DynamicJaxprTracer"):
        loss(as_input=False)(W, state)


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("wrap", [jax.custom_vjp, identity.lift], ids=["by_hand", "ours"])
def test_io_callbacks_inside_work_today_alone(mode, wrap, ordered):
    seen = []

    def logged(w, x):
        io_callback(lambda x: seen.append(x.tolist()), None, x, ordered=ordered)
        return w * x

    rule = wrap(logged)
    if wrap is jax.custom_vjp:
        rule.defvjp(lambda w, x: (w * x, None), lambda kept, y_bar: (None, None))
    if mode == "today":
        assert_close(jax.jit(rule)(W, X), W * X)
        jax.effects_barrier()
        assert seen == [X.tolist()]
        return
    with pytest.raises(NotImplementedError, match="Effects not supported"):  # JAX's, of both rules alike
        rule(W, X)


@pytest.mark.parametrize("name", ["eager", "grad", "grad_jit", "grad_vmap", "grad_scan", "jit_remat"])
@pytest.mark.parametrize("ordered", [False, True])
def test_debug_callbacks_inside_run_as_often_as_without_a_rule(mode, name, ordered):
    seen = []

    def logged(w, x):
        jax.debug.callback(lambda x: seen.append(float(np.sum(x))), w * x, ordered=ordered)
        return fn(w, x)

    def run(function):
        seen.clear()
        outcome = TRANSFORMS[name](function)(W, X)
        jax.effects_barrier()
        return outcome, [*seen]

    (outcome, ours), (expected, plain) = run(identity.lift(logged)), run(logged)
    assert_close(outcome, expected, rtol=1e-5)  # other programs, which round differently
    np.testing.assert_allclose(*(values if ordered else sorted(values) for values in (ours, plain)), rtol=1e-6)


@pytest.mark.parametrize("make", [by_hand, ours], ids=lambda make: make.__name__)
def test_the_leak_checker_takes_a_variable_of_jax_for_a_leak(mode, make):
    """In `lower_jaxpr`, where an operation reads the result of a custom_vjp call; the report of it may fail too."""
    rule = make()
    with checking_leaks():
        jax.jit(rule)(W, X)
        if mode == "today":
            jax.jit(summed(rule))(W, X)
            return
        with pytest.raises((Exception, IndexError), match=r"Leaked trace|list index out of range"):
            jax.jit(summed(rule))(W, X)


class Keeps(nnx.Module):
    """Writes into its state what it returns."""

    def __init__(self):
        self.w = nnx.Param(jnp.ones(2))
        self.kept = nnx.BatchStat(jnp.zeros(2))

    def __call__(self, x):
        y = self.w.get_value() * x
        self.kept.set_value(y)
        return y


def test_a_rule_sees_the_cotangent_of_an_output_that_nobody_used_in_the_coming_mode_alone(mode):
    seen = []

    @cv.rule
    def normalised(call, y_bar):
        seen.append(y_bar.tolist())
        return call.pullback(y_bar / jnp.linalg.norm(y_bar))

    def loss(module):
        normalised(module)(jnp.array([3.0, -4.0]))
        return jnp.sum(module.kept.get_value())

    bar = jax.tree.leaves(nnx.grad(loss)(Keeps()))[0].tolist()
    if mode == "today":
        assert seen == []
        assert bar == [3.0, -4.0]
        return
    assert seen == [[0.0, 0.0]]
    assert np.isnan(bar).all()


def test_an_unused_output_has_zeros_in_the_coming_mode_alone_and_whole_numbers_have_none_in_either(mode):
    seen = []

    @cv.rule
    def look(call, y_bar):
        seen.append(y_bar)
        return call.pullback(y_bar)

    several = look.lift(lambda w, x: (fn(w, x), jnp.argmax(x), w * x))
    bar = jax.grad(lambda w: several(w, X)[0].sum())(W)
    assert_close(bar, jnp.sum(X * jnp.cos(W * X)))
    used, whole, unused = seen[-1]  # before, the backward pass was traced on types
    np.testing.assert_array_equal(used, jnp.ones(3))
    assert whole is None
    if mode == "today":
        assert unused is None
        return
    np.testing.assert_array_equal(unused, jnp.zeros(3))


class Changed(cv.Rule):
    """Holds a function of the output, and one of its cotangent."""

    of_output: Callable[[Any], Any] = cv.static()
    of_cotangent: Callable[[Any], Any] = cv.static()

    def forward(self, call):
        return self.of_output(call(call.variables, *call.inputs))

    def backward(self, call, y_bar):
        return call.pullback(self.of_cotangent(y_bar))


@pytest.mark.parametrize("name", ["grad", "jit_grad", "grad_jit", "grad_jit_remat"])
def test_a_rule_with_a_forward_pass_may_hold_several_functions(mode, name):
    """In the coming mode the function itself always runs too, today under grad(jit), and the two runs are compared."""
    rule = Changed(lambda y: y + 1, lambda y_bar: 2 * y_bar)
    assert_close(TRANSFORMS[name](rule.lift(fn))(W, X), by_hand_today(TRANSFORMS[name]), rtol=1e-5)  # to rounding


def test_what_the_rule_does_not_speak_of_counts_as_differentiated_in_the_coming_mode(mode):
    def grown(limited):
        def scaled(params, x):
            factor = limited(params["factor"])
            return params["w"] * x * lax.while_loop(lambda c: c < 100, lambda c: c * factor, jnp.ones(()))

        rule = identity.lift(scaled, grad_vars="w")
        return jax.grad(lambda w: rule({"w": w, "factor": jnp.array(2.0)}, X).sum())

    np.testing.assert_array_equal(grown(lax.stop_gradient)(W), 128 * X.sum())
    if mode == "today":
        np.testing.assert_array_equal(grown(lambda factor: factor)(W), 128 * X.sum())
        return
    with pytest.raises(ValueError, match=r"Reverse-mode differentiation does not work for lax\.while_loop"):
        grown(lambda factor: factor)(W)


@pytest.mark.parametrize("make", [by_hand, ours], ids=lambda make: make.__name__)
@pytest.mark.parametrize(("transform", "runs"), [(jax.jit, 1), (mapped, 1), (scanned, 3)], ids=["jit", "vmap", "scan"])
def test_one_by_one_looks_into_a_rule(mode, monkeypatch, make, transform, runs):
    ran = []
    apply = _one_by_one._apply
    monkeypatch.setattr(_one_by_one, "_apply", lambda eqn, args: ran.append(eqn.primitive.name) or apply(eqn, args))
    assert_close(one_by_one(transform(make()))(W, X), transform(fn)(W, X))
    assert ran.count("sin") == runs


def test_the_variable_and_the_setting_choose_the_implementation(mode):
    names = {"today": "custom_vjp", "coming": "custom_vjp3"}
    assert type(jax.custom_vjp(fn)).__name__ == names[mode]
    environment = os.environ | {"JAX_CUSTOM_VJP3": str(int(mode == "coming"))}
    program = "import jax; print(type(jax.custom_vjp(abs)).__name__)"
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [names[mode]]
