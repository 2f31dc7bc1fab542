"""Rules: backward passes as objects, written once and put on any module."""

from __future__ import annotations

import abc
import dataclasses
import functools
import types
from collections.abc import Callable
from typing import Any, TypeVar, dataclass_transform, overload

import jax

from ._arrays import ArrayType, Printed, Static, take_apart
from ._by_rule import ByRule
from ._call import Call
from ._errors import ArgumentError
from ._registry import is_handle
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


@dataclass_transform(frozen_default=True, field_specifiers=(static, dataclasses.field))
class Rule(abc.ABC):
    """A backward pass for module calls, the same in every framework.

    A subclass is a frozen dataclass and a pytree. Its fields may be traced values, a schedule or a
    learned scale among them, and enter the transform as arguments; fields declared with `static` do
    not. It defines `backward`, and `forward` if it replaces the forward pass too.

    Only what the results of `backward` depend on is kept from the forward pass to the backward
    pass. To find that out, `backward` is traced once more, on types alone.

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

    symbolic_zeros = True
    """Whether `y_bar` has `None` where nothing depends on an output, as far as JAX knows it, or an array of zeros.

    `jax.tree.map` passes over `None`, and `call.pullback` takes it for zero. A rule that calculates
    with several outputs together says False. If no output has a cotangent, `backward` does not run.
    """

    pure = True
    """Whether its code depends on nothing but its fields and what the call offers, as in all functions that JAX traces.

    Calls that repeat within a program then share what JAX makes of the first ones. A rule that reads a flag, or counts
    its calls while it is traced, says False.
    """

    reads_names = True
    """Whether it may tell modules of one kind apart by the names of their variables.

    Haiku's variables have their module's name, so there a rule is traced for each of the calls that repeat, to see
    whether it does the same. One that says False is not.
    """

    needs_variables = False
    """Whether the rule is for variables, so that putting it on a module without any is an error."""

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        dataclasses.dataclass(frozen=True)(cls)
        jax.tree_util.register_pytree_with_keys(cls, _flatten_with_keys, _unflattener(cls), _flatten)

    def forward(self, call: Call) -> Any:
        """Computes the output in place of the module, if a subclass defines it.

        Args:
            call: the call: its variables and inputs, and ways to run the module on these or others.

        Returns:
            The output, like the module's own in structure, shapes and dtypes; or `(output, Residuals(...))`.
        """
        raise ArgumentError(f"{type(self).__name__} leaves the forward pass to the module.")

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

    def __call__(self, mdl: Any, *, key: Any = None) -> Callable[..., Any]:
        """Puts the rule on a module that can be called.

        Args:
            mdl: a module, a bound method of one, any other handle with a `__call__`, or a plain
                function of inputs.
            key: as in `lift`.

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
        if _is_plain(mdl):
            lifted = self.lift(lambda _, *args, **kwargs: mdl(*args, **kwargs), key=key)
            return functools.wraps(mdl)(lambda *args, **kwargs: lifted(None, *args, **kwargs))
        lifted = self.lift(_call, key=key)
        return lambda *args, **kwargs: lifted(mdl, *args, **kwargs)

    def lift(
        self,
        fn: Callable[..., Any],
        *,
        grad_vars: Any = "params",
        key: Any = None,
        optimize_remat: bool = False,
    ) -> Callable[..., Any]:
        """Puts the rule on a function of a module handle.

        Args:
            fn: a function `fn(mdl, *args, **kwargs)` for any handle: plain parameters, or `None`
                where there are no variables.
            grad_vars: the variables that the rule acts on; as in `custom_vjp`. The others keep
                the module's own derivative.
            key: a PRNG key for rules that draw random numbers, which find it in `call.key`.
            optimize_remat: as in `custom_vjp`.

        Returns:
            A function with the signature of `fn`.

        Raises:
            ArgumentError: called on a module without variables, where the rule is for variables.
        """
        options = Options(grad_vars, (), optimize_remat)

        @functools.wraps(fn)
        def under_rule(mdl: Any, *args: Any, **kwargs: Any) -> Any:
            return transformed_call(fn, ByRule(self, key), options, mdl, args, kwargs)

        return under_rule

    @property
    def replaces_forward(self) -> bool:
        """Whether the rule has a forward pass of its own."""
        return type(self).forward is not Rule.forward

    @property
    def own_backward(self) -> Callable[..., Any]:
        """What is called for the backward pass."""
        return self.backward

    def data_fields(self) -> list[str]:
        """Lists the names of the fields that may hold arrays."""
        return list(_field_names(type(self))[0])

    def described(self) -> str:
        """Gives the rule as errors print it, with types in the places of arrays."""
        arrays, layout = take_apart(self)
        return repr(layout.fill(Printed(ArrayType.of(array)) for array in arrays))


def _is_plain(mdl: Any) -> bool:
    """Says whether a callable is a function of inputs alone, and not a module's."""
    return not isinstance(mdl, types.MethodType) and not is_handle(mdl)


def _call(mdl: Any, *args: Any, **kwargs: Any) -> Any:
    return mdl(*args, **kwargs)


def _is_static(field: dataclasses.Field[Any]) -> bool:
    return bool(field.metadata.get("static", False))


@functools.cache
def _field_names(cls: type[Rule]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Lists the names of the fields that may hold arrays, and those of the others.

    Kept by class: each call takes its rule apart, and dataclasses search their fields anew each time.
    """
    fields: Any = dataclasses.fields(cls)  # pyright: ignore[reportArgumentType]  made a dataclass
    data, statics = (tuple(field.name for field in fields if _is_static(field) is kind) for kind in (False, True))
    return data, statics


def _flatten_with_keys(the_rule: Any) -> tuple[tuple[tuple[Any, Any], ...], Any]:
    data, statics = _flatten(the_rule)
    keys = map(jax.tree_util.GetAttrKey, _field_names(type(the_rule))[0])
    return tuple(zip(keys, data, strict=True)), statics


def _flatten(the_rule: Any) -> tuple[tuple[Any, ...], Any]:
    data, statics = _field_names(type(the_rule))
    return tuple(getattr(the_rule, name) for name in data), tuple(Static(getattr(the_rule, name)) for name in statics)


def _unflattener(cls: type[Rule]) -> Callable[[Any, Any], Rule]:
    def unflatten(statics: Any, data: Any) -> Rule:
        self = object.__new__(cls)  # without the constructor: its checks are for users' values, not for tracers
        for names, values in zip(_field_names(cls), (data, [static.value for static in statics]), strict=True):
            for name, value in zip(names, values, strict=True):
                object.__setattr__(self, name, value)
        return self

    return unflatten
