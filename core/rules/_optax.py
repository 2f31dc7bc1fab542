"""`Optax`: any gradient transformation of optax as a backward rule."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from .._channels import Overwrite
from .._errors import ArgumentError
from .._rule import Rule, static


class Optax(Rule):
    """Gives the variables what a gradient transformation of optax makes of their cotangent.

        variables_bar, state' = tx.update(g, state, w),   g = the module's own cotangent of its variables w.

    So a transformation acts on one module, in its backward pass, whatever optimiser runs outside.
    What an optimiser returns is a step to be added, `optax.apply_updates(params, grads)`.

    A transformation that keeps a state needs one, from `Optax.of`: channels that leave the backward
    pass as the cotangent of the rule. `cv.settle(rule, grads_of_the_rule)` puts the new state into
    the rule for the next step. Used twice in one loss, each use starts from the same state, and
    the new one is the mean of theirs. Counted as not linear in `y_bar`.

    Args:
        tx: anything with optax's `init(params)` and `update(updates, state, params)`.
        state: what `Optax.of` makes, or `None` for a transformation without a state, such as a clip.

    Raises:
        ArgumentError: `tx` keeps a state, and none was given; in the backward pass.

    Reference:
        DeepMind et al. (2020), https://github.com/google-deepmind/optax.
    """

    linear = False
    needs_variables = True
    tx: Any = static()
    state: Any = None

    @classmethod
    def of(cls, tx: Any, variables: Any) -> Optax:
        """Makes the rule with the transformation's first state.

        Args:
            tx: as above.
            variables: those of the module, in the framework's own containers: `cv.variables(mdl)`. A
                state that is shaped like them fits modules of this framework alone.

        Example:
            >>> import crossvjp as cv, optax
            >>> params = {"w": jnp.array([3.0, 4.0])}
            >>> rule = Optax.of(optax.sgd(0.1, momentum=0.9), cv.variables(params))
            >>> def loss(params, rule):
            ...     return rule.lift(lambda p: jnp.sum(p["w"] ** 2))(params)
            >>> for _ in range(2):
            ...     grads, state = jax.grad(loss, argnums=(0, 1))(params, rule)
            ...     params, (rule, _) = optax.apply_updates(params, grads), cv.settle(rule, state)
            >>> [round(float(w), 3) for w in params["w"]]
            [1.38, 1.84]
        """
        return cls(tx, jax.tree.map(_Kept.of, tx.init(variables)))

    def current(self) -> Any:
        """Gives the state as optax has it, for a look at it or a checkpoint."""
        return jax.tree.map(lambda kept: kept.value(), self.state, is_leaf=_is_kept)

    def backward(self, call, y_bar):
        """Updates, and sends the new state out."""
        bar = call.pullback(y_bar)
        state = self.tx.init(call.variables) if self.state is None else self.current()
        if self.state is None and jax.tree.leaves(state):
            raise ArgumentError(
                f"{self.described()} keeps a state, but was given none. Make the rule by Optax.of(tx, variables), with "
                "the variables of the module, such as crossvjp.variables(mdl)."
            )
        steps, state = self.tx.update(bar.variables, state, call.variables)
        bar = bar.replace(variables=steps)
        if self.state is None:
            return bar
        return bar.with_fields(state=jax.tree.map(_Kept.emit, self.state, state, is_leaf=_is_kept))


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class _Kept:
    """One array of a state in a channel of its own, since under `vmap` some may be the same in all lanes."""

    channel: Overwrite
    dtype: Any
    key_impl: Any  # how a key is made of its numbers; `None` for other arrays

    @classmethod
    def of(cls, array: Any) -> _Kept:
        array = jnp.asarray(array)
        is_key = jnp.issubdtype(array.dtype, jax.dtypes.prng_key)
        numbers = jax.random.key_data(array) if is_key else array
        return cls(Overwrite(_as_floats(numbers)), numbers.dtype, jax.random.key_impl(array) if is_key else None)

    def value(self) -> Any:
        numbers = _from_floats(self.channel.value, self.dtype)
        return numbers if self.key_impl is None else jax.random.wrap_key_data(numbers, impl=self.key_impl)

    def emit(self, array: Any) -> _Kept:
        numbers = jnp.asarray(array) if self.key_impl is None else jax.random.key_data(array)
        if not jnp.issubdtype(self.dtype, jnp.inexact):
            numbers = numbers.astype(self.dtype)
        return _Kept(self.channel.emit(_as_floats(numbers)), self.dtype, self.key_impl)

    def tree_flatten_with_keys(self) -> tuple[Any, Any]:
        return ((jax.tree_util.GetAttrKey("channel"), self.channel),), (self.dtype, self.key_impl)

    @classmethod
    def tree_unflatten(cls, statics: Any, children: Any) -> _Kept:
        (channel,) = children
        return cls(channel, *statics)


def _as_floats(array: Any) -> Any:
    """Gives the floats that stand for an array: cotangents can't be integers, so two bytes go in one float, exactly."""
    if jnp.issubdtype(array.dtype, jnp.inexact):
        return array
    if array.dtype.itemsize > 2:
        array = jax.lax.bitcast_convert_type(array, jnp.uint16)
    return array.astype(jnp.float32)


def _from_floats(floats: Any, dtype: Any) -> Any:
    if jnp.issubdtype(dtype, jnp.inexact):
        return floats
    whole = jnp.round(floats)
    return jax.lax.bitcast_convert_type(whole.astype(jnp.uint16), dtype) if dtype.itemsize > 2 else whole.astype(dtype)


def _is_kept(node: Any) -> bool:
    return isinstance(node, _Kept)
