"""Rules that turn the gradient of whole weights: projections, orthogonalisation, and several pullbacks at once."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .._checks import at_least
from .._errors import ArgumentError
from .._rule import Rule, static
from ._trees import add, chosen, dot, scale, times, unit_axes, wide


class ProjectOrthogonal(Rule):
    r"""Takes the part of each unit's gradient that points along its weights out.

        variables_bar_i = g_i - (g_i . w_i) / ||w_i||^2 * w_i

    with g_i the module's own cotangent of the weights w_i of unit i: the gradient of weight
    normalisation, up to its scale. A step then changes directions, not lengths. Units are the entries
    along `unit_axis` of arrays with at least two axes; biases and other arrays with fewer stay as
    they are. Weights of zero have no direction, and keep their gradient.

    Args:
        unit_axis: the axis of the units: -1 for kernels of Linen, NNX and Haiku, which end in the
            output channels; 0 for those of Equinox, which start with them. `None`: each array is one unit.

    Reference:
        Salimans, Kingma (2016), arXiv:1602.07868; Heo et al. (2021), arXiv:2006.08217.
    """

    needs_variables = True
    unit_axis: int | None = static(default=-1)

    def backward(self, call, y_bar):
        """Projects the cotangents of arrays with at least two axes."""
        bar = call.pullback(y_bar)
        return bar.replace(variables=jax.tree.map(self._projected, bar.variables, call.variables))

    def _projected(self, grad: Any, weight: Any) -> Any:
        if grad.ndim < 2:
            return grad
        axes = None if self.unit_axis is None else unit_axes(grad.ndim, self.unit_axis)
        along, length = (
            jnp.sum((array * weight.conj()).real.astype(wide(grad.dtype)), axis=axes, keepdims=True)
            for array in (grad, weight)
        )
        return grad - times(weight, jnp.where(length > 0, along / jnp.where(length > 0, length, 1.0), 0.0))


class Muon(Rule):
    r"""Makes the gradient of each weight matrix nearly orthogonal, by Newton-Schulz steps.

        X = G / (||G|| + 1e-8);   `steps` times:   A = X X^T,   X <- a X + (b A + c A^2) X

    with G the module's own cotangent, ||.|| the Frobenius norm, a = 3.4445, b = -4.775, c = 2.0315.
    All singular values come close to 1: after five steps, those that were not tiny lie in about
    [0.7, 1.2]. An array with more than two axes counts as a matrix from all others to `unit_axis`;
    arrays with fewer stay as they are. Muon's momentum and its factor for the shape belong to the
    optimiser. Not linear in `y_bar`.

    Args:
        steps: >= 1.
        unit_axis: as in `ProjectOrthogonal`; without effect on arrays with two axes.

    Raises:
        ArgumentError: `steps` is below 1.

    Reference:
        Jordan et al. (2024), https://kellerjordan.github.io/posts/muon
    """

    linear = False
    needs_variables = True
    steps: int = static(default=5)
    unit_axis: int = static(default=-1)

    def __post_init__(self):
        """Checks the number of steps."""
        at_least(self, "steps", 1)

    def backward(self, call, y_bar):
        """Orthogonalises the cotangents of arrays with at least two axes."""
        bar = call.pullback(y_bar)
        return bar.replace(variables=jax.tree.map(self._orthogonalized, bar.variables))

    def _orthogonalized(self, leaf: Any) -> Any:
        if leaf.ndim < 2:
            return leaf
        last = jnp.moveaxis(leaf, self.unit_axis, -1)
        matrix = last.reshape(-1, last.shape[-1])  # (fan in, units)
        matrix = matrix if jnp.iscomplexobj(leaf) else matrix.astype(wide(leaf.dtype))
        is_tall = matrix.shape[0] > matrix.shape[1]
        x = _newton_schulz(matrix.T if is_tall else matrix, self.steps)  # so that A is the smaller of the two products
        return jnp.moveaxis((x.T if is_tall else x).reshape(last.shape), -1, self.unit_axis).astype(leaf.dtype)


def _newton_schulz(x: Any, steps: int) -> Any:
    a, b, c = 3.4445, -4.7750, 2.0315
    x = x / (jnp.linalg.norm(x) + 1e-8)
    for _ in range(steps):
        gram = x @ x.conj().T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


class PCGrad(Rule):
    r"""Takes conflicts between tasks out of the gradient of what they share.

        g_i <- g_i - min(0, g_i . g_j) / ||g_j||^2 * g_j   for all other tasks j in turn;   variables_bar = sum_i g_i

    with g_i the cotangent of the variables from task i alone: the call returns a tuple, list or
    dict with one entry for each task, and g_i is the pullback of its entry. The g_j in the formula
    are the first ones. The inputs get the module's own cotangent. Not linear in `y_bar`.

    Args:
        shuffle: whether the tasks j come in random order, as in the paper: then it needs a key,
            `rule(mdl, key=key)`. Otherwise they come as they stand in the output.

    Raises:
        ArgumentError: the call does not return one of these; in the backward pass.

    Reference:
        Yu et al. (2020), arXiv:2001.06782, algorithm 1.
    """

    linear = False
    needs_variables = True
    shuffle: bool = static(default=False)

    def backward(self, call, y_bar):
        """Projects in the space of the tasks, where each gradient is a combination of the first ones."""
        grads = [call.pullback(part).variables for part in _parts(y_bar, self)]
        count = len(grads)
        gram = jnp.stack([jnp.stack([dot(one, other) for other in grads]) for one in grads])
        orders = jnp.tile(jnp.arange(count), (count, 1))
        if self.shuffle:
            orders = jax.vmap(jax.random.permutation)(jax.random.split(call.key, count), orders)
        shares = jax.vmap(_without_conflicts, (0, 0, None))(jnp.arange(count), orders, gram)
        shares = jnp.sum(shares, axis=0)  # (tasks,): how much of each first gradient is in the sum
        scaled = [scale(grad, share) for grad, share in zip(grads, shares, strict=True)]
        return call.pullback(y_bar).replace(variables=functools.reduce(add, scaled))


def _without_conflicts(task: Any, order: Any, gram: Any) -> Any:
    """Gives what is left of one task's gradient, as shares of the first gradients, which have these products."""

    def visit(shares: Any, other: Any) -> tuple[Any, None]:
        product, square = shares @ gram[:, other], gram[other, other]
        conflict = (other != task) & (product < 0)  # a gradient of zero has no product below zero
        return shares.at[other].add(jnp.where(conflict, -product / jnp.where(conflict, square, 1.0), 0.0)), None

    return jax.lax.scan(visit, jax.nn.one_hot(task, len(gram), dtype=gram.dtype), order)[0]


