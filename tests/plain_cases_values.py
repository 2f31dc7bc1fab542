"""The cases of `plain_cases.py` that differ in what goes in and out: positions, names, trees, dtypes, residuals."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from plain_cases import X, Y, both, case, describe, fitted, kind, product

Point = collections.namedtuple("Point", ["x", "y"])


def apply(f, x, y):
    return f(x) * y


def first_function(custom_vjp, calls):
    def bwd(f, kept, g):
        calls.append(f.__name__)
        return 2 * f(kept[0]) * g, g * kept[1]

    return (lambda f, x, y: (apply(f, x, y), (x, y))), bwd


def double(x):
    return 2 * x


@case
def a_function_first_by_partial(custom_vjp, calls):
    rule = functools.partial(custom_vjp, nondiff_argnums=(0,))(apply)
    rule.defvjp(*first_function(custom_vjp, calls))
    return both(functools.partial(rule, double))(X, Y), jax.jit(both(functools.partial(rule, double)))(X, Y)


@case
def a_function_first_by_position(custom_vjp, calls):
    rule = custom_vjp(apply, (0,))
    rule.defvjp(*first_function(custom_vjp, calls))
    return both(functools.partial(rule, double))(X, Y), rule(double, X, Y)


@case
def a_function_first_by_name(custom_vjp, calls):
    rule = custom_vjp(apply, nondiff_argnames=("f",))
    rule.defvjp(*first_function(custom_vjp, calls))
    return both(functools.partial(rule, double))(X, Y), rule(y=Y, f=double, x=X)


@case
def a_function_in_the_middle(custom_vjp, calls):
    rule = custom_vjp(lambda x, f, y: f(x) * y, nondiff_argnums=[1])
    rule.defvjp(lambda x, f, y: (f(x) * y, (x, y)), lambda f, kept, g: (f(kept[1]) * g, 7 * g))
    return both(lambda x, y: rule(x, double, y))(X, Y), jax.vmap(both(lambda x, y: rule(x, double, y)))(X, Y)


@case
def functions_at_both_ends_come_first_in_their_order(custom_vjp, calls):
    def bwd(f, name, k, x, g):
        calls.append((f.__name__, name, k))
        return (f(x) * g,)

    rule = custom_vjp(lambda f, x, name, k: f(x), nondiff_argnums=(3, 0), nondiff_argnames="name")
    rule.defvjp(lambda f, x, name, k: (f(x), x), bwd)
    return jax.grad(lambda x: rule(double, x, "a", 3).sum())(X), rule.nondiff_argnums


@case
def concrete_arrays_without_a_gradient(custom_vjp, calls):
    rule = custom_vjp(lambda x, k: x * k, nondiff_argnums=(1,))
    rule.defvjp(lambda x, k: (x * k, None), lambda k, _, g: (3 * g * k,))
    return [jax.grad(lambda x, k=k: rule(x, k).sum())(X) for k in (Y, np.ones(3, np.float32), 2.0, 2)]


@case
def defaults_count_as_arguments(custom_vjp, calls):
    f = custom_vjp(lambda x, scale=2.0, flag=None: x * scale)

    def bwd(scale, g):
        calls.append("bwd")
        return 3 * g * scale, None, None

    f.defvjp(lambda x, scale, flag: (x * scale, scale), bwd)
    return f(X), jax.grad(lambda x: f(x).sum())(X), jax.grad(lambda x: f(x, flag=None, scale=0.5).sum())(X)


@case
def a_default_of_keyword_only_stays_inside(custom_vjp, calls):
    def f(x, *, scale=2.0):
        return x * scale

    rule = custom_vjp(f)
    rule.defvjp(lambda x, *, scale=4.0: (x * scale, None), lambda _, g: (3 * g,))
    return rule(X), jax.value_and_grad(lambda x: rule(x).sum())(X)


@case
def positional_arguments_by_keyword(custom_vjp, calls):
    rule = product(custom_vjp, calls)
    return jax.grad(lambda x, y: rule(y=y, x=x).sum(), (0, 1))(X, Y), jax.jit(rule)(y=Y, x=X)


@case
def any_number_of_arguments(custom_vjp, calls):
    f = custom_vjp(lambda x, *rest: x + sum(rest))
    f.defvjp(lambda x, *rest: (x + sum(rest), len(rest)), lambda n, g: (g,) + (2 * g,) * int(n))
    return jax.grad(lambda x, y: f(x, y, y).sum(), (0, 1))(X, Y), jax.grad(lambda x: f(x).sum())(X)


@case
def no_arguments(custom_vjp, calls):
    f = custom_vjp(lambda: jnp.ones(2))
    f.defvjp(lambda: (jnp.ones(2), None), lambda _, g: ())
    return f(), jax.jit(f)(), jax.grad(lambda x: (x * f()[0]).sum())(X)


@case
def trees_in_and_out(custom_vjp, calls):
    def fun(tree, more):
        point, empty = more
        return {"sum": tree["a"] + point.x, "list": [tree["b"][0] * point.y, None, ()], "empty": empty}

    def bwd(kept, g):
        calls.append(describe(g))
        tree, (point, _) = kept
        half = g["list"][0] / 2
        return {"a": 2 * g["sum"], "b": [half * point.y]}, (Point(g["sum"], half * tree["b"][0]), {})

    f = custom_vjp(fun)
    f.defvjp(lambda tree, more: (fun(tree, more), (tree, more)), bwd)
    args = {"a": X, "b": [Y]}, (Point(Y, X), {})
    loss = lambda *args: sum(leaf.sum() for leaf in jax.tree.leaves(f(*args)))
    return f(*args), jax.grad(loss, (0, 1))(*args), jax.jit(jax.grad(loss, (0, 1)))(*args), jax.vmap(f)(*args)


@case
def one_point_in_one_point_out(custom_vjp, calls):
    f = custom_vjp(lambda p: Point(p.y, p.x))
    f.defvjp(lambda p: (Point(p.y, p.x), p), lambda p, g: (Point(p.y * g.y, p.x * g.x),))
    return f(Point(X, Y)), jax.vjp(f, Point(X, Y))[1](Point(Y, X))


@case
def an_output_without_arrays(custom_vjp, calls):
    f = custom_vjp(lambda x: (None, {}))
    f.defvjp(lambda x: ((None, {}), None), lambda _, g: (None,))
    return f(X), jax.grad(lambda x: (f(x), x.sum())[1])(X)


@case
def an_argument_that_is_none(custom_vjp, calls):
    f = custom_vjp(lambda x, y: x if y is None else x * y)
    f.defvjp(lambda x, y: (f(x, y), y), lambda y, g: (3 * g, None if y is None else g))
    return jax.grad(lambda x: f(x, None).sum())(X), both(f)(X, Y)


@case
def python_numbers(custom_vjp, calls):
    def bwd(kept, g):
        calls.append(describe(g))
        return 3 * g * kept[1], fitted(5 * g * kept[0], kept[1])

    f = custom_vjp(lambda x, y: x * y)
    f.defvjp(lambda x, y: (x * y, (x, y)), bwd)
    half = jnp.ones(2, jnp.bfloat16)
    grads = jax.grad(f, (0, 1))(2.0, 4.0), jax.grad(lambda x: f(x, 4))(2.0), jax.jit(jax.grad(f))(2.0, 3.0)
    return jax.jit(f)(2.0, 3), jax.vmap(f, (0, None))(X, 2), grads, jax.grad(lambda x: f(x, 2.0).sum())(half)


@case
def python_numbers_without_a_transform(custom_vjp, calls):
    f = product(custom_vjp, calls)
    return f(2.0, 3.0), f(2, 3), f(True, 3), f(X, 3.0), f(jnp.ones(2, jnp.bfloat16), 3.0)


@case
def the_type_that_the_function_sees(custom_vjp, calls):
    f = custom_vjp(lambda *args: (calls.append(list(map(kind, args))), args[0] * 2)[1])
    f.defvjp(lambda *args: (calls.append(list(map(kind, args))), (args[0] * 2, None))[1], lambda _, g: (g, *[None] * 3))
    args = X, np.ones(3, np.float32), np.float32(2), jnp.array(1)
    return f(*args), jax.grad(lambda *args: f(*args).sum())(*args)


@case
def python_numbers_as_outputs(custom_vjp, calls):
    f = custom_vjp(lambda x: (2.0, 3, True, x))
    f.defvjp(lambda x: ((2.0, 3, True, x), None), lambda _, g: (g[0] + 2 * g[3],))
    loss = lambda x: f(x)[3].sum() + f(x)[0]
    return f(X), jax.jit(f)(X), jax.grad(loss)(X), jax.grad(jax.jit(loss))(X)


@case
def numpy_arrays(custom_vjp, calls):
    x, y = np.asarray(X), np.asarray(Y)
    return (
        both(product(custom_vjp, calls))(x, y),
        product(custom_vjp, calls)(x, y),
        both(product(custom_vjp, []))(x, 2.0),
    )


def switched(custom_vjp, calls, *, as_float0: bool):
    def fun(x, n, flag, key):
        return jnp.where(flag, x * n, x) + jax.random.key_data(key)[1]

    def bwd(kept, g):
        n, flag, key = kept
        calls.append(describe((n, flag, key)))
        zeros = [np.zeros(np.shape(leaf), jax.dtypes.float0) for leaf in kept]
        return (3 * g, *zeros) if as_float0 else (3 * g, None, None, None)

    f = custom_vjp(fun)
    f.defvjp(lambda x, n, flag, key: (fun(x, n, flag, key), (n, flag, key)), bwd)
    args = X, jnp.array([2, 3, 4]), jnp.array([True, False, True]), jax.random.key(3)
    grad = jax.grad(lambda *args: f(*args).sum())
    every = jax.grad(lambda *args: f(*args).sum(), (0, 1, 2, 3), allow_int=True)
    return f(*args), grad(*args), jax.jit(grad)(*args), every(*args)


@case
def integers_booleans_and_keys_with_none(custom_vjp, calls):
    return switched(custom_vjp, calls, as_float0=False)


@case
def integers_booleans_and_keys_with_float0(custom_vjp, calls):
    return switched(custom_vjp, calls, as_float0=True)


@case
def integer_outputs(custom_vjp, calls):
    f = custom_vjp(lambda x: (x, jnp.argmax(x), x > 0))

    def bwd(_, g):
        calls.append(describe(g))
        return (2 * g[0],)

    f.defvjp(lambda x: ((x, jnp.argmax(x), x > 0), None), bwd)
    return f(X), jax.grad(lambda x: f(x)[0].sum())(X), jax.jit(jax.grad(lambda x: f(x)[0].sum()))(X)


@case
def complex_numbers(custom_vjp, calls):
    z = jnp.array([1 + 2j, -0.5j, 3])
    f = custom_vjp(lambda z, x: z * z * x)
    f.defvjp(lambda z, x: (z * z * x, (z, x)), lambda kept, g: (3 * g * kept[0] * kept[1], (g * kept[0] ** 2).real))
    loss = lambda z, x: f(z, x).real.sum()
    return f(z, X), jax.grad(loss, (0, 1))(z, X), jax.grad(loss, (0, 1))(z, 2.0 * X), f(1j, 2.0), jax.jit(f)(1j, 2.0)


@case
def bfloat16(custom_vjp, calls):
    x, y = X.astype(jnp.bfloat16), Y.astype(jnp.bfloat16)
    return both(product(custom_vjp, calls))(x, y), jax.jit(both(product(custom_vjp, calls)))(x, y)


@case
def mixed_dtypes(custom_vjp, calls):
    f = custom_vjp(lambda x, y: x * y)
    f.defvjp(lambda x, y: (x * y, (x, y)), lambda kept, g: (3 * g * kept[1], (g * kept[0]).astype(jnp.float16)))
    return both(f)(X, Y.astype(jnp.float16))


@case
def none_for_all(custom_vjp, calls):
    f = custom_vjp(lambda x, y: x * y["a"])
    f.defvjp(lambda x, y: (x * y["a"], None), lambda _, g: (None, None))
    return jax.grad(lambda x, y: f(x, y).sum(), (0, 1))(X, {"a": Y})


@case
def none_for_a_part(custom_vjp, calls):
    f = custom_vjp(lambda t: t["a"] * t["b"][0] + t["b"][1])
    out = []
    for bar in ({"a": None, "b": [X, Y]}, {"a": X, "b": None}, {"a": X, "b": [None, Y]}, None):
        f.defvjp(lambda t: (t["a"], None), lambda _, g, bar=bar: (bar,))
        out.append(jax.grad(lambda t: f(t).sum())({"a": X, "b": [Y, Y]}))
    return out


@case
def a_list_for_the_tuple_of_cotangents(custom_vjp, calls):
    f = custom_vjp(lambda x, y: x * y)
    f.defvjp(lambda x, y: [x * y, [x, y]], lambda kept, g: [3 * g, 2 * g])
    return both(f)(X, Y)


@case
def residuals_of_many_kinds(custom_vjp, calls):
    def fwd(x, key):
        kept = {"x": x, "none": None, "n": 3, "flag": True, "half": 0.5, "np": np.ones(3, np.float32), "empty": ()}
        kept |= {"int": jnp.arange(3), "key": key, "point": Point(x, 2 * x), "bool": x > 0, "new": jnp.arange(3.0)}
        kept["pull"] = jax.vjp(lambda x: x * x, x)[1]
        kept["partial"] = jax.tree_util.Partial(jnp.multiply, x)
        return x * x, kept

    def bwd(kept, g):
        point = kept["point"]
        bar = kept["pull"](g)[0] + kept["partial"](g) + point.y * kept["n"] * kept["half"] * kept["np"]
        bar += jnp.where(kept["bool"], kept["new"], kept["int"]) + kept["flag"] + jax.random.key_data(kept["key"])[1]
        return bar, None

    f = custom_vjp(lambda x, key: x * x)
    f.defvjp(fwd, bwd)
    grad = jax.grad(lambda x: f(x, jax.random.key(2)).sum())
    return grad(X), jax.jit(grad)(X), jax.vmap(grad)(jnp.stack([X, Y]))


@case
def residuals_in_a_scan(custom_vjp, calls):
    f = custom_vjp(lambda x, y: x * y)
    bwd = lambda kept, g: (g * kept["y"] * kept["n"], g.sum())
    f.defvjp(lambda x, y: (x * y, {"y": y, "n": 2, "none": None}), bwd)
    return jax.grad(lambda x, y: lax.scan(lambda c, y: (f(c, y), c), x, y)[0].sum(), (0, 1))(X, Y)


@case
def a_nested_tuple_of_one(custom_vjp, calls):
    f = custom_vjp(lambda t: (t[0],))
    f.defvjp(lambda t: ((t[0],), t), lambda t, g: ((3 * g[0],),))
    return f((X,)), jax.vjp(f, (X,))[1]((Y,))


@case
def a_pytree_class_as_an_argument(custom_vjp, calls):
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Layer:
        w: Any
        name: str = dataclasses.field(metadata={"static": True}, default="a")

        @custom_vjp
        def __call__(self, x):
            return self.w * x

        bars = lambda kept, g: (Layer(3 * kept[1] * g), kept[0].w * g)
        __call__.defvjp(lambda self, x: (self.w * x, (self, x)), bars)  # pyright: ignore[reportFunctionMemberAccess]

    bars = jax.grad(lambda layer, x: Layer.__call__(layer, x).sum(), (0, 1))(Layer(X), Y)
    return bars[0].w, bars[1]


@case
def double_precision_numpy_beside_what_is_differentiated(custom_vjp, calls):
    rule = product(custom_vjp, calls)
    return (
        jax.grad(lambda x: rule(x, np.ones(3)).sum())(X),
        both(rule)(np.ones(3), X),
        jax.jit(both(rule))(X, np.ones(3)),
    )


@case
def double_precision(custom_vjp, calls):
    with jax.enable_x64(True):
        rule = product(custom_vjp, calls)
        return both(rule)(np.ones(3), np.ones(3)), both(rule)(2.0, 3.0), both(rule)(np.ones(3), 2.0)


@case
def concrete_arrays_without_a_gradient_stay_concrete_under_jit(custom_vjp, calls):
    rule = custom_vjp(lambda x, shape: x.reshape(shape), nondiff_argnums=(1,))
    rule.defvjp(lambda x, shape: (x.reshape(shape), None), lambda shape, _, g: (3 * g.reshape(math.prod(shape)),))
    grad = jax.grad(lambda x: rule(x, np.array([3, 1])).sum())
    return grad(X), jax.jit(grad)(X), jax.jit(lambda x: rule(x, np.array([3, 1])))(X)


@case
def static_numbers_without_a_gradient(custom_vjp, calls):
    rule = custom_vjp(lambda x, n, mode="a": x[:n], nondiff_argnames=("n", "mode"))
    bwd = lambda n, mode, _, g: (jnp.zeros(3).at[:n].set(3 * g if mode == "a" else g),)
    rule.defvjp(lambda x, n, mode: (x[:n], None), bwd)
    grad = jax.grad(lambda x, n: rule(x, n=n).sum())
    return [grad(X, 2), jax.jit(grad, static_argnums=1)(X, 2), jax.jit(rule, static_argnames="n")(X, n=2)]


@case
def closure_convert(custom_vjp, calls):
    rule = custom_vjp(lambda fn, y, *consts: fn(y, *consts), nondiff_argnums=(0,))
    fwd = lambda fn, y, *consts: (fn(y, *consts), (y, consts))
    rule.defvjp(fwd, lambda fn, kept, g: jax.vjp(fn, kept[0], *kept[1])[1](2 * g))

    def loss(x):
        converted, consts = jax.closure_convert(lambda y: y * x, X)
        return rule(converted, X, *consts).sum()

    return jax.grad(loss)(X), jax.jit(jax.grad(loss))(X)


@case
def mutable_arrays(custom_vjp, calls):
    f = custom_vjp(lambda ref, x: x * ref[...])
    f.defvjp(lambda ref, x: (x * ref[...], ref[...]), lambda kept, g: (None, g * kept))
    grad = jax.grad(lambda x: f(jax.new_ref(Y), x).sum())
    return grad(X), jax.jit(grad)(X)


@case
def odd_signatures(custom_vjp, calls):
    def positional_only(x, /, y):
        return x * y

    def any_keyword(x, **options):
        return x

    f, g = custom_vjp(positional_only), custom_vjp(any_keyword)
    f.defvjp(lambda x, y: (x * y, (x, y)), lambda kept, g: (g * kept[1], 2 * g * kept[0]))
    g.defvjp(lambda x: (x, None), lambda _, g: (2 * g,))
    return both(f)(X, Y), f(X, y=Y), jax.grad(lambda x: g(x).sum())(X)


@case
def an_array_twice_an_empty_one_and_float0(custom_vjp, calls):
    rule = product(custom_vjp, calls)
    f = custom_vjp(lambda x, zero: x)
    f.defvjp(lambda x, zero: (x, None), lambda _, g: (2 * g, None))
    nothing = np.zeros(3, jax.dtypes.float0)
    return (
        jax.grad(lambda x: rule(x, x).sum())(X),
        both(rule)(jnp.zeros(0), jnp.zeros(0)),
        jax.grad(lambda x: f(x, nothing).sum())(X),
    )


@case
def outputs_that_are_arguments(custom_vjp, calls):
    f = custom_vjp(lambda x, y: (y, x, x))
    f.defvjp(lambda x, y: ((y, x, x), None), lambda _, g: (g[1] + 2 * g[2], 3 * g[0]))
    return jax.vjp(f, X, Y)[1]((X, Y, X)), jax.jit(f)(X, Y)
