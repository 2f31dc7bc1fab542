"""Mistakes with `crossvjp.custom_vjp(f)`: what JAX refuses is refused, with as much information, and more is."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from plain_cases import TREE, X, by_jax, grad, grad_with, made, mode, timesw

import crossvjp

assert mode  # a fixture


def grad_of_jit_with(**functions: Any) -> Any:
    return lambda custom_vjp: grad(jax.jit(made(custom_vjp, **functions)))


def closing_over(custom_vjp: Any) -> Any:
    return jax.grad(lambda k: made(custom_vjp, fun=lambda x, y: k * x)(X, TREE).sum())(2.0)


class Mistake(NamedTuple):
    """A use that JAX refuses."""

    use: Callable[[Any], Any]
    match: str
    """What ours says, beside all that JAX says."""
    caught_as: type[Exception] | None = None
    """A type of ours, where JAX's is another one than `TypeError`, `ValueError` or `AttributeError`."""


A_SHAPE = r"float32\[3\] at its root, but is "
A_PAIR = "forward function the_fwd of timesw must return a pair"
A_TUPLE = r"'the_bwd' must return the tuple \(input0_bar, input1_bar\), but returned "
MISTAKES = {
    "no_defvjp": Mistake(lambda custom_vjp: custom_vjp(timesw)(X, TREE), r"Set it by timesw\.defvjp\(fwd, bwd\)"),
    "fwd_returns_an_array": Mistake(grad_with(fwd=lambda x, y: x), A_PAIR),
    "fwd_returns_none": Mistake(grad_with(fwd=lambda x, y: None), f"{A_PAIR}.*returned None"),
    "fwd_returns_three": Mistake(grad_with(fwd=lambda x, y: (x, y, x)), f"{A_PAIR}.*tuple of 3"),
    "fwd_with_another_structure": Mistake(grad_of_jit_with(fwd=lambda x, y: ({"a": x}, None)), "must return a pair"),
    "fwd_with_another_shape": Mistake(grad_of_jit_with(fwd=lambda x, y: (jnp.ones((2, 3)), None)), "return a pair"),
    "fwd_with_another_dtype": Mistake(grad_of_jit_with(fwd=lambda x, y: (x.astype(int), None)), "must return a pair"),
    "fwd_turned_round": Mistake(grad_of_jit_with(fwd=lambda x, y: ((x, y), x)), "must return a pair"),
    "bwd_returns_an_array": Mistake(grad_with(bwd=lambda kept, g: g), f"{A_TUPLE}Array"),
    "bwd_returns_none": Mistake(grad_with(bwd=lambda kept, g: None), f"{A_TUPLE}NoneType"),
    "bwd_returns_a_dict": Mistake(grad_with(bwd=lambda kept, g: {"x": g, "y": g}), f"{A_TUPLE}dict"),
    "bwd_returns_too_few": Mistake(grad_with(bwd=lambda kept, g: (g,)), "'the_bwd' must return .*2.* but returned 1"),
    "bwd_returns_too_many": Mistake(grad_with(bwd=lambda kept, g: (g, {"w": g}, g)), "2 .* but returned 3"),
    "bwd_with_another_key": Mistake(grad_with(bwd=lambda kept, g: (g, {"v": g})), r"input 1 has a leaf at \['v'\]"),
    "bwd_with_one_key_more": Mistake(grad_with(bwd=lambda kept, g: (g, {"w": g, "v": g})), r"leaf at \['v'\] where"),
    "bwd_with_a_list_for_a_dict": Mistake(grad_with(bwd=lambda kept, g: (g, [g])), "input 1 has a leaf at"),
    "bwd_too_deep": Mistake(grad_with(bwd=lambda kept, g: ({"a": g}, {"w": g})), r"input 0 has a leaf at \['a'\]"),
    "bwd_with_another_shape": Mistake(
        grad_with(bwd=lambda kept, g: (g, {"w": g[:2]})), r"'the_bwd'.*input 1 .*float32\[3\] at \['w'\].*float32\[2\]"
    ),
    "bwd_with_two_axes": Mistake(grad_with(bwd=lambda kept, g: (jnp.ones((2, 3)), None)), f"input 0 must be {A_SHAPE}"),
    "bwd_with_a_number": Mistake(grad_with(bwd=lambda kept, g: (2.0, None)), A_SHAPE),
    "bwd_with_a_string": Mistake(grad_with(bwd=lambda kept, g: ("a", None)), f"{A_SHAPE}of type str"),
    "bwd_with_a_zero_of_another_shape": Mistake(
        grad_with(
            bwd=lambda kept, g: (jax.custom_derivatives.SymbolicZero(jax.typeof(X[:2])), None)
        ),
        r"input 0 must be float32\[3\]",
    ),
    "a_primal_record_as_output": Mistake(grad_with(fwd=lambda x, y: (x, None), symbolic_zeros=True), "CustomVJPPrimal"),
    "a_primal_record_as_residual": Mistake(
        grad_with(fwd=lambda x, y: (x.value, x), bwd=lambda x, g: (g, None), symbolic_zeros=True), "CustomVJPPrimal"
    ),
    "both_options": Mistake(
        lambda custom_vjp: made(custom_vjp, symbolic_zeros=True, optimize_remat=True),
        "`optimize_remat` can't be combined with `symbolic_zeros`",
        crossvjp.ArgumentError,
    ),
    "a_missing_argument": Mistake(lambda custom_vjp: made(custom_vjp)(X), r"fit timesw\(x, y\).*missing.*'y'"),
    "an_unknown_argument": Mistake(lambda custom_vjp: made(custom_vjp)(X, TREE, z=3), "unexpected keyword .* 'z'"),
    "an_argument_twice": Mistake(lambda custom_vjp: made(custom_vjp)(X, TREE, x=3), "multiple values .* 'x'"),
    "too_many_arguments": Mistake(lambda custom_vjp: made(custom_vjp)(X, TREE, 3), "too many positional arguments"),
    "nondiff_out_of_range": Mistake(
        lambda custom_vjp: made(custom_vjp, nondiff_argnums=(5,))(X, TREE),
        "has 5, but this call of timesw has 2 positional arguments",
        crossvjp.ArgumentError,
    ),
    "nondiff_that_is_no_number": Mistake(
        lambda custom_vjp: made(custom_vjp, nondiff_argnums=("x",))(X, TREE), "`nondiff_argnums` has 'x'"
    ),
    "jvp": Mistake(
        lambda custom_vjp: jax.jvp(made(custom_vjp), (X, TREE), (X, TREE)), "can't apply forward-mode autodiff"
    ),
    "jacfwd": Mistake(lambda custom_vjp: jax.jacfwd(made(custom_vjp))(X, TREE), "can't apply forward-mode autodiff"),
    "defvjp_without_functions": Mistake(lambda custom_vjp: custom_vjp(timesw).defvjp(), "defvjp.*'fwd' and 'bwd'"),
    "a_value_closed_over_and_differentiated": Mistake(
        closing_over, r"`k`, a float32\[\], is differentiated", crossvjp.ArgumentError
    ),
    "an_error_in_fun": Mistake(lambda custom_vjp: made(custom_vjp, lambda x, y: x["none"])(X, TREE), "string indexing"),
    "an_error_in_bwd": Mistake(grad_with(bwd=lambda kept, g: kept.none), "no attribute 'none'"),
}  # fmt: skip


