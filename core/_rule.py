"""Rules: backward passes as objects, written once and put on any module."""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, dataclass_transform, overload

import jax
from jaxtyping import PyTree

from ._arrays import Layout, Static, take_apart
from ._behaviour import Perturbed
from ._cotangents import Cotangents
from ._errors import ArgumentError
from ._inputs import has_parameter
from ._session import Outcome, Pullback, Session, without_refs
from ._transform import Options, transformed_call

T = TypeVar("T")


@overload
def static() -> Any: ...
@overload
def static(*, default: T) -> T: ...
def static(**options: Any) -> Any:
    """Declares a field of a `Rule` that is no array: a string, a function, a number that shapes depend on.

    Args:
        **options: those of `dataclasses.field`, such as `default`.

    Example:
        >>> class Keep(Rule):
        ...     digits: int = static(default=3)
        ...     def backward(self, call, y_bar):
        ...         return call.pullback(y_bar)
        >>> Keep().digits
        3
    """
    return dataclasses.field(metadata={"static": True}, **options)


@dataclasses.dataclass(frozen=True)
class Call:
    """What a rule sees of the module call whose pullback it replaces."""

    pullback: Pullback
    """The module's own pullback, linearised at the call; may be called any number of times."""

    variables: PyTree
    """The variables, in the framework's own containers."""

    inputs: tuple[Any, ...]
    """The positional inputs, with `None` for a `jax.Ref`, which can't leave the forward pass."""

    keywords: dict[str, Any]
    """The inputs that were passed by keyword and have no position."""

    output: Any
    """What the call returned."""

    perturbed: Cotangents
    """Booleans in the places of the cotangents: which arrays are differentiated at all, so that work can be spared."""


@dataclass_transform(frozen_default=True, field_specifiers=(static, dataclasses.field))
class Rule(abc.ABC):
    """A backward pass for module calls, the same in every framework.

    A subclass is a frozen dataclass and a pytree. Its fields may be traced values, a schedule or a
    learned scale among them, and enter the transform as arguments; fields declared with `static` do
    not. It defines `backward`.

    Example:
        >>> class Scale(Rule):
        ...     factor: float = 1.0
        ...     def backward(self, call, y_bar):
        ...         bar = call.pullback(y_bar)
        ...         return bar.replace(variables=jax.tree.map(lambda g: self.factor * g, bar.variables))
        >>> double = Scale(2.0).lift(lambda w, x: w * x)
        >>> float(jax.grad(double)(jax.numpy.array(3.0), 5.0))
        10.0
    """

    linear = True
    """Whether the cotangents are linear in `y_bar`, for `crossvjp.testing.check_rule`; a subclass says if not."""

    exact = False
    """Whether they are those of the function itself, computed in another way; for `check_rule` too."""

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        dataclasses.dataclass(frozen=True)(cls)
        jax.tree_util.register_pytree_with_keys(cls, _flatten_with_keys, _unflattener(cls), _flatten)

    @abc.abstractmethod
    def backward(self, call: Call, y_bar: Any) -> Any:
        """Gives the cotangents of a module call.

        A method with a further parameter `updates_bar=None` also gets the cotangents of the values
        that the call wrote into the framework's state, and answers for them; otherwise they keep
        the module's own derivative.

        Args:
            call: the call: its pullback, variables, inputs and output.
            y_bar: the cotangent of the output, shaped like it.

        Returns:
            A `Cotangents`, or the tuple `(*inputs_bar, variables_bar)`; `None` stands for zero.
        """

    def __call__(self, mdl: Any) -> Callable[..., Any]:
        """Puts the rule on a module that can be called.

        Args:
            mdl: a module, a bound method of one, or any other handle with a `__call__`.

        Returns:
            A function that calls the module under the rule.

        Raises:
            ArgumentError: `mdl` can't be called; use `lift` with a function of it.
        """
        if not callable(mdl):
            raise ArgumentError(
                f"{self!r} can be put on a module that can be called, but {type(mdl).__name__} can't. "
                "Use rule.lift(fn)(mdl, *args) with a function fn(mdl, *args)."
            )
        lifted = self.lift(_call)
        return lambda *args, **kwargs: lifted(mdl, *args, **kwargs)

    def lift(
        self, fn: Callable[..., Any], *, grad_vars: Any = "params", optimize_remat: bool = False
    ) -> Callable[..., Any]:
        """Puts the rule on a function of a module handle.

        Args:
            fn: a function `fn(mdl, *args, **kwargs)` for any handle, plain parameters among them.
            grad_vars: the variables that the rule acts on; as in `custom_vjp`. The others keep
                the module's own derivative.
            optimize_remat: as in `custom_vjp`.

        Returns:
            A function with the signature of `fn`.
        """
        options = Options(grad_vars, (), optimize_remat)

        @functools.wraps(fn)
        def under_rule(mdl: Any, *args: Any, **kwargs: Any) -> Any:
            return transformed_call(fn, _ByRule(self), options, mdl, args, kwargs)

        return under_rule


