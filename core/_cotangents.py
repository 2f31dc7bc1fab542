"""`Cotangents`: what a pullback returns, in an order that can't be mistaken."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import jax

from ._errors import ArgumentError

Order: TypeAlias = Literal["inputs_first", "variables_first"]


class Cotangents(tuple[Any, ...]):
    """The cotangents of a module call: a tuple with names.

    It unpacks as the documentation of `flax.linen.custom_vjp` has it, `*inputs_bar, variables_bar`.
    Code that reads `.inputs` and `.variables` does not depend on any order.

    Args:
        inputs: one cotangent for each positional input, each shaped like its input. `None` stands
            for zero, whole or in part, and for leaves that have no gradient.
        variables: the cotangent of the variables, shaped like them.
        keywords: the cotangents of inputs that were passed by keyword and have no position.
        fields: the cotangents of a rule's own fields, by name; see `with_fields`.
        order: `"variables_first"` unpacks as `variables_bar, *inputs_bar`, as today's Flax does.

    Example:
        >>> bar = Cotangents((1.0,), {"w": 2.0})
        >>> x_bar, variables_bar = bar
        >>> bar.replace(variables={"w": 3.0}).variables
        {'w': 3.0}
    """

    inputs: tuple[Any, ...]
    variables: Any
    keywords: Mapping[str, Any]
    fields: Mapping[str, Any]
    order: Order

    def __new__(
        cls,
        inputs: tuple[Any, ...] | list[Any],
        variables: Any,
        *,
        keywords: Mapping[str, Any] | None = None,
        fields: Mapping[str, Any] | None = None,
        order: Order = "inputs_first",
    ) -> Cotangents:
        """Builds the tuple in the given order."""
        if not isinstance(inputs, tuple | list):
            raise ArgumentError(
                f"`inputs` must be a tuple with one cotangent for each input, but is {type(inputs).__name__}. "
                "Write (x_bar,) for a single input."
            )
        check_order(order)
        ordered = (*inputs, variables) if order == "inputs_first" else (variables, *inputs)
        self = super().__new__(cls, ordered)
        self.inputs = tuple(inputs)
        self.variables = variables
        self.keywords = dict(keywords or {})
        self.fields = dict(fields or {})
        self.order = order
        return self

    def replace(self, **changes: Any) -> Cotangents:
        """Returns a copy with `inputs`, `variables`, `keywords` or `fields` replaced.

        Raises:
            ArgumentError: another name is given.
        """
        parts = {name: getattr(self, name) for name in ("inputs", "variables", "keywords", "fields")}
        unknown = set(changes) - set(parts)
        if unknown:
            raise ArgumentError(
                "`replace` takes `inputs`, `variables`, `keywords` and `fields`, but got "
                f"{', '.join(sorted(unknown))}. For a field of the rule use with_fields({min(unknown)}=...)."
            )
        parts |= changes
        return Cotangents(parts.pop("inputs"), parts.pop("variables"), order=self.order, **parts)

    def with_fields(self, **cotangents: Any) -> Cotangents:
        """Returns a copy that has cotangents of the rule's own fields too: of a learned scale, or a channel.

        Args:
            **cotangents: for a field, something shaped like it; fields that are not named get zero.
        """
        return self.replace(fields={**self.fields, **cotangents})

    def __getnewargs_ex__(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (self.inputs, self.variables), {"keywords": self.keywords, "fields": self.fields, "order": self.order}

    def __repr__(self) -> str:
        keywords = f", keywords={dict(self.keywords)!r}" if self.keywords else ""
        fields = f", fields={dict(self.fields)!r}" if self.fields else ""
        return f"Cotangents(inputs={self.inputs!r}, variables={self.variables!r}{keywords}{fields})"


def check_order(order: Any) -> None:
    """Refuses an unknown order of cotangents.

    Raises:
        ArgumentError: `order` is neither of the two words.
    """
    if order not in ("inputs_first", "variables_first"):
        raise ArgumentError(f"`order` must be 'inputs_first' or 'variables_first', but is {order!r}.")


_PARTS = ("inputs", "variables", "keywords", "fields")


def _flatten(bar: Cotangents) -> tuple[tuple[Any, ...], Order]:
    return tuple(getattr(bar, name) for name in _PARTS), bar.order


def _flatten_with_keys(bar: Cotangents) -> tuple[tuple[Any, ...], Order]:
    return tuple((jax.tree_util.GetAttrKey(name), getattr(bar, name)) for name in _PARTS), bar.order


def _unflatten(order: Order, children: Any) -> Cotangents:
    inputs, variables, keywords, fields = children
    each = inputs if isinstance(inputs, tuple) else (inputs,)  # JAX may put a placeholder for the whole tuple
    self = tuple.__new__(Cotangents, (*each, variables) if order == "inputs_first" else (variables, *each))
    self.inputs, self.variables, self.keywords, self.fields = inputs, variables, keywords, fields
    self.order = order
    return self


jax.tree_util.register_pytree_with_keys(Cotangents, _flatten_with_keys, _unflatten, _flatten)