def facts(message: str) -> set[str]:
    """Finds the functions, positions, paths and types that an error names."""
    message = re.sub(r"(?<=\d), (?=\d)", ",", message)
    positions = {f"argument {number}" for number in re.findall(r"(?:output\[|input )(\d)", message)}
    return positions | set(re.findall(r"timesw|the_fwd|(?:b?float|int)\d+\[[\d,]*\]|\['\w'\]", message))


@pytest.mark.parametrize("name", MISTAKES)
def test_what_jax_refuses_is_refused_with_as_much_information(mode, name):
    use, match, caught_as = MISTAKES[name]
    with pytest.raises(Exception, match=r"\w") as by_theirs:
        by_jax(use)
    assert caught_as or isinstance(by_theirs.value, TypeError | ValueError | AttributeError)
    caught = caught_as or next(kind for kind in type(by_theirs.value).__mro__ if kind.__module__ == "builtins")
    with pytest.raises(caught, match=match) as by_ours:
        use(crossvjp.custom_vjp)
    assert facts(str(by_theirs.value)) <= facts(str(by_ours.value))


def test_errors_count_the_arguments_of_a_call_alike():
    rule = crossvjp.custom_vjp(lambda k, x: k * x, nondiff_argnums=(0,))
    said = []
    for bar in ((X[:2],), (X, X)):
        rule.defvjp(lambda k, x: (k * x, None), lambda k, _, g, bar=bar: bar)
        with pytest.raises(crossvjp.CotangentError, match=r"input ?\d") as error:
            jax.grad(lambda x: rule(2.0, x).sum())(X)
        said.append(re.findall(r"input ?(\d)", str(error.value)))
    assert said[0] == said[1]


