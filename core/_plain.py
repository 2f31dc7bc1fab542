"""`jax.custom_vjp`'s own form, for functions without a module."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal

from ._arrays import Layout, as_array, is_array, take_apart
from ._behaviour import Answer, Perturbed, Primals, run_alone
from ._closures import name_of
from ._errors import ArgumentError, HandleError
from ._inputs import Inputs, positions_of
from ._paths import leaves_with_paths, show
from ._registry import is_reference
from ._session import Outcome, Session
from ._transform import call_inside


class CustomVJP:
    """A function with a backward pass of its own: the contract of `jax.custom_vjp`, and what that refuses.

    Beyond it: arguments, outputs and residuals may have leaves that are no arrays; keyword-only
    arguments keep their own derivative; arguments of `nondiff_argnums` may be traced arrays; a traced
    value that the functions close over is allowed as long as it is not differentiated; cotangents are
    cast to their primal's dtype.

    Args:
        fun: the function; any pytrees in and out.
        nondiff_argnums: positions of arguments that go to the backward function first, and get no cotangent.
        nondiff_argnames: the same, by the names of positional parameters.

    Raises:
        ArgumentError: `fun` is no function, or has no such parameter.

    Example:
        >>> import jax, jax.numpy as jnp, crossvjp
        >>> @crossvjp.custom_vjp
        ... def f(x, y):
        ...     return jnp.sin(x) * y
        >>> f.defvjp(lambda x, y: (f(x, y), (jnp.cos(x), y)), lambda res, g: (res[0] * g * res[1], None))
        >>> float(jax.grad(f)(0.0, 2.0))
        2.0
    """

    def __init__(
        self,
        fun: Callable[..., Any],
        nondiff_argnums: Sequence[int] | int = (),
        nondiff_argnames: Sequence[str] | str = (),
    ):
        if not callable(fun):
            raise ArgumentError(f"`fn` must be a function, but is {fun!r}.")
        functools.update_wrapper(self, fun)
        self.fun = fun
        numbers = positions_of(fun, nondiff_argnums, nondiff_argnames)
        self.nondiff_argnums = (numbers,) if isinstance(numbers, int) else tuple(sorted(set(numbers)))
        self.fwd: Callable[..., Any] | None = None
        self.bwd: Callable[..., Any] | None = None
        self.symbolic_zeros = False
        self.optimize_remat = False

    def defvjp(
        self,
        fwd: Callable[..., tuple[Any, Any]],
        bwd: Callable[..., Any],
        symbolic_zeros: bool = False,
        optimize_remat: bool = False,
    ) -> None:
        """Sets the forward and the backward function.

        Args:
            fwd: takes the arguments of `fun`, returns `(output, residuals)`.
            bwd: called as `bwd(*nondiff_args, residuals, y_bar)`; returns a tuple with a cotangent
                for each argument that is differentiated, `None` for zero, whole or in part.
            symbolic_zeros: `fwd` gets a `jax.custom_derivatives.CustomVJPPrimal` for each array of
                its differentiated arguments, and `bwd` a `SymbolicZero` where nothing flows back.
            optimize_remat: under `jax.remat`, `fwd` does not run where only the output is needed.

        Raises:
            ArgumentError: both options are set, which JAX can't combine, or something is no function.
        """
        for name, function in (("fwd", fwd), ("bwd", bwd)):
            if not callable(function):
                raise ArgumentError(f"`{name}` must be a function, but is {function!r}.")
        if symbolic_zeros and optimize_remat:
            raise ArgumentError("`optimize_remat` can't be combined with `symbolic_zeros`: choose one of them.")
        self.fwd, self.bwd = fwd, bwd
        self.symbolic_zeros, self.optimize_remat = symbolic_zeros, optimize_remat

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the function.

        Raises:
            AttributeError: `defvjp` was not called.
            HandleError: an argument is a module of a framework whose modules refer to state elsewhere.
        """
        if self.fwd is None or self.bwd is None:
            raise AttributeError(
                f"{name_of(self.fun)} has no backward pass yet. Set it by {name_of(self.fun)}.defvjp(fwd, bwd)."
            )
        args, kwargs = _resolved(self.fun, args, kwargs)
        _refuse_modules(self.fun, (args, kwargs))
        nondiff = _check_positions(self.fun, self.nondiff_argnums, len(args))
        args = tuple(arg if index in nondiff else jax.tree.map(_as_array, arg) for index, arg in enumerate(args))
        # Positions count from 1 there, behind a module, which is `None` here.
        inputs = Inputs(_with_none(self.fun), args, kwargs, [index + 1 for index in nondiff], ())
        session = Session(_NoModule(), _NoHandle(), inputs, _with_none(self.fun, scalars=True), with_variables=False)
        out, _ = call_inside(session, _ByPair(self), (), self.optimize_remat)
        inputs.arrays = []
        return out

    def __getattr__(self, name: str) -> Any:
        """Finds the ways to define other rules on the function, such as `def_vmap`, as `jax.custom_vjp` does."""
        if name.startswith("def"):
            return getattr(self.fun, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        """Binds as a method, so that the decorator serves in classes; the instance is the first argument."""
        return self if instance is None else functools.partial(self, instance)


class _NoModule:
    """The boundary of a call without a module."""

    variables: Any = ()
    context: Any = ()
    static: Any = ()

    def call(self, fn: Any, variables: Any, context: Any, *args: Any, **kwargs: Any) -> tuple[Any, None]:
        return fn(None, *args, **kwargs), None

    def closed(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


class _NoHandle:
    adapter = None
    modules: Sequence[Any] = ()
    key = None

    def split(self, inner: Any, functions: Sequence[Any]) -> tuple[Any, Sequence[Any]]:
        return None, ()


class _ByPair:
    """A rule written as the `fwd` and `bwd` of `jax.custom_vjp`."""

    arrays: Sequence[Any] = ()
    asks_updates = False
    key = None  # as in `jax.custom_vjp`, each call runs `fwd`
    reads_names = True
    can_be_compared = False

    def __init__(self, function: CustomVJP):
        self.forward_functions: Sequence[Any] = [function.fwd]
        self.backward_functions: Sequence[Any] = [function.bwd]
        self.symbolic_zeros = function.symbolic_zeros
        self.author = repr(name_of(function.bwd))
        self._fun_name, self._fwd_name = name_of(function.fun), name_of(function.fwd)

    def check(self, session: Session) -> None:
        pass

    def formal_backward(self, session: Session, primals: Primals, outcome: Outcome) -> None:
        return None

    def release(self) -> None:
        pass

    def run(self, session: Session, primals: Primals) -> Outcome:
        return run_alone(session, primals)

    def forward(self, session: Session, primals: Primals, perturbed: Perturbed) -> tuple[Outcome, Any]:
        given = list(primals.arrays)
        if self.symbolic_zeros:
            nondiff = {index for part in session.inputs.without_gradient for index in part.indices}
            given = [
                array if index in nondiff else CustomVJPPrimal(array, able)
                for index, (array, able) in enumerate(zip(primals.arrays, perturbed.arrays, strict=True))
            ]

        def unpack(result: Any) -> tuple[list[Any], Layout, Any]:
            y, residuals = self._pair(result)
            self._refuse_records((y, residuals))
            return *take_apart(jax.tree.map(_as_array, y)), take_apart(residuals)

        outcome = session.run(_with_none(session.functions[0]), primals.variables, primals.context, given, unpack)
        nondiff_arrays = [primals.arrays[index] for part in session.inputs.without_gradient for index in part.indices]
        kept, layout = outcome.extra
        return outcome, (kept, nondiff_arrays, _Static(layout))

    def _pair(self, result: Any) -> tuple[Any, Any]:
        if isinstance(result, tuple | list) and len(result) == 2:
            return result[0], result[1]
        came = f"{type(result).__name__} of {len(result)}" if isinstance(result, tuple | list) else repr(result)
        raise ArgumentError(
            f"The forward function {self._fwd_name} of {self._fun_name} must return a pair, the output of "
            f"{self._fun_name} and the residuals for the backward function, but returned {came[:200]}."
        )

    def _refuse_records(self, pair: Any) -> None:
        for path, leaf in leaves_with_paths(pair):
            if isinstance(leaf, CustomVJPPrimal):
                raise ArgumentError(
                    f"The forward function {self._fwd_name} of {self._fun_name} returned a CustomVJPPrimal at "
                    f"{show(path)}. Return its .value."
                )

    def backward(self, session: Session, residuals: Any, y_bar: Any, updates_bar: Any) -> Answer:
        kept, nondiff_arrays, static = residuals
        rest: Iterator[Any] = iter(nondiff_arrays)
        nondiff = [part.layout.fill([next(rest) for _ in part.indices]) for part in session.inputs.without_gradient]
        result = session.functions[1](*nondiff, static.layout.fill(map(as_array, kept)), y_bar)
        return Answer(*session.signature.expected().conform(result, "inputs_first", self.author))


@jax.tree_util.register_static
class _Static:
    """A layout as a node without leaves."""

    def __init__(self, layout: Layout):
        self.layout = layout

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Static) and self.layout == other.layout

    def __hash__(self) -> int:
        return hash(self.layout)


def _with_none(function: Any, *, scalars: bool = False) -> Callable[..., Any]:
    """Puts a first argument in front, where functions of modules have the module."""

    def call(_: None, *args: Any, **kwargs: Any) -> Any:
        out = function(*args, **kwargs)
        return jax.tree.map(_as_array, out) if scalars else out

    call.__name__ = name_of(function)
    return call


def _as_array(leaf: Any) -> Any:
    """Makes an array of a Python number, as JAX does with what it transforms."""
    return jnp.asarray(leaf) if isinstance(leaf, bool | int | float | complex) and not is_array(leaf) else leaf


def _resolved(fun: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Moves arguments to their positions and adds defaults, as `jax.custom_vjp` does."""
    if isinstance(fun, functools.partial):  # what it holds is its own affair
        return args, kwargs
    try:
        signature = inspect.signature(fun)
    except ValueError:  # some builtins have none
        return args, kwargs
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise ArgumentError(f"The arguments do not fit {name_of(fun)}{signature}: {error}.") from error
    given = set(bound.kwargs)
    bound.apply_defaults()
    # Keyword-only arguments that were not given keep their default inside the function.
    return bound.args, {name: value for name, value in bound.kwargs.items() if name in given}


def _check_positions(fun: Any, numbers: Sequence[int], count: int) -> frozenset[int]:
    for number in numbers:
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < count:
            raise ArgumentError(
                f"`nondiff_argnums` has {number!r}, but this call of {name_of(fun)} has {count} positional arguments."
            )
    return frozenset(numbers)


def _refuse_modules(fun: Any, arguments: Any) -> None:
    for leaf in jax.tree.leaves(arguments, is_leaf=is_reference):
        if is_reference(leaf):
            raise HandleError(
                f"{name_of(fun)} got a {type(leaf).__name__} as an argument, whose variables live elsewhere. Give the "
                "three functions of a module, custom_vjp(fn, forward_fn, backward_fn)(mdl, *args): then they are found."
            )
