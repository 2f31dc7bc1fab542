"""Uses of `jax.custom_vjp` that mean the same with ours: each takes the decorator, and a list to record calls in.

All numbers are small multiples of powers of two and all rules are off by factors of their own, so results
are exact however they are compiled, and a rule that was not used shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import IMPLEMENTATIONS, custom_vjp_of
from jax import lax
from jax.core import Tracer

Case = Callable[[Any, list[Any]], Any]

CASES: dict[str, Case] = {}

X, Y = jnp.array([1.0, -2.0, 0.5]), jnp.array([4.0, 0.25, -1.0])


def case(function: Case) -> Case:
    CASES[function.__name__] = function
    return function


def product(custom_vjp: Any, calls: list[Any], **options: Any) -> Any:
    """X * y, with three and five times its cotangents."""

    def times(x, y):
        calls.append("fun")
        return x * y

    def fwd(x, y):
        calls.append("fwd")
        return x * y, (x, y)

    def bwd(kept, g):
        calls.append("bwd")
        x, y = kept
        return fitted(3 * g * y, x), fitted(5 * g * x, y)

    rule = custom_vjp(times)
    rule.defvjp(fwd, bwd, **options)
    return rule


def fitted(bar: Any, primal: Any) -> Any:
    """Sums what was broadcast."""
    return bar if jnp.shape(primal) == jnp.shape(bar) else bar.sum()


def scanned(rule: Any) -> Any:
    return lambda x, y: lax.scan(lambda c, y: (rule(c, y), c), x, y)[0]


def both(rule: Any) -> Any:
    return jax.value_and_grad(lambda x, y: rule(x, y).sum(), (0, 1))


def kind(leaf: Any) -> Any:
    return "array" if isinstance(leaf, jax.Array) else type(leaf).__name__


def describe(tree: Any, *, exactly: bool = True) -> Any:
    """Gives what two results must share: structure, dtypes, shapes and bits.

    A Python number counts as the array that JAX makes of it.

    Args:
        tree: any pytree.
        exactly: also what tells NumPy's arrays from JAX's, and weak types.
    """
    leaves, treedef = jax.tree.flatten(tree)
    return str(treedef), [_described(leaf, exactly) for leaf in leaves]


def _described(leaf: Any, exactly: bool) -> Any:
    if isinstance(leaf, bool | int | float | complex) and not isinstance(leaf, np.generic):
        leaf = jnp.asarray(leaf)
    if not hasattr(leaf, "dtype"):
        return leaf
    if leaf.dtype == jax.dtypes.float0:  # of NumPy or of JAX: it has no values
        return "float0", leaf.shape
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return "key", leaf.shape if isinstance(leaf, Tracer) else jax.random.key_data(leaf).tolist()
    bits = None if isinstance(leaf, Tracer) else np.asarray(leaf).tobytes()
    return str(leaf.dtype), leaf.shape, bits, (kind(leaf), getattr(leaf, "weak_type", None)) if exactly else None


@pytest.fixture(params=IMPLEMENTATIONS)
def mode(request: pytest.FixtureRequest) -> Iterator[str]:
    with custom_vjp_of(request.param):
        yield request.param


def by_jax(use: Callable[..., Any], *args: Any) -> Any:
    """Gives what today's `jax.custom_vjp` makes of a use."""
    with custom_vjp_of("today"):
        return use(jax.custom_vjp, *args)


def timesw(x, y):
    return x * y["w"]


TREE = {"w": Y}


def made(custom_vjp: Any, fun: Any = timesw, fwd: Any = None, bwd: Any = None, **options: Any) -> Any:
    """Makes a rule for `timesw`, whole or with one function replaced; JAX names functions in errors."""
    fwd = fwd or (lambda x, y: (x * y["w"], (x, y)))
    bwd = bwd or (lambda kept, g: (g * kept[1]["w"], {"w": g * kept[0]}))
    fwd.__name__, bwd.__name__ = "the_fwd", "the_bwd"
    rule = custom_vjp(fun, **{name: options.pop(name) for name in [*options] if name.startswith("nondiff")})
    rule.defvjp(fwd, bwd, **options)
    return rule


def grad(rule: Any) -> Any:
    return jax.grad(lambda x, y: sum(leaf.sum() for leaf in jax.tree.leaves(rule(x, y))), (0, 1))(X, TREE)


def grad_with(**functions: Any) -> Any:
    return lambda custom_vjp: grad(made(custom_vjp, **functions))
