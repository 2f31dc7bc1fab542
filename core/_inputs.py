"""The arguments of a wrapped call: which are arrays, which are modules, which carry no gradient."""

from __future__ import annotations

import dataclasses
import inspect
import types
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.core import Tracer

from ._arrays import ArrayType, Layout, Static, is_array, is_ref
from ._boundary import Adapter
from ._conform import Expected
from ._errors import ArgumentError
from ._registry import adapter_of, held_modules, is_reference


class Handle:
    """A module handle as the user gave it, and the handle that its adapter opens.

    They differ where a bound method is given, whose module is opened, and where arguments of the
    call are themselves modules of a framework whose handles are references.
    """

    def __init__(self, mdl: Any, args: tuple[Any, ...], kwargs: dict[str, Any]):
        self._method = mdl.__func__ if isinstance(mdl, types.MethodType) else None
        module = mdl.__self__ if isinstance(mdl, types.MethodType) else mdl
        self.adapter: Adapter = adapter_of(module)
        self.held = held_modules(self.adapter, (args, kwargs)) if self.adapter.by_reference else []
        self.opened = (module, self.held) if self.held else module
        self.functions = [mdl] if isinstance(mdl, types.FunctionType) else []
        self._holds = bool(self.held)

    def split(self, inner: Any, functions: Sequence[Any]) -> tuple[Any, Sequence[Any]]:
        """Takes the module that the adapter rebuilt apart: the user's handle, and the modules among the arguments.

        Args:
            inner: what the adapter rebuilt.
            functions: those of the handle that stand for `functions` in this run.
        """
        module, held = inner if self._holds else (inner, ())
        module = functions[0] if functions else module
        return (module if self._method is None else types.MethodType(self._method, module)), held

    @property
    def key(self) -> Any:
        """How it is taken apart: the method if it is a bound one, and whether modules stand among the arguments."""
        return self._method, self._holds

    @property
    def modules(self) -> list[Any]:
        """The live modules, those inside of a composite handle among them."""
        leaves = jax.tree.leaves(self.opened, is_leaf=is_reference)
        return [leaf for leaf in leaves if is_reference(leaf)]

    def release(self) -> None:
        """Lets go of the live modules; late runs get rebuilt ones."""
        self.opened, self.held, self.functions = None, [], []


@dataclasses.dataclass(frozen=True)
class Input:
    """One argument of a call: its static half, the types of its arrays, and where they stand among all."""

    name: str
    layout: Layout
    types: tuple[ArrayType, ...]
    indices: range

    def __hash__(self) -> int:
        return hash(self.layout)

    def cotangent(self, arrays: Sequence[Any]) -> Any:
        """Picks this argument's cotangents out of those of all arrays, and puts them into its tree."""
        return self.layout.fill_arrays_only([arrays[index] for index in self.indices])

    def expected(self) -> Expected:
        """Says how the argument's cotangent must look."""
        return Expected(self.name, self.layout, self.types)


@dataclasses.dataclass(frozen=True)
class _Held:
    """Stands in a layout for a module that is opened with the handle."""

    index: int


class Inputs:
    """The arguments of one call, flattened once.

    After the call, `arrays` is emptied: late runs get theirs as arguments.

    Args:
        fn: whose signature resolves keyword arguments to positions.
        args: the positional arguments behind the module.
        kwargs: the keyword arguments.
        nondiff_argnums: positions in `fn(mdl, *args)` that carry no gradient; 0 would be the module.
        held: the modules among the leaves, which are opened with the handle.

    Raises:
        ArgumentError: `nondiff_argnums` names the module or no argument.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        nondiff_argnums: Sequence[int] | int,
        held: Sequence[Any],
    ):
        args, kwargs = resolve(fn, args, kwargs)
        self.nondiff = check_nondiff(nondiff_argnums, len(args), fn)
        self.arrays: list[Any] = []
        placeholders = {id(module): _Held(index) for index, module in enumerate(held)}
        self._by_position = [
            self._add(f"input {index}", arg, placeholders, _is_traced if index + 1 in self.nondiff else is_array)
            for index, arg in enumerate(args)
        ]
        self._by_keyword = {
            name: self._add(f"input {name!r}", arg, placeholders, is_array) for name, arg in kwargs.items()
        }

    @property
    def key(self) -> Any:
        """All about the arguments but their arrays."""
        return tuple(self._by_position), tuple(self._by_keyword.items()), self.nondiff

    def rebuild(self, arrays: Sequence[Any], held: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Gives the arguments back, around other arrays and other modules."""
        args = tuple(_fill(part, arrays, held) for part in self._by_position)
        return args, {name: _fill(part, arrays, held) for name, part in self._by_keyword.items()}

    @property
    def differentiable(self) -> list[Input]:
        """The positional inputs that the rule gives cotangents for."""
        return [part for index, part in enumerate(self._by_position) if index + 1 not in self.nondiff]

    @property
    def without_gradient(self) -> list[Input]:
        """The positional inputs of `nondiff_argnums`, in the order of their positions."""
        return [part for index, part in enumerate(self._by_position) if index + 1 in self.nondiff]

    @property
    def keywords(self) -> dict[str, Input]:
        """The inputs that have no position."""
        return self._by_keyword

    def _add(self, name: str, arg: Any, placeholders: dict[int, _Held], is_array: Callable[[Any], bool]) -> Input:
        # Every node would ask, and most calls have no modules among their arguments.
        is_leaf = (lambda leaf: id(leaf) in placeholders) if placeholders else None
        leaves, treedef = jax.tree.flatten(arg, is_leaf=is_leaf)
        start = len(self.arrays)
        self.arrays += [leaf for leaf in leaves if is_array(leaf)]
        statics = tuple(None if is_array(leaf) else Static(placeholders.get(id(leaf), leaf)) for leaf in leaves)
        indices = range(start, len(self.arrays))
        return Input(name, Layout(treedef, statics), tuple(ArrayType.of(self.arrays[i]) for i in indices), indices)