def _parts(y_bar: Any, author: Rule) -> list[Any]:
    """Takes a cotangent apart: one for each task, which has `None` for the others."""
    if not isinstance(y_bar, tuple | list | Mapping):
        raise ArgumentError(
            f"{author.described()} needs a call that returns a tuple, list or dict with one entry for each task, "
            f"but this output's cotangent is of type {type(y_bar).__name__}."
        )
    entries, treedef = jax.tree.flatten(y_bar, is_leaf=lambda node: node is not y_bar)
    alone = [[entry if index == task else None for index, entry in enumerate(entries)] for task in range(len(entries))]
    return [jax.tree.unflatten(treedef, part) for part in alone]


class RouteCotangents(Rule):
    r"""Lets parts of the output train only parts of the variables.

        variables_bar = sum_k M_k pullback(c_k).variables

    with c_k the cotangent of the k-th chosen part of the output, zero elsewhere, and M_k the mask of
    the variables that it may train. What no route chooses trains all variables. The inputs get the
    module's own cotangent.

    Args:
        routes: a dict from choices of outputs to choices of variables, such as
            `{"value": "value_head", "policy": ["policy_head", "trunk"]}`. A choice is a name, which
            chooses the leaf or the branch of that name, "0" the first of a tuple; a path glob, which
            may start at any name of the path; a compiled regex; a predicate `(path, leaf) -> bool`;
            or a tuple of these, for variables a list too. An output that several routes choose
            trains the variables of all of them.

    Raises:
        ArgumentError: a route chooses no output, or no variable of the module; in the backward pass.
    """

    needs_variables = True
    symbolic_zeros = False  # so that a route to an output that nobody uses still finds it
    routes: Mapping[Any, Any] = static()

    def backward(self, call, y_bar):
        """Pulls the parts back one by one."""
        bar = call.pullback(y_bar)
        leaves, treedef = jax.tree.flatten(y_bar)
        by_mask: dict[tuple[bool, ...], list[Any]] = {}  # outputs that train the same variables go together
        for index, mask in enumerate(self._masks(y_bar, bar.variables)):
            by_mask.setdefault(mask, [None] * len(leaves))[index] = leaves[index]
        routed = [
            _masked(call.pullback(jax.tree.unflatten(treedef, part)).variables, mask) for mask, part in by_mask.items()
        ]
        return bar.replace(variables=functools.reduce(add, routed))

    def _masks(self, y_bar: Any, variables: Any) -> list[tuple[bool, ...]]:
        """Says for each array of the output which variables it trains."""
        hits = {choice: chosen(choice, y_bar, self, "output") for choice in self.routes}
        open_to = {choice: chosen(where, variables, self) for choice, where in self.routes.items()}
        everything = [[True] * len(jax.tree.leaves(variables))]
        masks = []
        for index in range(len(jax.tree.leaves(y_bar))):
            mine = [open_to[choice] for choice in self.routes if hits[choice][index]]
            masks.append(tuple(map(any, zip(*(mine or everything), strict=True))))
        return masks


def _masked(tree: Any, mask: tuple[bool, ...]) -> Any:
    leaves, treedef = jax.tree.flatten(tree)
    return jax.tree.unflatten(treedef, [leaf if keep else None for leaf, keep in zip(leaves, mask, strict=True)])
