"""The transforms under which a wrapped call has to be the unwrapped one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from .._arrays import is_inexact

Loss: TypeAlias = Callable[..., Any]
"""`(variables, inputs, rest) -> (scalar, everything else)`"""


@dataclasses.dataclass(frozen=True)
class Transform:
    """One way to run a loss; `differentiates` says that results are `(value and aux, gradients)`."""

    name: str
    apply: Callable[[Loss], Callable[..., Any]]
    differentiates: bool = False
    over_lanes: bool = False

    def __repr__(self) -> str:
        return self.name


def inexact_and_others(tree: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """Gives the leaves that have a gradient, and a function that puts others in their places."""
    leaves, treedef = jax.tree.flatten(tree)
    able = [is_inexact(leaf) for leaf in leaves]

    def fill(chosen: list[Any]) -> Any:
        rest = iter(chosen)
        return treedef.unflatten([next(rest) if ok else leaf for ok, leaf in zip(able, leaves, strict=True)])

    return [leaf for ok, leaf in zip(able, leaves, strict=True) if ok], fill


def _eager(loss: Loss) -> Loss:
    return lambda *args: loss(*args)


def _grad(loss: Loss) -> Callable[..., Any]:
    """Differentiates with respect to all floating arrays of the variables and the inputs."""

    def value_and_grad(variables: Any, inputs: Any, rest: Any) -> Any:
        chosen, fill = inexact_and_others((variables, inputs))
        return jax.value_and_grad(lambda chosen: loss(*fill(chosen), rest), has_aux=True)(chosen)

    return value_and_grad


def _grad_of(transform: Callable[..., Any]) -> Callable[[Loss], Callable[..., Any]]:
    return lambda loss: _grad(transform(loss))


def _lanes(inputs: Any) -> Any:
    """Stacks three different inputs; integers and keys are the same in each."""
    double = lambda x, factor: x * jnp.asarray(factor, x.dtype) if is_inexact(x) else x
    return jax.tree.map(lambda x: jnp.stack([x, double(x, 2), double(x, -1)]), inputs)


def _vmap(loss: Loss) -> Callable[..., Any]:
    return lambda variables, inputs, rest: jax.vmap(loss, (None, 0, None))(variables, _lanes(inputs), rest)


def _total(loss: Loss) -> Loss:
    def total(*args: Any) -> Any:
        values, aux = _vmap(loss)(*args)
        return values.sum(), aux

    return total


def _scan(loss: Loss) -> Loss:
    def run(variables: Any, inputs: Any, rest: Any) -> Any:
        def step(carry: Any, some: Any) -> Any:
            value, aux = loss(variables, some, rest)
            return carry + value, aux

        return jax.lax.scan(step, jnp.zeros(()), _lanes(inputs))

    return run


TRANSFORMS = (
    Transform("eager", _eager),
    Transform("jit", jax.jit),
    Transform("grad", _grad, differentiates=True),
    Transform("jit(grad)", lambda loss: jax.jit(_grad(loss)), differentiates=True),
    Transform("grad(jit)", _grad_of(jax.jit), differentiates=True),
    Transform("vmap", _vmap, over_lanes=True),
    Transform("grad of vmap", _grad_of(_total), differentiates=True, over_lanes=True),
    Transform("vmap of grad", lambda loss: _vmap(_grad(loss)), differentiates=True, over_lanes=True),
    Transform("scan", _scan),
    Transform("grad of scan", _grad_of(_scan), differentiates=True),
    Transform("jit(grad(scan))", lambda loss: jax.jit(_grad(_scan(loss))), differentiates=True),
    Transform("remat", _grad_of(jax.checkpoint), differentiates=True),
    Transform("grad(jit(remat))", _grad_of(lambda loss: jax.jit(jax.checkpoint(loss))), differentiates=True),
)
