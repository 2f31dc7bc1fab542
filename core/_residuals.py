"""`Residuals`: what a rule's own forward pass keeps for its backward pass, by name."""

from __future__ import annotations

from typing import Any

import jax


class Residuals:
    """What `Rule.forward` keeps beside the output, and `Rule.backward` finds in `call.residuals`.

    Args:
        **named: any pytrees; leaves that are no arrays pass as they are.

    Example:
        >>> Residuals(scale=2.0).scale
        2.0
    """

    def __init__(self, **named: Any):
        self.__dict__.update(named)

    def __getattr__(self, name: str) -> Any:
        kept = ", ".join(sorted(self.__dict__)) or "nothing"
        raise AttributeError(f"the rule's forward pass kept {kept}, but no {name!r}: return (y, Residuals({name}=...))")

    def __repr__(self) -> str:
        return f"Residuals({', '.join(f'{name}={value!r}' for name, value in self.__dict__.items())})"


def _flatten(residuals: Residuals) -> tuple[tuple[Any, ...], tuple[str, ...]]:
    return tuple(residuals.__dict__.values()), tuple(residuals.__dict__)


def _unflatten(names: tuple[str, ...], values: Any) -> Residuals:
    return Residuals(**dict(zip(names, values, strict=True)))


jax.tree_util.register_pytree_node(Residuals, _flatten, _unflatten)


def with_residuals(result: Any) -> tuple[Any, Residuals]:
    """Reads what a rule's forward pass returned: the output, or the output and its `Residuals`."""
    is_pair = isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Residuals)
    return result if is_pair else (result, Residuals())
