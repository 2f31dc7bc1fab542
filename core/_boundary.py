"""The one protocol between the core and a framework: a boundary around a module call."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

if TYPE_CHECKING:
    from jaxtyping import PyTree


Body: TypeAlias = Callable[["Boundary"], "tuple[Any, PyTree]"]


class Boundary(Protocol):
    """What the core sees of an opened module handle: its arrays, and a pure way to call functions of it."""

    variables: PyTree
    """The arrays that `grad_vars` chose, in the framework's own containers; every leaf differentiable.

    The core sets both trees to `None` when the call is over. JAX keeps the boundary for late runs, so
    an adapter, too, lets go of live modules and tracers when it has published.
    """

    context: PyTree
    """Everything else that a call may read: other collections, state, RNG keys and counters."""

    @property
    def static(self) -> Any:
        """What the module is apart from its arrays, hashable: boundaries with equal ones make the same of equal arrays.

        Calls that repeat then share what JAX makes of their rule. `None` where it can't be said. What each call
        computes is compared in any case.
        """
        ...

    def call(
        self, fn: Callable[..., Any], variables: PyTree, context: PyTree, *args: Any, **kwargs: Any
    ) -> tuple[Any, PyTree]:
        """Runs `fn(mdl, *args, **kwargs)` on a module that holds the given arrays.

        It is pure: it may run late, repeatedly, and after the framework's own frame is gone, and
        starts from the same names, counters and keys each time. The module is of the handle's own
        type, since functions under a rule may put rules on it again. When the call returns, it is
        spent: using it later is an error.

        Returns:
            What `fn` returned, and the updates: a pytree of the values that the call wrote into
            the framework's state, without those that it left as they were.
        """
        ...

    def closed(self) -> contextlib.AbstractContextManager[None]:
        """A context for the backward pass, in which using a handle of this boundary is a `HandleError` that says so.

        Where spent handles refuse by themselves, as values need not and NNX Variables do, it does nothing.
        """
        ...


class PublishingBoundary(Boundary, Protocol):
    """A boundary of a framework whose modules are written to."""

    def publish(self, updates: PyTree) -> None:
        """Writes what a run changed into the live module, and lets go of it."""
        ...


class NamedBoundary(Boundary, Protocol):
    """A boundary whose `static` is `None` because names alone may tell modules apart."""

    @property
    def unnamed(self) -> Any:
        """What the module is apart from its arrays and names, the trees of variables and context among it; hashable.

        Calls that repeat share what JAX makes of a rule that says `reads_names = False`. `None` where it can't be said.
        """
        ...

    def unnamed_updates(self, updates: PyTree) -> Any:
        """Describes the tree of updates without the module's name; hashable."""
        ...


def run_and_publish(boundary: PublishingBoundary, body: Body) -> Any:
    """Does the work of `Adapter.lift` once a boundary is open."""
    out, updates = body(boundary)
    if updates is not None:  # `None` where the body called nothing
        boundary.publish(updates)
    return out


class Adapter(Protocol):
    """Translates one framework's module handles into boundaries. Adapters have no state of their own."""

    name: str
    """What errors call the framework."""

    by_reference: bool
    """Whether a handle is a reference to state that lives elsewhere.

    Such handles are opened with the module also where they stand among a call's arguments. Where a
    handle is a value, an argument that is one is an input like any other pytree.
    """

    finds_closures: bool
    """Whether modules that a function reaches by closure are opened with the handle."""

    def matches(self, mdl: Any) -> bool:
        """Says whether `mdl` is a handle of this framework.

        The answer may depend on the type of `mdl` alone, and is kept for the type; functions are asked each time.
        """
        ...

    def initializing(self, mdl: Any) -> bool:
        """Says whether the framework is creating its variables now, when `fn` has to run as it is."""
        ...

    def channel(self, mdl: Any, name: str, initial: Any) -> Any:
        """Gives a channel that is a variable of the module, made of `initial` where the framework makes variables.

        Raises:
            ArgumentError: the module has none of this name, and variables can't be made here.
        """
        ...

    def lift(self, mdl: Any, grad_vars: Any, body: Body) -> Any:
        """Opens a boundary around `mdl`, runs `body(boundary) -> (out, updates)`, publishes the updates, returns `out`.

        Args:
            mdl: a handle, or a tuple, list or dict of handles.
            grad_vars: which variables the boundary gives as `variables`.
            body: gets the boundary. Its updates are those that `Boundary.call` returned, or `None` without a call.

        Raises:
            HandleError: the handle can't be opened here.
            ArgumentError: `grad_vars` means nothing to the framework, or selects nothing.
        """
        ...
