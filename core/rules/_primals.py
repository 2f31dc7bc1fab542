"""What rules ask of the call that they are put on: one input alone, or variables with kernels among them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import PyTree

from .._errors import ArgumentError


def only_input(call: Any, author: Any, *, with_variables: bool = False) -> Any:
    """Gives the one input of a call whose derivative a rule makes up.

    Args:
        call: what the rule sees.
        author: the rule, for errors.
        with_variables: whether the module may have variables, which then get no cotangent.

    Raises:
        ArgumentError: the call has no input or several, or variables for which the rule has no derivative.
    """
    if len(call.inputs) != 1 or jax.tree.structure(call.inputs[0]) != jax.tree.structure(0):
        raise ArgumentError(
            f"{author.described()} gives the derivative of a function of one array, but the call has "
            f"{len(jax.tree.leaves(call.inputs))} in {len(call.inputs)} inputs. Pass the others by closure."
        )
    if not with_variables and jax.tree.leaves(call.variables):
        raise ArgumentError(
            f"{author.described()} gives the derivative of a function of one array, but the module has variables, "
            "whose gradient would be lost. Put it on the function behind the module: rule(function)(mdl(x))."
        )
    return call.inputs[0]


def on_kernels(change: Callable[..., Any], author: Any, variables: PyTree, *others: PyTree) -> PyTree:
    """Maps a function over the arrays with two axes or more; vectors, such as biases, stay as in the first tree.

    Args:
        change: gets the leaves of one place in all trees.
        author: the rule, for the error.
        variables: any pytree of arrays.
        *others: trees of the same structure.

    Raises:
        ArgumentError: there is no kernel.
    """
    if all(leaf.ndim < 2 for leaf in jax.tree.leaves(variables)):
        raise ArgumentError(
            f"{author.described()} changes the kernels, arrays with two axes or more, but the variables have the "
            f"shapes {[leaf.shape for leaf in jax.tree.leaves(variables)]}."
        )

    def change_kernel(leaf: Any, *rest: Any) -> Any:
        return change(leaf, *rest) if leaf.ndim > 1 else leaf

    return jax.tree.map(change_kernel, variables, *others)
