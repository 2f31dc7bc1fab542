"""Running a function operation by operation, so that equal programs give equal bits."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def one_by_one(function: Callable[..., Any]) -> Callable[..., Any]:
    """Runs the operations of a function one by one, those inside jit, remat and scan too.

    Compiled as a whole, two programs with the same operations may round differently, since the
    compiler fuses around what leaves the program, residuals among it. Run one by one, the same
    operations give the same bits.

    Args:
        function: any function of pytrees of arrays, under any transforms.

    Returns:
        A function of the same arguments.
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
    if eqn.primitive.name == "call_hi_primitive":  # a custom_vjp in its coming implementation: a function, no jaxpr
        return one_by_one(functools.partial(eqn.primitive.to_lojax, **eqn.params))(*args)
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
