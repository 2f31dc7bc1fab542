"""Values of a trace that functions reach through their closures, made explicit.

JAX runs the functions of a custom VJP late, when a traced value that they close over belongs to a trace
that is gone, or to one that must not leak into theirs. So such values are found in the functions' cells
and enter as arguments, and each run gets functions around values of its own trace.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import jax
from jax.core import Tracer

from ._arrays import ArrayType, is_inexact, is_ref
from ._errors import ArgumentError
from ._paths import path_of, show
from ._registry import is_reference

Make: TypeAlias = Callable[[Sequence[Any]], Any]

_CALLABLES = (types.FunctionType, types.MethodType, functools.partial)


class Closures:
    """The traced values that some functions close over, and the functions around other values.

    Looks into cells, defaults, partials, bound methods, and the containers found there. Modules that are
    references to state are left alone, and so are attributes of objects that are no pytrees.

    Args:
        values: functions that the output of a call depends on. A value that these close over may not
            be differentiated: a rule gives no cotangent for it.
        backward: functions of the backward pass alone, on which the output does not depend.
        opened: modules that are no part of the closure, since the call opens them itself.
    """

    def __init__(self, values: Sequence[Any], backward: Sequence[Any] = (), opened: Sequence[Any] = ()):
        self.modules: list[str] = []
        """Names of the modules that `values` reach, and that refer to arrays which are not found here."""
        self._opened = set(map(id, opened))
        self._arrays: list[Any] = []
        self._for_backward: set[int] | None = None
        self._names: list[str] = []
        self._seen: dict[int, Make | None] = {}
        self._functions = (*values, *backward)
        self._makers = [self._visit(function, name_of(function)) for function in values]
        guarded, modules = len(self._arrays), len(self.modules)
        self._seen.clear()  # a function of both is visited again, to note what the backward pass needs of it
        self._for_backward = set()
        self._makers += [self._visit(function, name_of(function)) for function in backward]
        self._seen.clear()
        del self.modules[modules:]
        for index in range(guarded):
            if is_inexact(self._arrays[index]):
                self._arrays[index] = refuse_derivative(self._arrays[index], f"`{self._names[index]}`")

    def take(self) -> list[Any]:
        """Hands over the values, once: what late runs keep must hold no array."""
        arrays, self._arrays = self._arrays, []
        return arrays

    def kept_for_backward(self, arrays: Sequence[Any]) -> list[Any]:
        """Leaves mutable arrays out that only the forward pass reaches: JAX may refuse them as residuals."""
        needed = self._for_backward or ()
        return [None if is_ref(array) and index not in needed else array for index, array in enumerate(arrays)]

    def fill(self, arrays: Sequence[Any]) -> list[Any]:
        """Gives the functions, first those of `values`, around other values."""
        return [
            function if make is None else make(arrays)
            for function, make in zip(self._functions, self._makers, strict=True)
        ]

    def _visit(self, value: Any, name: str) -> Make | None:
        """Finds the values below one object; `None` where it reaches none, so that it can stay as it is."""
        if isinstance(value, Tracer):
            return self._array(value, name)
        if not isinstance(value, _CALLABLES):
            return self._tree(value, name)
        if id(value) not in self._seen:
            self._seen[id(value)] = None  # for a function that reaches itself
            self._seen[id(value)] = self._callable(value, name)
        return self._seen[id(value)]

    def _array(self, value: Any, name: str) -> Make:
        known = next((index for index, array in enumerate(self._arrays) if array is value), None)
        if known is None:
            known = len(self._arrays)
            self._arrays.append(value)
            self._names.append(name)
        if self._for_backward is not None:
            self._for_backward.add(known)
        return lambda arrays: arrays[known]

    def _callable(self, value: Any, name: str) -> Make | None:
        if isinstance(value, functools.partial):
            return self._rebuilt(
                lambda parts: type(value)(parts[0], *parts[1], **parts[2]),
                [(value.func, name), (value.args, name), (value.keywords, name)],
            )
        if isinstance(value, types.MethodType):
            return self._rebuilt(
                lambda parts: types.MethodType(*parts), [(value.__func__, name), (value.__self__, name)]
            )
        return self._function(value)

    def _function(self, function: types.FunctionType) -> Make | None:
        cells = function.__closure__ or ()
        freevars = function.__code__.co_freevars
        makers = [self._visit(_content(cell), name) for cell, name in zip(cells, freevars, strict=True)]
        defaults = self._tree(function.__defaults__, f"{name_of(function)}'s defaults")
        keyword_defaults = self._tree(function.__kwdefaults__, f"{name_of(function)}'s defaults")
        if not any([*makers, defaults, keyword_defaults]):
            return None

        def make(arrays: Sequence[Any]) -> Any:
            # Cells without traced values are shared, so that `nonlocal` still reaches the original's.
            filled = [
                cell if maker is None else types.CellType(maker(arrays))
                for cell, maker in zip(cells, makers, strict=True)
            ]
            copy = types.FunctionType(
                function.__code__,
                function.__globals__,
                function.__name__,
                function.__defaults__ if defaults is None else defaults(arrays),
                tuple(filled),
            )
            copy.__kwdefaults__ = function.__kwdefaults__ if keyword_defaults is None else keyword_defaults(arrays)
            return functools.update_wrapper(copy, function, updated=("__dict__",))

        return make

    def _tree(self, value: Any, name: str) -> Make | None:
        if value is None:  # the defaults of most functions, which need no search
            return None
        leaves, treedef = jax.tree.flatten(value, is_leaf=is_reference)
        self.modules += [name for leaf in leaves if is_reference(leaf) and id(leaf) not in self._opened]
        if not any(isinstance(leaf, (Tracer, *_CALLABLES)) for leaf in leaves):
            return None
        paths = [path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(value, is_leaf=is_reference)]
        named = [(leaf, name + (show(path) if path else "")) for leaf, path in zip(leaves, paths, strict=True)]
        return self._rebuilt(lambda parts: jax.tree.unflatten(treedef, parts), named)

    def _rebuilt(self, build: Callable[[list[Any]], Any], parts: Sequence[tuple[Any, str]]) -> Make | None:
        makers = [self._visit(part, name) if not _is_leaf(part) else None for part, name in parts]
        if not any(makers):
            return None
        return lambda arrays: build(
            [part if make is None else make(arrays) for (part, _), make in zip(parts, makers, strict=True)]
        )


def _is_leaf(part: Any) -> bool:
    """Says whether there is nothing to find, so that a leaf is not taken for a tree again and again."""
    if isinstance(part, (Tracer, *_CALLABLES)):
        return False
    return is_reference(part) or jax.tree_util.all_leaves([part])


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a variable that has no value yet
        return None


def name_of(function: Any) -> str:
    """Gives the name that errors use for a function."""
    return getattr(function, "__name__", type(function).__name__)


def refuse_derivative(value: Any, what: str) -> Any:
    """Passes a value on, and makes its differentiation an error: then, if late, and not before."""
    type_ = ArrayType.of(value)

    @jax.custom_jvp
    def pass_on(value: Any) -> Any:
        return value

    @pass_on.defjvp
    def refuse(primals: Any, tangents: Any) -> Any:
        raise ArgumentError(
            f"{what}, a {type_}, is differentiated, but the function under the rule reaches it by closure, where the "
            "rule can give no cotangent for it. Pass it as an input of the function, or, if it needs no gradient, use "
            "jax.lax.stop_gradient of it."
        )

    return pass_on(value)


@contextlib.contextmanager
def hint_at_what_is_not_found(fn: Callable[..., Any]) -> Iterator[None]:
    """Tells whoever gets JAX's error for a differentiated value where it may come from: no closure led to it."""
    try:
        yield
    except jax.errors.UnexpectedTracerError as error:
        error.add_note(
            f"{name_of(fn)} runs under a rule of crossvjp. If it reaches a value that is differentiated as a global, "
            "or as an attribute of an object that is no pytree, pass that value as an input of the function."
        )
        raise