def _is_traced(leaf: Any) -> bool:
    """Says whether an argument without gradient has to be passed: one that is known stays what it is, under jit too."""
    return isinstance(leaf, Tracer) or is_ref(leaf)


def _fill(part: Input, arrays: Sequence[Any], held: Sequence[Any]) -> Any:
    filled = part.layout.fill([arrays[index] for index in part.indices])
    if not held:
        return filled
    return jax.tree.map(lambda leaf: held[leaf.index] if _is_held(leaf) else leaf, filled, is_leaf=_is_held)


def _is_held(leaf: Any) -> bool:
    return isinstance(leaf, _Held)


def resolve(
    fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Moves keyword arguments that have a position in `fn` there; keyword-only ones stay."""
    if not kwargs:
        return args, {}
    try:
        signature = inspect.signature(fn)
    except ValueError:  # some builtins have none
        return args, kwargs
    bound = signature.bind(None, *args, **kwargs)
    return tuple(bound.args[1:]), dict(bound.kwargs)


def positions_of(
    fn: Callable[..., Any], nondiff_argnums: Sequence[int] | int, nondiff_argnames: Sequence[str] | str
) -> Sequence[int] | int:
    """Adds the positions of named parameters to `nondiff_argnums`.

    Raises:
        ArgumentError: `fn` has no positional parameter of a name.
    """
    names = (nondiff_argnames,) if isinstance(nondiff_argnames, str) else tuple(nondiff_argnames)
    if not names:
        return nondiff_argnums
    positional = [
        parameter.name
        for parameter in inspect.signature(fn).parameters.values()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    unknown = [name for name in names if name not in positional]
    if unknown:
        raise ArgumentError(
            f"`nondiff_argnames` has {unknown[0]!r}, but {getattr(fn, '__name__', fn)} has the positional parameters "
            f"{positional}."
        )
    numbers = (nondiff_argnums,) if isinstance(nondiff_argnums, int) else tuple(nondiff_argnums)
    return *numbers, *(positional.index(name) for name in names)


def check_nondiff(nondiff_argnums: Sequence[int] | int, count: int, fn: Callable[..., Any]) -> frozenset[int]:
    """Checks the positions of arguments without gradient.

    Raises:
        ArgumentError: a position is the module's, or past the last argument, or no integer.
    """
    numbers = (nondiff_argnums,) if isinstance(nondiff_argnums, int) else tuple(nondiff_argnums)
    if not numbers:
        return frozenset()
    name = getattr(fn, "__name__", repr(fn))
    for number in numbers:
        if not isinstance(number, int) or isinstance(number, bool):
            raise ArgumentError(f"`nondiff_argnums` must be integers, but has {number!r}.")
        if number == 0:
            raise ArgumentError(
                f"`nondiff_argnums` has 0, which is the module itself in {name}(mdl, *args). Positions of arguments "
                "start at 1; to leave variables without a gradient of the rule, choose others by `grad_vars`."
            )
        if not 1 <= number <= count:
            raise ArgumentError(
                f"`nondiff_argnums` has {number}, but this call of {name}(mdl, *args) has "
                + (f"arguments at positions 1 to {count}." if count else "no argument behind the module.")
            )
    return frozenset(numbers)


def has_parameter(function: Callable[..., Any], name: str) -> bool:
    """Says whether a function asks for something by the name of a parameter."""
    if type(function) is types.FunctionType and not function.__dict__:  # the usual case; a signature takes long
        code = function.__code__
        return name in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    try:
        return name in inspect.signature(function).parameters
    except (TypeError, ValueError):  # builtins without a signature
        return False
