"""The cases of `plain_cases.py` with symbolic zeros."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from plain_cases import CASES, X, Y, case, kind
from plain_cases_values import double


def symbolic(custom_vjp, calls):
    """A rule that records what it is given with symbolic zeros."""

    def fun(t, y, n):
        return t["a"] * y, t["b"] * n

    def fwd(t, y, n):
        primals = jax.tree.leaves((t, y, n))
        calls.append([type(leaf).__name__ for leaf in primals])
        calls.append([(leaf.perturbed, jnp.shape(leaf.value), str(jnp.result_type(leaf.value))) for leaf in primals])
        t, y, n = jax.custom_derivatives.custom_vjp_primal_tree_values((t, y, n))
        return fun(t, y, n), (t, y, n)

    def bwd(kept, g):
        zero = [isinstance(bar, SymbolicZero) for bar in g]
        calls.append([(empty, bar.shape, str(bar.dtype)) for empty, bar in zip(zero, g, strict=True)])
        t, y, _ = kept
        g = [jnp.zeros(bar.shape, bar.dtype) if empty else bar for empty, bar in zip(zero, g, strict=True)]
        return {"a": 3 * g[0] * y, "b": 5 * g[1]}, g[0] * t["a"], None

    f = custom_vjp(fun)
    f.defvjp(fwd, bwd, symbolic_zeros=True)
    return f


T, N = {"a": X, "b": Y}, jnp.array(2)


def outputs(f: Any, which: tuple[int, ...]) -> Any:
    return lambda *args: sum(f(*args)[index].sum() for index in which)


for _name, _wrt, _which, _wrap in [
    ("all", (0, 1), (0, 1), lambda f: f),
    ("a_tree", 0, (0, 1), lambda f: f),
    ("one_argument", 1, (0, 1), lambda f: f),
    ("the_first_output", (0, 1), (0,), lambda f: f),
    ("the_second_output", (0, 1), (1,), lambda f: f),
    ("jit_inside", 1, (0,), jax.jit),
    ("remat", 1, (0,), jax.checkpoint),
    ("scan", 1, (0,), lambda f: lambda t, y, n: lax.scan(lambda c, _: (c, f(t, c, n)), y, None, length=1)[1]),
    ("vmap", 1, (0,), lambda f: jax.vmap(f, (0, 0, None))),
]:
    CASES[f"symbolic_zeros_of_{_name}"] = functools.partial(
        lambda custom_vjp, calls, wrt, which, wrap: jax.grad(outputs(wrap(symbolic(custom_vjp, calls)), which), wrt)(
            T, Y, N
        ),
        wrt=_wrt,
        which=_which,
        wrap=_wrap,
    )


@case
def symbolic_zeros_under_jit_of_grad_and_vmap_of_grad(custom_vjp, calls):
    grad = jax.grad(outputs(symbolic(custom_vjp, calls), (0,)), 1)
    return jax.jit(grad)(T, Y, N), jax.vmap(grad, (0, 0, None))(T, Y, N)


@case
def symbolic_zeros_of_one_leaf_of_a_tree(custom_vjp, calls):
    f = symbolic(custom_vjp, calls)
    return jax.grad(lambda a: f({"a": a, "b": Y}, Y, N)[0].sum())(X)


@case
def symbolic_zeros_of_integers_that_are_differentiated(custom_vjp, calls):
    return jax.grad(outputs(symbolic(custom_vjp, calls), (0, 1)), (0, 2), allow_int=True)(T, Y, N)


@case
def symbolic_zeros_and_numbers(custom_vjp, calls):
    return jax.grad(outputs(symbolic(custom_vjp, calls), (0, 1)), 1)({"a": 2.0, "b": 3.0}, 4.0, 2)


@case
def symbolic_zeros_and_arguments_without_a_gradient(custom_vjp, calls):
    f = custom_vjp(lambda g, x, k: g(x) * k, nondiff_argnums=(0, 2))
    seen = lambda g, x, k: calls.append((kind(g), type(x).__name__, kind(k)))
    f.defvjp(
        lambda g, x, k: (seen(g, x, k), (g(x.value) * k, None))[1], lambda g, k, _, bar: (3 * bar,), symbolic_zeros=True
    )
    return jax.grad(lambda x: f(double, x, 3).sum())(X)


@case
def a_symbolic_zero_as_a_cotangent(custom_vjp, calls):
    f = custom_vjp(lambda x: (x, x))
    f.defvjp(lambda x: ((x.value, x.value), None), lambda _, g: (g[1],), symbolic_zeros=True)
    return jax.grad(lambda x: f(x)[0].sum())(X), jax.grad(lambda x: f(x)[1].sum())(X)
