"""Handles for transformed Haiku functions outside of any transform: the pair, bound to its arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import haiku as hk
import jax

from crossvjp import HandleError
from crossvjp.adapters._haiku_models import takes_rng
from crossvjp.adapters.pytree import ValueBoundary
from crossvjp.extend import Body, Predicate, held_channel, predicate, unknown_choice


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BoundTransformed:
    """A transformed function with its parameters: a value, like any pytree, that can be called."""

    params: Any
    state: Any
    rng: Any
    apply: Callable[..., Any] = dataclasses.field(metadata={"static": True})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Applies the function; with state, it returns `(out, new_state)` as `apply` does."""
        if self.state is None:
            return self.apply(self.params, self.rng, *args, **kwargs)
        return self.apply(self.params, self.state, self.rng, *args, **kwargs)


@dataclasses.dataclass(frozen=True)
class Keyless:
    """The `apply` of `hk.without_apply_rng`, called as every other."""

    apply: Callable[..., Any]
    has_state: bool

    def __call__(self, params: Any, *rest: Any, **kwargs: Any) -> Any:
        """Leaves the key out."""
        state, (_, *args) = (rest[:1], rest[1:]) if self.has_state else ((), rest)
        return self.apply(params, *state, *args, **kwargs)


def bind(
    transformed: hk.Transformed | hk.TransformedWithState, params: Any, state: Any = None, *, rng: Any = None
) -> BoundTransformed:
    """Makes a module handle of a pair `(init, apply)` and its arrays, for use outside of a transform.

    Args:
        transformed: what `hk.transform` or `hk.transform_with_state` returned.
        params: the parameters.
        state: the state; for `hk.TransformedWithState`, and only there.
        rng: the key that `apply` gets, or `None`.

    Returns:
        A callable pytree. `handle(*args)` is `transformed.apply(params, [state,] rng, *args)`.

    Raises:
        HandleError: the state is missing, or there is one where none belongs.
    """
    needs_state = isinstance(transformed, hk.TransformedWithState)
    if needs_state != (state is not None):
        raise HandleError(
            f"`bind` of a {type(transformed).__name__} takes "
            + ("`params` and `state`, but got no state." if needs_state else "`params` alone, but got a state too.")
        )
    apply: Any = transformed.apply
    return BoundTransformed(
        params, state, rng, apply if takes_rng(transformed, 1 + needs_state) else Keyless(apply, needs_state)
    )


class TransformedAdapter:
    """Opens bound transformed functions; refuses those without parameters. Collections are "params" and "state"."""

    name = "Haiku (transformed)"
    by_reference = False
    finds_closures = False

    def matches(self, mdl: Any) -> bool:
        return isinstance(mdl, BoundTransformed | hk.Transformed | hk.TransformedWithState)

    def initializing(self, mdl: Any) -> bool:
        return False

    def channel(self, mdl: Any, name: str, initial: Any) -> Any:
        return held_channel(mdl, name)

    def lift(self, mdl: Any, grad_vars: Any, body: Body) -> Any:
        for part in jax.tree.leaves(mdl, is_leaf=self.matches):
            if isinstance(part, hk.Transformed | hk.TransformedWithState):
                raise HandleError(
                    f"A {type(part).__name__} has no parameters of its own. Bind it to them, "
                    "`crossvjp.adapters.haiku.bind(transformed, params)`, and use that as the handle."
                )

        def named(word: Any) -> Predicate:
            if word in ("params", "state"):
                return lambda path, leaf: word in path
            raise unknown_choice(word, "'params' or 'state'")

        return body(ValueBoundary(mdl, predicate(grad_vars, named), grad_vars))[0]