def linen() -> Any:
    return nn.Dense(2).bind({"params": {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}})


def of_haiku(use: Callable[[Any], Any]) -> None:
    hk.transform(lambda: use(hk.Linear(2))).init(jax.random.key(0))


MODULES: dict[str, Callable[[Callable[[Any], Any]], Any]] = {
    "linen": lambda use: use(linen()),
    "nnx": lambda use: use(nnx.Linear(3, 2, rngs=nnx.Rngs(0))),
    "haiku": of_haiku,
}


@pytest.mark.parametrize("framework", MODULES)
@pytest.mark.parametrize("place", [lambda mdl: (mdl, X), lambda mdl: (X, {"in": [mdl]})], ids=["first", "inside"])
def test_a_module_as_an_argument_is_an_error_with_what_to_do(mode, framework, place):
    rule = made(crossvjp.custom_vjp, lambda one, other: X)
    hint = r"<lambda> got a \w+ as an argument.*custom_vjp\(fn, forward_fn, backward_fn\)\(mdl, \*args\)"
    with pytest.raises(crossvjp.HandleError, match=hint):
        MODULES[framework](lambda mdl: rule(*place(mdl)))


class Stricter(NamedTuple):
    """A use that JAX takes, and what ours says of it."""

    use: Callable[[Any], Any]
    match: str


STRICTER = {
    "a_prefix_of_the_tree": Stricter(grad_with(bwd=lambda kept, g: (g, g)), "input 1 has a leaf at its root"),
    "a_complex_cotangent": Stricter(grad_with(bwd=lambda kept, g: (g + 0j, None)), "take its real part"),
    "an_unknown_name": Stricter(
        lambda custom_vjp: made(custom_vjp, nondiff_argnames="q")(X, TREE), r"'q', but timesw has .*\['x', 'y'\]"
    ),
    "the_name_of_a_keyword_only": Stricter(
        lambda custom_vjp: made(custom_vjp, lambda x, *, k=1: x, nondiff_argnames="k")(X), "'k', but <lambda> has"
    ),
    "a_negative_position": Stricter(
        lambda custom_vjp: made(custom_vjp, nondiff_argnums=(-1,))(X, TREE), "has -1, but this call of timesw has 2"
    ),
    "no_function": Stricter(lambda custom_vjp: (custom_vjp(3), X)[1], "`fn` must be a function, but is 3"),
    "no_forward_function": Stricter(
        lambda custom_vjp: custom_vjp(timesw).defvjp(None, timesw), "`fwd` must be a function, but is None"
    ),
    "no_backward_function": Stricter(
        lambda custom_vjp: custom_vjp(timesw).defvjp(timesw, None), "`bwd` must be a function, but is None"
    ),
}


@pytest.mark.parametrize("name", STRICTER)
def test_ours_refuses_what_jax_takes(mode, name):
    by_jax(STRICTER[name].use)
    with pytest.raises((crossvjp.ArgumentError, crossvjp.CotangentError), match=STRICTER[name].match):
        STRICTER[name].use(crossvjp.custom_vjp)
