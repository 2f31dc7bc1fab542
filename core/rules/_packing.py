"""`PackResiduals`: what the module's pullback keeps of the forward pass, in fewer bits."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from .._checks import at_least
from .._errors import ArgumentError
from .._residuals import Residuals
from .._rule import Rule, static
from ._trees import wide


class PackResiduals(Rule):
    r"""Keeps the residuals of the module's pullback in fewer bits, and pulls back with what comes out of these.

        kept:      q = floor((x - min) / step + noise) for each number x that the pullback keeps,   noise from [0, 1),
                   step = (max - min) / (2^bits - 1),   min and max over a group of numbers
        backward:  the module's own pullback with min + step q in the place of x

    For 8, 4 and 2 bits the rounding is stochastic and needs a `key`; the gradient is then right on average wherever the
    pullback is linear in each residual by itself. For 16 bits, x is rounded to bfloat16, without a key. The variables
    themselves, integers, booleans and arrays smaller than a group are kept as they are, and so is the forward pass.
    Second derivatives lack what goes through packed numbers. Eagerly, a call that nobody differentiates packs too.

    Args:
        bits: 16, 8, 4 or 2, of each number kept.
        group: how many numbers share `min` and `step`, which take 8 bytes; a multiple of 4.

    Raises:
        ArgumentError: `bits` or `group` is none of these.

    Reference:
        Chen et al. (2021), ActNN, arXiv:2104.14129.
    """

    bits: int = static(default=8)
    group: int = static(default=256)

    def __post_init__(self) -> None:
        if self.bits not in (16, 8, 4, 2):
            raise ArgumentError(f"`bits` of {self!r} must be 16, 8, 4 or 2.")
        at_least(self, "group", 4)
        if self.group % 4:
            raise ArgumentError(f"`group` of {self!r} must be a multiple of 4.")

    def forward(self, call: Any) -> Any:
        """Packs what the pullback holds."""
        y, pullback = call.vjp_at(call.variables, *call.inputs, **call.keywords)
        leaves, treedef = jax.tree.flatten(pullback)
        by_reference = set(map(id, jax.tree.leaves(call.variables)))
        able = [id(leaf) not in by_reference and self._is_packable(leaf) for leaf in leaves]
        keys = iter(jax.random.split(call.key, sum(able)) if self.bits < 16 and any(able) else [None] * sum(able))
        packed = [self._pack(leaf, next(keys)) if ok else leaf for leaf, ok in zip(leaves, able, strict=True)]
        return y, Residuals(pullback=jax.tree.unflatten(treedef, packed))

    def backward(self, call: Any, y_bar: Any) -> Any:
        """Pulls back with the unpacked residuals."""
        return jax.tree.map(_unpacked, call.residuals.pullback, is_leaf=_is_packed)(y_bar)

    def _is_packable(self, leaf: Any) -> bool:
        is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
        return is_float and jnp.finfo(leaf.dtype).bits > self.bits and leaf.size >= self.group

    def _pack(self, x: Any, key: Any) -> Any:
        return _Half.pack(x) if self.bits == 16 else _Codes.pack(x, self.bits, self.group, key)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Half:
    """An array as the bits of bfloat16; XLA on CPU would keep bfloat16 itself in float32 in a scan."""

    bits: Any
    dtype: Any = dataclasses.field(metadata={"static": True})

    @staticmethod
    def pack(x: Any) -> _Half:
        return _Half(jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16), x.dtype)

    def unpack(self) -> Any:
        return jax.lax.bitcast_convert_type(self.bits, jnp.bfloat16).astype(self.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Codes:
    """An array as integers of a few bits, several in a byte, with the least value and the step of each group."""

    codes: Any
    low: Any
    step: Any
    bits: int = dataclasses.field(metadata={"static": True})
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})

    @staticmethod
    def pack(x: Any, bits: int, group: int, key: Any) -> _Codes:
        flat = x.astype(wide(x.dtype)).ravel()
        rows = jnp.pad(flat, (0, -flat.size % group), mode="edge").reshape(-1, group)  # (groups, group)
        low, high = rows.min(1, keepdims=True), rows.max(1, keepdims=True)
        step = (high - low) / (2**bits - 1)
        noise = jax.random.uniform(key, rows.shape, rows.dtype)
        q = jnp.floor((rows - low) / jnp.where(step > 0, step, 1) + noise)
        q = jnp.clip(q, 0, 2**bits - 1).astype(jnp.uint8).reshape(len(rows), -1, 8 // bits)
        return _Codes(jnp.sum(q << _shifts(bits), -1, dtype=jnp.uint8), low, step, bits, x.shape, x.dtype)

    def unpack(self) -> Any:
        q = (self.codes[..., None] >> _shifts(self.bits)) & jnp.uint8(2**self.bits - 1)
        rows = self.low + self.step * q.reshape(len(self.codes), -1).astype(self.step.dtype)
        return rows.ravel()[: math.prod(self.shape)].reshape(self.shape).astype(self.dtype)


def _is_packed(node: Any) -> bool:
    return isinstance(node, _Half | _Codes)


def _unpacked(node: Any) -> Any:
    return node.unpack() if _is_packed(node) else node


def _shifts(bits: int) -> Any:
    return jnp.arange(0, 8, bits, dtype=jnp.uint8)
