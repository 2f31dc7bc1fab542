"""Channels: values that leave the backward pass, as the cotangents of a rule's fields.

A cotangent adds up: what two uses, a loop or a batch send is summed, and what nobody sends is zero. So a
channel carries a count beside its value, from which `settle` tells what was meant.
"""

from __future__ import annotations

import abc
import functools
from typing import TYPE_CHECKING, Any, Self

import jax
import jax.numpy as jnp

from ._arrays import ArrayType, is_inexact, is_ref
from ._errors import ArgumentError
from ._paths import leaves_with_paths, show

if TYPE_CHECKING:
    from jaxtyping import PyTree


def _flatten_with_keys(channel: Any) -> tuple[tuple[tuple[Any, Any], ...], None]:
    key = jax.tree_util.GetAttrKey
    return ((key("value"), channel.value), (key("count"), channel.count)), None


def _flatten(channel: Any) -> tuple[tuple[Any, Any], None]:
    return (channel.value, channel.count), None


class Channel(abc.ABC):
    """A way out of the backward pass: a field of a rule, whose cotangent is what the rule sends.

    It is a pytree of `value` and `count`, so it may be a variable of any framework. What was sent is
    found where its gradient is: in the result of `jax.grad` with respect to the channel.
    """

    value: PyTree
    """What was sent, or the state that is kept: a pytree of floating arrays."""

    count: Any
    """How many sent: float32[], or with the leading axis of a `Stack`."""

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        jax.tree_util.register_pytree_with_keys(cls, _flatten_with_keys, lambda _, parts: cls._of(*parts), _flatten)

    @classmethod
    def _of(cls, value: Any, count: Any) -> Self:
        channel = object.__new__(cls)
        channel.value, channel.count = value, count
        return channel

    def emit(self, value: PyTree) -> Self:
        """Makes the cotangent that sends a value: `bar.with_fields(name=self.name.emit(value))`.

        Args:
            value: shaped like `self.value`; it is cast to the dtypes there.

        Returns:
            The value with the count one. If the channel holds mutable arrays, these are written
            instead, and what is returned has no cotangent.

        Raises:
            ArgumentError: `value` has another structure or another shape.
        """
        given, count = alike(_conform(self.value, value), self.count)
        if not any(map(is_ref, jax.tree.leaves(self))):
            return self._of(jax.tree.map(lambda leaf, old: leaf.astype(old.dtype), given, self.value), count)
        self._write(given)
        return self._of(jax.tree.map(lambda leaf: None, given), None)

    @abc.abstractmethod
    def settle(self, bar: Any) -> Self:
        """Gives the channel after a backward pass.

        Args:
            bar: its gradient.
        """

    @abc.abstractmethod
    def _write(self, value: PyTree) -> None:
        """Writes into the mutable arrays."""

    def to_refs(self) -> Self:
        """Gives the channel with mutable arrays, `jax.Ref`, which a rule writes at once.

        Nothing has to be differentiated then, and no gradient has to be collected. It works eagerly and under jit,
        scan and remat; under `vmap` JAX allows it only where the channel itself is batched.
        """
        return jax.tree.map(lambda leaf: jax.new_ref(jnp.array(leaf)), self)

    def to_arrays(self) -> Self:
        """Reads the mutable arrays."""
        return jax.tree.map(lambda leaf: leaf[...] if is_ref(leaf) else leaf, self)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.value!r}, count={self.count!r})"


class Sum(Channel):
    """A channel that adds up what is sent.

    Args:
        like: the shape of the value, or a pytree of floating arrays shaped like it. A scalar by default.

    Raises:
        ArgumentError: `like` has no leaf, or one of another type.

    Example:
        >>> import crossvjp as cv
        >>> class Probe(cv.Rule):
        ...     norm: cv.Sum
        ...     def backward(self, call, y_bar):
        ...         return call.pullback(y_bar).with_fields(norm=self.norm.emit(jnp.linalg.norm(y_bar)))
        >>> loss = lambda probe, w: jnp.sum(probe.lift(lambda w, x: w * x)(w, jnp.ones(4)))
        >>> float(jax.grad(loss)(Probe(cv.Sum()), jnp.ones(4)).norm.value)
        2.0
    """

    def __init__(self, like: Any = ()):
        self.value, self.count = _zeros(like, "like"), jnp.zeros(())

    def settle(self, bar: Any) -> Self:
        """Gives what was sent in this backward pass: the sum, and the count."""
        return self._of(bar.value, bar.count)

    @property
    def mean(self) -> PyTree:
        """The mean of what was sent; zero if nothing was."""
        return jax.tree.map(lambda leaf: leaf / jnp.maximum(self.count, 1).astype(leaf.dtype), self.value)

    def _write(self, value: PyTree) -> None:
        jax.tree.map(lambda ref, leaf: ref.__setitem__(..., ref[...] + leaf.astype(ref.dtype)), self.value, value)
        self.count[...] += 1


