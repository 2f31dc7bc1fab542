"""`rule`: a rule that is one function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

from ._call import Call
from ._rule import Rule, static


@overload
def rule(
    backward: Callable[..., Any],
    *,
    linear: bool = True,
    exact: bool = False,
    symbolic_zeros: bool = True,
    pure: bool = True,
    reads_names: bool = True,
) -> Rule: ...
@overload
def rule(
    *,
    linear: bool = True,
    exact: bool = False,
    symbolic_zeros: bool = True,
    pure: bool = True,
    reads_names: bool = True,
) -> Callable[[Callable[..., Any]], Rule]: ...
def rule(
    backward: Callable[..., Any] | None = None,
    *,
    linear: bool = True,
    exact: bool = False,
    symbolic_zeros: bool = True,
    pure: bool = True,
    reads_names: bool = True,
) -> Any:
    """Makes a rule without fields of a function `backward(call, y_bar)`.

    Args:
        backward: as `Rule.backward`.
        linear: as `Rule.linear`.
        exact: as `Rule.exact`.
        symbolic_zeros: as `Rule.symbolic_zeros`.
        pure: as `Rule.pure`.
        reads_names: as `Rule.reads_names`.

    Returns:
        The rule; without `backward`, a decorator that makes it.

    Example:
        >>> import jax
        >>> @rule(linear=False)
        ... def sign_gradient(call, y_bar):
        ...     bar = call.pullback(y_bar)
        ...     return bar.replace(variables=jax.tree.map(jax.numpy.sign, bar.variables))
        >>> float(jax.grad(sign_gradient.lift(lambda w, x: w * x))(jax.numpy.array(3.0), 5.0))
        1.0
    """
    if backward is None:
        return lambda backward: FunctionRule(backward, linear, exact, symbolic_zeros, pure, reads_names)
    return FunctionRule(backward, linear, exact, symbolic_zeros, pure, reads_names)


class FunctionRule(Rule):
    """A rule that is one function."""

    function: Callable[..., Any] = static()
    linear: bool = static(default=True)
    exact: bool = static(default=False)
    symbolic_zeros: bool = static(default=True)
    pure: bool = static(default=True)
    reads_names: bool = static(default=True)

    def backward(self, call: Call, y_bar: Any) -> Any:
        """Calls the function."""
        return self.function(call, y_bar)

    @property
    def own_backward(self) -> Callable[..., Any]:
        """The function, whose parameters say what it asks for."""
        return self.function

    def __repr__(self) -> str:
        return getattr(self.function, "__name__", repr(self.function))
