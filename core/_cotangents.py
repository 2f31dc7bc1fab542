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
    order: Order

    def __new__(
        cls,
        inputs: tuple[Any, ...] | list[Any],
        variables: Any,
        *,
        keywords: Mapping[str, Any] | None = None,
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
        self.order = order
        return self

    def replace(self, **changes: Any) -> Cotangents:
        """Returns a copy with `inputs`, `variables` or `keywords` replaced.

        Raises:
            ArgumentError: another name is given.
        """
        unknown = set(changes) - {"inputs", "variables", "keywords"}
        if unknown:
            raise ArgumentError(
                f"`replace` takes `inputs`, `variables` and `keywords`, but got {', '.join(sorted(unknown))}."
            )
        fields = {"inputs": self.inputs, "variables": self.variables, "keywords": self.keywords, **changes}
        return Cotangents(fields["inputs"], fields["variables"], keywords=fields["keywords"], order=self.order)

    def __getnewargs_ex__(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (self.inputs, self.variables), {"keywords": self.keywords, "order": self.order}

    def __repr__(self) -> str:
        keywords = f", keywords={dict(self.keywords)!r}" if self.keywords else ""
        return f"Cotangents(inputs={self.inputs!r}, variables={self.variables!r}{keywords})"


def check_order(order: Any) -> None:
    """Refuses an unknown order of cotangents.

    Raises:
        ArgumentError: `order` is neither of the two words.
    """
    if order not in ("inputs_first", "variables_first"):
        raise ArgumentError(f"`order` must be 'inputs_first' or 'variables_first', but is {order!r}.")


def _flatten(bar: Cotangents) -> tuple[tuple[Any, ...], Order]:
    return (bar.inputs, bar.variables, bar.keywords), bar.order


def _flatten_with_keys(bar: Cotangents) -> tuple[tuple[Any, ...], Order]:
    key = jax.tree_util.GetAttrKey
    return ((key("inputs"), bar.inputs), (key("variables"), bar.variables), (key("keywords"), bar.keywords)), bar.order


def _unflatten(order: Order, children: Any) -> Cotangents:
    inputs, variables, keywords = children
    each = inputs if isinstance(inputs, tuple) else (inputs,)  # JAX may put a placeholder for the whole tuple
    self = tuple.__new__(Cotangents, (*each, variables) if order == "inputs_first" else (variables, *each))
    self.inputs, self.variables, self.keywords, self.order = inputs, variables, keywords, order
    return self


jax.tree_util.register_pytree_with_keys(Cotangents, _flatten_with_keys, _unflatten, _flatten)