@overload
def rule(backward: Callable[..., Any]) -> Rule: ...
@overload
def rule(*, linear: bool = True, exact: bool = False) -> Callable[[Callable[..., Any]], Rule]: ...
def rule(backward: Callable[..., Any] | None = None, *, linear: bool = True, exact: bool = False) -> Any:
    """Makes a rule without fields of a function `backward(call, y_bar)`.

    Args:
        backward: as `Rule.backward`.
        linear: as `Rule.linear`.
        exact: as `Rule.exact`.

    Returns:
        The rule; without `backward`, a decorator that makes it.

    Example:
        >>> @rule(linear=False)
        ... def sign_gradient(call, y_bar):
        ...     bar = call.pullback(y_bar)
        ...     return bar.replace(variables=jax.tree.map(jax.numpy.sign, bar.variables))
        >>> float(jax.grad(sign_gradient.lift(lambda w, x: w * x))(jax.numpy.array(3.0), 5.0))
        1.0
    """
    if backward is None:
        return lambda backward: FunctionRule(backward, linear, exact)
    return FunctionRule(backward, linear, exact)


def _call(mdl: Any, *args: Any, **kwargs: Any) -> Any:
    return mdl(*args, **kwargs)


class _ByRule:
    """The behaviour of a wrapped call whose backward pass is a `Rule`."""

    symbolic_zeros = False
    forward_functions: Sequence[Any] = ()

    def __init__(self, the_rule: Rule):
        arrays, self._layout = take_apart(the_rule)
        self.arrays: Sequence[Any] = arrays
        self.backward_functions: Sequence[Any] = [the_rule.function] if isinstance(the_rule, FunctionRule) else []
        self.author = repr(the_rule)
        backward = the_rule.function if isinstance(the_rule, FunctionRule) else the_rule.backward
        self.asks_updates = has_parameter(backward, "updates_bar")

    def forward(
        self,
        session: Session,
        own: Sequence[Any],
        variables: Sequence[Any],
        context: Sequence[Any],
        arrays: Sequence[Any],
        perturbed: Perturbed,
    ) -> tuple[Outcome, Any]:
        outcome, pullback = session.linearize(variables, context, arrays, "inputs_first")
        facts = outcome.layout, perturbed
        return outcome, _Residuals(pullback, list(own), list(variables), without_refs(arrays), outcome.arrays, facts)

    def backward(self, session: Session, residuals: Any, y_bar: Any, updates_bar: Any) -> tuple[Any, ...]:
        inputs, keywords = session.inputs.rebuild(residuals.arrays, ())
        layout, perturbed = residuals.facts
        call = Call(
            residuals.pullback,
            jax.tree.unflatten(session.variables_def, residuals.variables),
            inputs,
            keywords,
            layout.fill(residuals.output),
            session.signature.build(perturbed.variables, perturbed.arrays, "inputs_first"),
        )
        backward = session.functions[0] if session.functions else self._layout.fill(residuals.own).backward
        asked = {"updates_bar": updates_bar} if self.asks_updates else {}
        result = backward(call, y_bar, **asked)
        return session.signature.expected().conform(result, "inputs_first", self.author)


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass
class _Residuals:
    """What a rule may touch; all but the pullback and the output are references to the call's arguments."""

    pullback: Pullback
    own: list[Any]
    variables: list[Any]
    arrays: list[Any]
    output: list[Any]
    facts: tuple[Layout, Perturbed]

    def tree_flatten(self) -> tuple[Any, Any]:
        return (self.pullback, self.own, self.variables, self.arrays, self.output), self.facts

    @classmethod
    def tree_unflatten(cls, facts: tuple[Layout, Perturbed], children: Any) -> _Residuals:
        pullback, own, variables, arrays, output = children
        return cls(pullback, own, variables, arrays, output, facts)


def _is_static(field: dataclasses.Field[Any]) -> bool:
    return bool(field.metadata.get("static", False))


def _flatten_with_keys(the_rule: Any) -> tuple[tuple[tuple[Any, Any], ...], Any]:
    fields = dataclasses.fields(the_rule)
    key = jax.tree_util.GetAttrKey
    data = tuple((key(field.name), getattr(the_rule, field.name)) for field in fields if not _is_static(field))
    return data, tuple(Static(getattr(the_rule, field.name)) for field in fields if _is_static(field))


def _flatten(the_rule: Any) -> tuple[tuple[Any, ...], Any]:
    data, statics = _flatten_with_keys(the_rule)
    return tuple(value for _, value in data), statics


def _unflattener(cls: type[Rule]) -> Callable[[Any, Any], Rule]:
    def unflatten(statics: Any, data: Any) -> Rule:
        self = object.__new__(cls)  # without the constructor: its checks are for users' values, not for tracers
        rest_static, rest_data = iter(statics), iter(data)
        for field in dataclasses.fields(cls):  # pyright: ignore[reportArgumentType]  made a dataclass above
            value = next(rest_static).value if _is_static(field) else next(rest_data)
            object.__setattr__(self, field.name, value)
        return self

    return unflatten


class FunctionRule(Rule):
    """A rule that is one function."""

    function: Callable[..., Any] = static()
    linear: bool = static(default=True)
    exact: bool = static(default=False)

    def backward(self, call: Call, y_bar: Any) -> Any:
        """Calls the function."""
        return self.function(call, y_bar)

    def __repr__(self) -> str:
        return getattr(self.function, "__name__", repr(self.function))
