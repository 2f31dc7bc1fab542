"""`custom_vjp`: the documented contract of `flax.linen.custom_vjp`, for every framework."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, overload

import jax

from ._arrays import Layout, as_array, take_apart
from ._behaviour import Answer, Perturbed, Primals, run_alone
from ._cotangents import Order, check_order
from ._errors import ArgumentError, HandleError
from ._inputs import has_parameter, positions_of
from ._plain import CustomVJP
from ._registry import belongs_to
from ._session import Outcome, Session
from ._transform import Options, transformed_call


@overload
def custom_vjp(
    fn: Callable[..., Any],
    *,
    nondiff_argnums: Sequence[int] | int = (),
    nondiff_argnames: Sequence[str] | str = (),
) -> CustomVJP: ...
@overload
def custom_vjp(
    fn: Callable[..., Any],
    forward_fn: Callable[..., tuple[Any, Any]],
    backward_fn: Callable[..., Any],
    grad_vars: Any = "params",
    nondiff_argnums: Sequence[int] | int = (),
    *,
    nondiff_argnames: Sequence[str] | str = (),
    order: Order = "inputs_first",
    optimize_remat: bool = False,
    reads_names: bool = True,
) -> Callable[..., Any]: ...
def custom_vjp(
    fn: Callable[..., Any],
    forward_fn: Any = None,
    backward_fn: Any = None,
    grad_vars: Any = "params",
    nondiff_argnums: Sequence[int] | int = (),
    *,
    nondiff_argnames: Sequence[str] | str = (),
    order: Order = "inputs_first",
    optimize_remat: bool = False,
    reads_names: bool = True,
) -> Any:
    """Gives a function of a module a backward pass of its own, in any framework.

    `fn(mdl, *args, **kwargs)` alone runs when no gradient is asked for. Otherwise `forward_fn` runs
    in its place, and `backward_fn` turns the cotangent of the output into those of the inputs and
    the variables. Variables that `grad_vars` leaves out, and values that the call writes into the
    framework's state, keep the module's own derivative.

    Without `forward_fn` and `backward_fn`, as a decorator too, it is `jax.custom_vjp` for a function
    without a module: see `CustomVJP`.

    Args:
        fn: the function to give a custom backward pass; its first argument is the module handle.
        forward_fn: takes the same arguments and returns `(y, residuals)`, with the `y` of `fn`.
            The residuals are any pytree, the function that `vjp` returns among it. The module
            itself can't be kept; `crossvjp.variables(mdl)` takes a snapshot of its variables. If it
            has a parameter `perturbed`, it gets a `Cotangents` of booleans in the places of the
            arrays, which says what is differentiated at all.
        backward_fn: called as `backward_fn(*nondiff_args, residuals, y_bar)`; returns a
            `Cotangents` or the tuple `(*inputs_bar, variables_bar)`. `None` stands for zero,
            whole or in part. If it has a parameter `updates_bar`, it also gets the cotangents of
            the values that the call wrote into the framework's state, and answers for them.
        grad_vars: the variables whose cotangent `backward_fn` returns: "params" for the trainable
            parameters, a collection of the framework or a list of collections, `True` for every
            differentiable array, a framework's own filter, a path glob or compiled regex, or a
            predicate `(path, leaf) -> bool`.
        nondiff_argnums: positions in `fn(mdl, *args)` of arguments for which no vjp is computed;
            the first argument after the module has position 1. They may be arrays; their
            gradient is zero.
        nondiff_argnames: the same, by the names of positional parameters of `fn`.
        order: `"variables_first"` for a `backward_fn` that returns `(variables_bar, *inputs_bar)`,
            as today's `flax.linen.custom_vjp` has it.
        optimize_remat: as in `jax.custom_vjp.defvjp`: under `jax.remat`, `forward_fn` does not run
            where only the output is needed. JAX then can't say what is differentiated, so
            everything counts as such.
        reads_names: whether the functions may tell modules of one kind apart by their names. With
            False, calls that repeat share what JAX makes of them in Haiku too, where modules
            differ by name.

    Returns:
        A function with the signature of `fn`.

    Raises:
        HandleError: when called with a module handle that can't be opened.
        ArgumentError: an argument does not fit `fn`, or `forward_fn` does not return a pair.
        CotangentError: `backward_fn` returns cotangents of another order, structure or shape.

    Example:
        >>> import jax, jax.numpy as jnp, crossvjp
        >>> f = lambda w, x: jnp.sum(w * x)
        >>> def bwd(pullback, y_bar):
        ...     x_bar, w_bar = pullback(y_bar)
        ...     return x_bar, jnp.sign(w_bar)
        >>> g = crossvjp.custom_vjp(f, lambda w, x: crossvjp.vjp(f, w, x), bwd)
        >>> jax.grad(g)(jnp.ones(2), jnp.array([3.0, -4.0])).tolist()
        [1.0, -1.0]

    Reference:
        Flax documentation, `flax.linen.custom_vjp`; see the README for the order of cotangents.
    """
    if not callable(forward_fn) and not callable(backward_fn):  # by position, jax.custom_vjp's arguments stand there
        numbers: Any = nondiff_argnums if forward_fn is None else forward_fn
        names: Any = nondiff_argnames if backward_fn is None else backward_fn
        return CustomVJP(fn, numbers, names)
    check_order(order)
    for name, function in (("fn", fn), ("forward_fn", forward_fn), ("backward_fn", backward_fn)):
        if not callable(function):
            raise ArgumentError(f"`{name}` must be a function, but is {function!r}.")

    behaviour = _ByFunctions(fn, forward_fn, backward_fn, order, reads_names)
    options = Options(grad_vars, positions_of(fn, nondiff_argnums, nondiff_argnames), optimize_remat)

    @functools.wraps(fn)
    def wrapped(mdl: Any, *args: Any, **kwargs: Any) -> Any:
        return transformed_call(fn, behaviour, options, mdl, args, kwargs)

    return wrapped


class _ByFunctions:
    """A rule written as `forward_fn` and `backward_fn`."""

    arrays: Sequence[Any] = ()
    symbolic_zeros = False
    can_be_compared = False

    def __init__(
        self,
        fn: Callable[..., Any],
        forward_fn: Callable[..., Any],
        backward_fn: Callable[..., Any],
        order: Order,
        reads_names: bool,
    ):
        self.forward_functions: Sequence[Any] = [forward_fn]
        self.backward_functions: Sequence[Any] = [backward_fn]
        self._order: Order = order
        self.key = (forward_fn, backward_fn, order)
        self.reads_names = reads_names
        self.author = getattr(backward_fn, "__name__", repr(backward_fn))
        self.asks_updates = has_parameter(backward_fn, "updates_bar")
        # If `fn` has a parameter of this name too, it is one of the call's own.
        self._asks_perturbed = has_parameter(forward_fn, "perturbed") and not has_parameter(fn, "perturbed")

    def check(self, session: Session) -> None:
        pass

    def formal_backward(self, session: Session, primals: Primals, outcome: Outcome) -> None:
        return None

    def release(self) -> None:
        pass

    def run(self, session: Session, primals: Primals) -> Outcome:
        return run_alone(session, primals)

    def forward(self, session: Session, primals: Primals, perturbed: Perturbed) -> tuple[Outcome, Any]:
        adapter = session.adapter
        forward_fn = session.functions[0]
        if self._asks_perturbed:
            flags = session.signature.build(perturbed.variables, perturbed.arrays, self._order)
            forward_fn = functools.partial(forward_fn, perturbed=flags)

        def unpack(result: Any) -> tuple[list[Any], Layout, Any]:
            if not isinstance(result, tuple | list) or len(result) != 2:
                came = (
                    f"a {type(result).__name__} of {len(result)}" if isinstance(result, tuple | list) else repr(result)
                )
                raise ArgumentError(
                    "`forward_fn` must return a pair (y, residuals), with the output of `fn` first, "
                    f"but returned {came if len(came) < 200 else type(result).__name__}."
                )
            y, residuals = result
            kept, kept_layout = take_apart(residuals)
            if adapter and any(static and belongs_to(adapter, static.value) for static in kept_layout.statics):
                raise HandleError(
                    f"`forward_fn` returned a {adapter.name} module among its residuals, but a module's variables are "
                    "gone in the backward pass. Return a snapshot of them, `crossvjp.variables(mdl)`."
                )
            return *take_apart(y), (kept, kept_layout)

        outcome = session.run(forward_fn, primals.variables, primals.context, primals.arrays, unpack)
        kept, kept_layout = outcome.extra
        nondiff = [primals.arrays[index] for part in session.inputs.without_gradient for index in part.indices]
        return outcome, _Residuals(kept, nondiff, kept_layout)

    def backward(self, session: Session, residuals: Any, y_bar: Any, updates_bar: Any) -> Answer:
        rest = iter(residuals.nondiff)
        nondiff = [part.layout.fill([next(rest) for _ in part.indices]) for part in session.inputs.without_gradient]
        asked = {"updates_bar": updates_bar} if self.asks_updates else {}
        backward_fn = session.functions[1]
        kept = residuals.layout.fill(map(as_array, residuals.arrays))
        result = backward_fn(*nondiff, kept, y_bar, **asked)
        return Answer(*session.signature.expected().conform(result, self._order, f"{self.author!r}"))


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass
class _Residuals:
    """What `forward_fn` kept, and the arguments of `nondiff_argnums`, which `backward_fn` gets first."""

    arrays: list[Any]
    nondiff: list[Any]
    layout: Layout

    def tree_flatten(self) -> tuple[Any, Any]:
        return (self.arrays, self.nondiff), self.layout

    @classmethod
    def tree_unflatten(cls, layout: Layout, children: Any) -> _Residuals:
        arrays, nondiff = children
        return cls(arrays, nondiff, layout)
