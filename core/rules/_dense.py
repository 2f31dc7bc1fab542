"""Recognising a dense layer by its pullback, whatever the framework."""

from __future__ import annotations

from typing import Any

import jax

_KERNEL_BAR = "x^T y_bar"
_SAME = ("convert_element_type", "copy", "copy_p")
_INLINE = ("jit", "pjit", "closed_call", "checkpoint")


def dense_layer(call: Any, y_bar: Any) -> tuple[Any, bool] | None:
    """Says whether a call has the gradients of `x @ kernel` or `x @ kernel + bias`.

    They are x^T y_bar and the sum of y_bar, over all axes but the last. A rule inside that changes them shows here too.

    Args:
        call: the call that a rule sees.
        y_bar: the cotangent of its output.

    Returns:
        `x`, whose axis 0 is the batch's, and whether there is a bias; `None` for any other call.
    """
    variables, inputs = jax.tree.leaves(call.variables), jax.tree.leaves((call.inputs, call.keywords))
    if sorted(leaf.ndim for leaf in variables) not in ([2], [1, 2]) or len(inputs) != 1:
        return None
    (x,) = inputs
    if not all(isinstance(array, jax.Array) and array.ndim == x.ndim >= 2 for array in (x, y_bar)):
        return None

    def gradient(inputs: Any, y_bar: Any) -> list[Any]:
        args, kwargs = inputs
        return jax.tree.leaves(call.vjp_at(call.variables, *args, **kwargs)[1](y_bar).variables)

    program = jax.make_jaxpr(gradient)((call.inputs, call.keywords), y_bar).jaxpr
    known = [_with_axes("x", x, "in"), _with_axes("y_bar", y_bar, "out")]
    expected = {2: _KERNEL_BAR, 1: ("y_bar", ("out" if y_bar.shape[-1] > 1 else None,))}
    is_dense = _meanings(program, known) == [expected[leaf.ndim] for leaf in variables]
    return (x, len(variables) == 2) if is_dense else None


def _with_axes(name: str, array: Any, last: str) -> tuple[str, tuple[Any, ...]]:
    """Names an array and its axes; those of size one come and go, so they have no name."""
    axes = [*range(array.ndim - 1), last]
    return name, tuple(axis if size > 1 else None for axis, size in zip(axes, array.shape, strict=True))


def _meanings(program: Any, arguments: list[Any]) -> list[Any]:
    """Says what each result of a program is, in terms of its arguments; `None` if it is nothing of a dense layer."""
    known = dict(zip(program.invars, arguments, strict=True))

    def read(atom: Any) -> Any:
        return None if hasattr(atom, "val") else known.get(atom)  # literals have a value

    for eqn in program.eqns:
        came = [read(atom) for atom in eqn.invars]
        inner = eqn.params.get("jaxpr") if eqn.primitive.name in _INLINE else None
        found = [_meaning(eqn, came)] if inner is None else _meanings(getattr(inner, "jaxpr", inner), came)
        known.update(zip(eqn.outvars, found, strict=False))
    return [read(atom) for atom in program.outvars]


def _meaning(eqn: Any, came: list[Any]) -> Any:
    """Follows `x` and `y_bar` through one operation."""
    match eqn.primitive.name, came:
        case name, [what] if name in _SAME:
            return what
        case "transpose", [str() as kernel_bar]:
            return kernel_bar
        case "transpose", [(name, axes)]:
            return name, tuple(axes[at] for at in eqn.params["permutation"])
        case "reduce_sum", [("y_bar", axes)]:
            return "y_bar", tuple(axis for at, axis in enumerate(axes) if at not in eqn.params["axes"])
        case "reshape" | "squeeze", [(name, axes)]:
            return _reshaped(eqn, name, axes)
        case "dot_general", [("x", left), ("y_bar", right)] | [("y_bar", left), ("x", right)]:
            return _product(eqn, left, right)
    return None


def _reshaped(eqn: Any, name: str, axes: tuple[Any, ...]) -> Any:
    """Follows a reshape that only adds or drops axes of size one."""
    before, after = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    if [size for size in before if size > 1] != [size for size in after if size > 1]:
        return None
    named = iter([axis for axis in axes if axis is not None])
    return name, tuple(next(named) if size > 1 else None for size in after)


def _product(eqn: Any, left: tuple[Any, ...], right: tuple[Any, ...]) -> Any:
    """Says whether a product sums over all axes but the last of both."""
    dims, batch = eqn.params["dimension_numbers"]
    sides = list(zip((left, right), dims, strict=True))
    summed = [[axes[at] for at in contracted] for axes, contracted in sides]
    kept = {axis for axes, contracted in sides for at, axis in enumerate(axes) if at not in contracted}
    return _KERNEL_BAR if summed[0] == summed[1] and kept <= {"in", "out", None} and not any(batch) else None
