"""The cases of `plain_cases.py` that differ in the transforms around, and in the form of the functions."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from plain_cases import X, Y, both, case, describe, product, scanned

from crossvjp.testing import checking_leaks


@case
def a_plain_decorator(custom_vjp, calls):
    @custom_vjp
    def f(x, y):
        return x * x * y

    f.defvjp(  # pyright: ignore[reportFunctionMemberAccess]
        lambda x, y: (f(x, y), (x, y)), lambda kept, g: (2 * g * kept[1], g)
    )
    return f(X, Y), both(f)(X, Y)


@case
def a_call_without_a_gradient_runs_the_function_alone(custom_vjp, calls):
    rule = product(custom_vjp, calls)
    return rule(X, Y), jax.jit(rule)(X, Y), jax.vmap(rule)(X, Y)


@case
def grad(custom_vjp, calls):
    return both(product(custom_vjp, calls))(X, Y)


@case
def grad_in_one_argument(custom_vjp, calls):
    return jax.grad(lambda y: product(custom_vjp, calls)(X, y).sum())(Y)


@case
def vjp_called_twice(custom_vjp, calls):
    y, pull = jax.vjp(product(custom_vjp, calls), X, Y)
    return y, pull(X), pull(Y)


@case
def jit_of_grad(custom_vjp, calls):
    return jax.jit(both(product(custom_vjp, calls)))(X, Y)


@case
def grad_of_jit(custom_vjp, calls):
    return both(jax.jit(product(custom_vjp, calls)))(X, Y)


@case
def vmap_of_grad(custom_vjp, calls):
    return jax.vmap(both(product(custom_vjp, calls)), (0, None))(X, Y)


@case
def grad_of_vmap_with_an_axis_that_is_not_mapped(custom_vjp, calls):
    return both(jax.vmap(product(custom_vjp, calls), (0, None)))(X, Y)


@case
def grad_of_scan(custom_vjp, calls):
    rule = product(custom_vjp, calls)
    return both(lambda x, y: scanned(rule)(x, y))(X, Y)


@case
def grad_of_a_loop_of_fixed_trip_count(custom_vjp, calls):
    rule = product(custom_vjp, calls)
    return both(lambda x, y: lax.fori_loop(0, 3, lambda _, c: rule(c, y), x))(X, Y)


@case
def while_loop_without_a_gradient(custom_vjp, calls):
    rule = product(custom_vjp, calls)
    return lax.while_loop(lambda c: jnp.abs(c).max() < 100, lambda c: rule(c, Y), X)


@case
def a_branch_of_cond(custom_vjp, calls):
    rule = product(custom_vjp, calls)
    return both(jax.jit(lambda x, y: lax.cond(x[0] > 0, rule, lambda x, y: x + y, x, y)))(X, Y)


@case
def grad_of_remat(custom_vjp, calls):
    return both(jax.checkpoint(product(custom_vjp, calls)))(X, Y)


@case
def grad_of_remat_of_jit(custom_vjp, calls):
    return jax.jit(both(jax.checkpoint(jax.jit(product(custom_vjp, calls)))))(X, Y)


@case
def grad_of_grad(custom_vjp, calls):
    return jax.grad(lambda x: both(product(custom_vjp, calls))(x, Y)[1][1].sum())(X)


@case
def jacrev_twice(custom_vjp, calls):
    return jax.jacrev(jax.jacrev(product(custom_vjp, calls), 1), 0)(X, Y)


@case
def a_rule_of_its_own_for_the_backward_function(custom_vjp, calls):
    inner = product(custom_vjp, calls)
    f = custom_vjp(lambda x, y: x + y)
    f.defvjp(lambda x, y: (x + y, (x, y)), lambda kept, g: (inner(g, kept[0]), inner(g, kept[1])))
    return both(f)(X, Y), jax.grad(lambda x: both(f)(x, Y)[1][0].sum())(X)


@case
def one_inside_another(custom_vjp, calls):
    inner = product(custom_vjp, calls)
    outer = custom_vjp(lambda x, y: inner(x, y) + x)
    outer.defvjp(lambda x, y: jax.vjp(lambda x, y: inner(x, y) + x, x, y), lambda pull, g: pull(2 * g))
    return both(outer)(X, Y), jax.jit(both(outer))(X, Y)


@case
def a_function_that_calls_itself_in_fwd(custom_vjp, calls):
    f = custom_vjp(lambda x: x * x)

    def fwd(x):
        calls.append("fwd")
        return f(x), x

    f.defvjp(fwd, lambda x, g: (8 * g * x,))
    return jax.grad(lambda x: f(x).sum())(X), jax.jit(jax.grad(lambda x: f(f(x)).sum()))(X)


@case
def a_function_that_recurs(custom_vjp, calls):
    def power(x, n):
        return x if n == 1 else x * f(x, n - 1)

    def bwd(n, x, g):
        calls.append(n)
        return (n * g,)

    f = functools.partial(custom_vjp, nondiff_argnums=(1,))(power)
    f.defvjp(lambda x, n: (power(x, n), x), bwd)
    return f(X, 4), jax.grad(lambda x: f(x, 4).sum())(X)


@case
def an_output_that_is_not_used(custom_vjp, calls):
    rule = product(custom_vjp, calls)
    stopped = jax.grad(lambda x: lax.stop_gradient(rule(x, Y)).sum())
    return jax.grad(lambda x: (rule(x, Y) * 0, x)[1].sum())(X), stopped(X)


@case
def one_of_two_outputs_used(custom_vjp, calls):
    def bwd(kept, g):
        calls.append(describe(g))
        return (2 * g[0] + g[1],)

    f = custom_vjp(lambda x: (x, 3 * x))
    f.defvjp(lambda x: ((x, 3 * x), None), bwd)
    return [jax.grad(lambda x, i=i: f(x)[i].sum())(X) for i in (0, 1)]


@case
def grad_of_what_does_not_depend_on_the_arguments(custom_vjp, calls):
    rule = product(custom_vjp, calls)
    return jax.grad(lambda x: x.sum() + rule(Y, Y).sum())(X)


@case
def optimize_remat_under_remat(custom_vjp, calls):
    rule = product(custom_vjp, calls, optimize_remat=True)
    return jax.jit(both(jax.checkpoint(lambda x, y: rule(rule(x, y), y))))(X, Y)


@case
def optimize_remat_elsewhere(custom_vjp, calls):
    rule = product(custom_vjp, calls, optimize_remat=True)
    grad = jax.grad(lambda x, y: lax.scan(lambda c, y: (rule(c, y), c), x, y)[0].sum(), (0, 1))
    return rule(X, Y), both(rule)(X, Y), jax.jit(both(rule))(X, Y), jax.vmap(both(rule))(X, Y), grad(X, Y)


@case
def the_program_under_optimize_remat_has_no_forward_rule(custom_vjp, calls):
    f = custom_vjp(lambda x: x * x)
    f.defvjp(lambda x: (x * x + 0 * lax.cos(x), x), lambda x, g: (3 * g * x,), optimize_remat=True)
    loss = lambda x: jax.checkpoint(lambda x: f(f(x)))(x).sum()
    calls.append(str(jax.jit(jax.value_and_grad(loss)).lower(X).compile().as_text()).count("cosine("))
    return jax.grad(loss)(X)


@case
def eval_shape(custom_vjp, calls):
    x = jax.ShapeDtypeStruct((3,), jnp.bfloat16)
    rule = product(custom_vjp, calls)
    return str(jax.eval_shape(rule, x, x)), str(jax.eval_shape(both(rule), x, x))


@case
def names_and_signature(custom_vjp, calls):
    def documented(x: float, y: int = 3, *, z: str = "") -> float:
        """What it does."""
        return x

    documented.extra = 5  # pyright: ignore[reportFunctionMemberAccess]
    f = custom_vjp(documented)
    own = f.__name__, f.__doc__, f.__qualname__, f.__module__, f.extra
    return own, str(inspect.signature(f)), f.__wrapped__ is f.fun


@case
def attributes(custom_vjp, calls):
    def fun(x, y):
        return x

    def fwd(x, y):
        return x, None

    def bwd(y, _, g):
        return (g,)

    f = custom_vjp(fun, nondiff_argnums=(1,))
    before = f.fwd, f.bwd, f.symbolic_zeros, f.optimize_remat, f.nondiff_argnums, f.fun is fun
    returned = f.defvjp(fwd, bwd, optimize_remat=True)
    after = f.fwd is fwd, f.bwd is bwd, f.symbolic_zeros, f.optimize_remat
    f.defvjp(fwd, bwd, True)
    return before, returned, after, f.symbolic_zeros, f.optimize_remat, hasattr(f, "nothing"), callable(f), {f: 1}[f]


@case
def defvjp_by_keyword_and_again(custom_vjp, calls):
    f = product(custom_vjp, calls)
    first = both(f)(X, Y)
    f.defvjp(fwd=lambda x, y: (x * y, None), bwd=lambda _, g: (g, g), symbolic_zeros=False, optimize_remat=False)
    return first, both(f)(X, Y)


@case
def the_rule_of_a_function_that_is_itself_wrapped(custom_vjp, calls):
    f = custom_vjp(jax.jit(lambda x, y: x * y))
    f.defvjp(lambda x, y: (x * y, (x, y)), lambda kept, g: (3 * g * kept[1], g))
    partial = custom_vjp(functools.partial(lambda k, x: k * x, 2.0))
    partial.defvjp(lambda x: (2 * x, None), lambda _, g: (7 * g,))
    return both(f)(X, Y), partial(X), jax.grad(lambda x: partial(x).sum())(X)


@case
def a_builtin_and_an_object_that_can_be_called(custom_vjp, calls):
    @dataclasses.dataclass
    class Scale:
        factor: float

        def __call__(self, x):
            return self.factor * x

    out = []
    for fun in (Scale(3.0), jnp.negative, jax.nn.relu, abs):
        f = custom_vjp(fun)
        f.defvjp(lambda x: (2 * x, None), lambda _, g: (7 * g,))
        out.append((f(X), jax.value_and_grad(lambda x, f=f: f(x).sum())(X)))
    return out


@case
def a_decorated_function_held_by_a_class(custom_vjp, calls):
    rule = product(custom_vjp, calls)
    layer: Any = type("Layer", (), {"rule": staticmethod(rule)})
    return jax.grad(lambda x: layer().rule(x, Y).sum())(X), layer.rule(X, Y)


@case
def a_method_called_through_its_class(custom_vjp, calls):
    class Layer:
        @functools.partial(custom_vjp, nondiff_argnums=(0,))
        def scale(self, x):
            return 2 * x

        bars = lambda self, _, g: (7 * g,)
        scale.defvjp(lambda self, x: (2 * x, None), bars)  # pyright: ignore[reportFunctionMemberAccess]

    return Layer.scale(Layer(), X), jax.grad(lambda x: Layer.scale(Layer(), x).sum())(X)


@case
def values_closed_over_that_are_not_traced(custom_vjp, calls):
    table = jnp.arange(3.0)
    f = custom_vjp(lambda x: x * table)
    f.defvjp(lambda x: (x * table, None), lambda _, g: (3 * g * table,))
    return jax.jit(jax.grad(lambda x: f(x).sum()))(X), jax.grad(lambda x: jax.checkpoint(f)(x).sum())(X)


@case
def named_axes(custom_vjp, calls):
    f = custom_vjp(lambda x: x - lax.pmean(x, "i"))
    f.defvjp(lambda x: (x - lax.pmean(x, "i"), None), lambda _, g: (lax.psum(3 * g, "i"),))
    return jax.vmap(lambda x: jax.value_and_grad(f)(x), axis_name="i")(jnp.arange(4.0))


@case
def grad_with_aux_and_has_aux_of_vjp(custom_vjp, calls):
    f = product(custom_vjp, calls)
    y, pull, aux = jax.vjp(lambda x: (f(x, Y), f(x, X)), X, has_aux=True)
    return y, pull(Y), aux


@case
def linear_transpose_of_the_pullback(custom_vjp, calls):
    _, pull = jax.vjp(product(custom_vjp, calls), X, Y)
    return jax.jacobian(lambda g: pull(g)[0])(X), jax.jvp(lambda g: pull(g)[1], (X,), (Y,))


@case
def definitions_of_the_function_are_reached_through_it(custom_vjp, calls):
    negative = jax.custom_batching.custom_vmap(lambda x: -x)
    f = custom_vjp(negative)
    f.defvjp(lambda x: (negative(x), None), lambda _, g: (3 * g,))
    f.def_vmap(lambda size, batched, x: (2 * x, True))
    return f(X), jax.vmap(f)(X)


@case
def one_around_custom_jvp(custom_vjp, calls):
    square = jax.custom_jvp(lambda x: x * x)
    square.defjvp(lambda primals, tangents: (square(*primals), 9 * tangents[0]))
    f = custom_vjp(square)
    f.defvjp(lambda x: jax.vjp(square, x), lambda pull, g: pull(g))
    return jax.value_and_grad(lambda x: f(x).sum())(X)


@case
def callbacks_in_both_passes(custom_vjp, calls):
    def told(name, value):
        jax.debug.callback(lambda value: calls.append((name, value.tolist())), value)
        return value

    f = custom_vjp(lambda x: told("fun", x))
    f.defvjp(lambda x: (told("fwd", x), None), lambda _, g: (told("bwd", 2 * g),))
    bars = jax.grad(lambda x: f(x).sum())(X), jax.jit(jax.grad(lambda x: f(x).sum()))(X)
    jax.effects_barrier()
    return bars


@case
def disabled_jit_and_leak_checks(custom_vjp, calls):
    with jax.disable_jit():
        first = both(jax.jit(product(custom_vjp, calls)))(X, Y)
    with checking_leaks():
        return first, jax.jit(both(product(custom_vjp, calls)))(X, Y), both(jax.jit(product(custom_vjp, calls)))(X, Y)


@case
def a_while_loop_inside(custom_vjp, calls):
    fun = lambda x: lax.while_loop(lambda c: c.sum() < 9, lambda c: 2 * c, x)
    f = custom_vjp(fun)
    f.defvjp(lambda x: (fun(x), None), lambda _, g: (7 * g,))
    return jax.grad(lambda x: f(x).sum())(abs(X)), jax.vmap(jax.grad(f))(abs(X))


@case
def remat_with_policies(custom_vjp, calls):
    policies = jax.checkpoint_policies.nothing_saveable, jax.checkpoint_policies.everything_saveable
    return [both(jax.checkpoint(product(custom_vjp, calls), policy=policy))(X, Y) for policy in policies]


@case
def one_primitive_in_the_program(custom_vjp, calls):
    calls.append(str(jax.make_jaxpr(product(custom_vjp, calls))(X, Y)).count("custom_vjp_call"))
    return X
