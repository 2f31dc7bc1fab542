"""Plain helpers of the tests."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def numbers(tree: Any) -> list[np.ndarray]:
    """Lists the arrays of a tree as NumPy arrays, keys by their data."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype") and leaf.dtype != jax.dtypes.float0]
    is_key = lambda leaf: jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return [np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf) for leaf in leaves]


def assert_same_bits(one: Any, other: Any) -> None:
    """Compares all arrays of two trees bit for bit."""
    left, right = numbers(one), numbers(other)
    assert len(left) == len(right) > 0
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(a, b, strict=True)


def assert_close(one: Any, other: Any, rtol: float = 1e-6) -> None:
    """Compares all arrays of two trees to `rtol` of the largest entry of the second tree.

    One scale for the whole tree: the gradient of a bias in front of a batch norm is zero but for
    the rounding of its terms, which are as large as the other gradients.
    """
    left, right = numbers(one), numbers(other)
    assert len(left) == len(right) > 0
    scale = max(np.abs(b).max(initial=0) for b in right if jnp.issubdtype(b.dtype, jnp.inexact))
    for a, b in zip(left, right, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        if jnp.issubdtype(b.dtype, jnp.inexact):
            np.testing.assert_allclose(a, b, rtol=0, atol=rtol * scale)
        else:
            np.testing.assert_array_equal(a, b)


def one_by_one(function: Any) -> Any:
    """Runs the operations of a function one by one, those inside jit, remat and scan too.

    Compiled as a whole, two programs with the same operations may round differently, since the
    compiler fuses around what leaves the program, residuals among it. Run one by one, the same
    operations give the same bits.
    """

    def run(*args: Any) -> Any:
        closed, shape = jax.make_jaxpr(function, return_shape=True)(*args)
        leaves = _evaluate(closed.jaxpr, closed.consts, jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shape), leaves)

    return run


def _evaluate(jaxpr: Any, consts: Any, args: Any) -> list[Any]:
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    read = lambda atom: atom.val if hasattr(atom, "val") else values[atom]
    for eqn in jaxpr.eqns:
        values.update(zip(eqn.outvars, _apply(eqn, [read(atom) for atom in eqn.invars]), strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _apply(eqn: Any, args: list[Any]) -> list[Any]:
    inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
    if eqn.primitive.name == "scan":
        return _scan(eqn.params, args)
    if inner is not None:
        return _evaluate(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), args)
    out = eqn.primitive.bind(*args, **eqn.params)
    return list(out) if eqn.primitive.multiple_results else [out]


def _scan(params: Any, args: list[Any]) -> list[Any]:
    split = [params["num_consts"], params["num_consts"] + params["num_carry"]]
    consts, carry, xs = args[: split[0]], args[split[0] : split[1]], args[split[1] :]
    stacked: list[list[Any]] = []
    steps = range(params["length"])
    for step in reversed(steps) if params["reverse"] else steps:
        body = params["jaxpr"]
        out = _evaluate(body.jaxpr, body.consts, [*consts, *carry, *(x[step] for x in xs)])
        carry = out[: params["num_carry"]]
        stacked.append(out[params["num_carry"] :])
    if params["reverse"]:
        stacked.reverse()
    return [*carry, *(jnp.stack(column) for column in zip(*stacked, strict=True))]