class Overwrite(Channel):
    """A channel that keeps a state: what is sent replaces it, and if nothing is sent it stays.

    Of several that send, in two uses of one rule, a loop or a batch, the mean is kept.

    Args:
        value: the state: a pytree of floating arrays.

    Raises:
        ArgumentError: `value` has no leaf, or one that is not floating: JAX has no cotangents for integers.

    Example:
        >>> state = Overwrite(jnp.array(3.0))
        >>> float(state.settle(state.emit(jnp.array(5.0))).value)
        5.0
    """

    def __init__(self, value: PyTree):
        self.value, self.count = _checked(value, "value"), jnp.zeros(())

    def settle(self, bar: Any) -> Self:
        """Gives the new state, or the old one where nothing was sent."""

        def settled(old: Any, new: Any) -> Any:
            count = bar.count.reshape(bar.count.shape + (1,) * (new.ndim - bar.count.ndim))
            return jnp.where(count > 0, (new / jnp.maximum(count, 1).astype(new.dtype)), old)

        return self._of(jax.tree.map(settled, self.value, bar.value), jnp.zeros_like(self.count))

    def _write(self, value: PyTree) -> None:
        jax.tree.map(lambda ref, leaf: ref.__setitem__(..., leaf.astype(ref.dtype)), self.value, value)


class Stack(Channel):
    """A channel that keeps what is sent apart: one place for each step of a scan or each lane of a batch.

    Hand it to `jax.lax.scan` among the scanned inputs, or to `jax.vmap` as a batched one, and put the
    part that arrives there into the rule.

    Args:
        length: the number of places, >= 1.
        like: the shape of one value, or a pytree of floating arrays shaped like it. A scalar by default.

    Raises:
        ArgumentError: `length` is less than one, or `like` as in `Sum`.
    """

    def __init__(self, length: int, like: Any = ()):
        if isinstance(length, bool) or not isinstance(length, int) or length < 1:
            raise ArgumentError(f"`length` must be an integer >= 1, but is {length!r}.")
        single = _zeros(like, "like")
        self.value = jax.tree.map(lambda leaf: jnp.zeros((length, *leaf.shape), leaf.dtype), single)
        self.count = jnp.zeros((length,))

    def settle(self, bar: Any) -> Self:
        """Gives what was sent in this backward pass, place by place."""
        return self._of(bar.value, bar.count)

    def _write(self, value: PyTree) -> None:
        raise ArgumentError("A Stack can't hold mutable arrays: it has no place of its own for what is sent next.")

    def to_refs(self) -> Self:
        """Refuses: the places of a stack are told apart by the transform.

        Raises:
            ArgumentError: always.
        """
        raise ArgumentError(
            "The places of a Stack are told apart by scan or vmap, which a mutable array is not part of. Use a Sum or "
            "an Overwrite of mutable arrays, or the gradient of the Stack."
        )


def _zeros(like: Any, name: str) -> Any:
    if isinstance(like, tuple) and all(isinstance(size, int) and not isinstance(size, bool) for size in like):
        return jnp.zeros(like)
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), _checked(like, name))


def _checked(tree: Any, name: str) -> Any:
    """Refuses what a cotangent can't carry."""
    if not jax.tree.leaves(tree):
        raise ArgumentError(f"`{name}` of a channel must have a floating array, but has no leaf.")
    for path, leaf in leaves_with_paths(tree):
        floating = isinstance(leaf, float | jax.ShapeDtypeStruct) or is_inexact(leaf)
        if not floating or not jnp.issubdtype(getattr(leaf, "dtype", float), jnp.inexact):
            came = str(ArrayType.of(leaf)) if hasattr(leaf, "dtype") and hasattr(leaf, "shape") else repr(leaf)
            raise ArgumentError(
                f"`{name}` of a channel must be of floating arrays, but is {came} at {show(path)}: what leaves the "
                "backward pass is a cotangent, and integers have none. Carry it as a float."
            )
    return jax.tree.map(lambda leaf: leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jnp.asarray(leaf), tree)


def _conform(expected: Any, value: Any) -> Any:
    """Checks what is sent; returns it as arrays."""
    if jax.tree.structure(value) != jax.tree.structure(expected):
        raise ArgumentError(
            f"A channel of {jax.tree.structure(expected)} can't send {jax.tree.structure(value)}: "
            "the structures must be the same."
        )
    leaves = zip(leaves_with_paths(expected), jax.tree.leaves(value), strict=True)
    for (path, old), leaf in leaves:
        if jnp.shape(leaf) != tuple(old.shape):
            raise ArgumentError(
                f"A channel must send {ArrayType(tuple(old.shape), old.dtype)} at {show(path)}, but got shape "
                f"{list(jnp.shape(leaf))}."
            )
    return jax.tree.map(jnp.asarray, value)


def alike(value: Any, count: Any) -> tuple[Any, Any]:
    """Gives the value with all of its leaves batched alike, and the count of one batched as they are.

    JAX sums a cotangent over lanes where it is batched, and counts it once where it is the same in all.
    """
    some = [jnp.ravel(leaf)[:1].sum() for leaf in jax.tree.leaves(value)]
    true = functools.reduce(jnp.logical_or, [leaf == leaf for leaf in some], jnp.array(True)) | True
    chosen = jax.tree.map(lambda leaf: jnp.where(true, leaf, leaf), value)
    return chosen, jnp.full(jnp.shape(count), true.astype(jnp.float32))
