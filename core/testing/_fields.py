"""The cotangents of a rule's own fields are linear too, where the rule says that it is."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from .._channels import Channel
from .._errors import CotangentError
from ._claims import Claims, UnderRule, under_rule
from ._linearized import close, require
from ._subject import Subject
from ._transforms import inexact_and_others


def linear_in_fields(subject: Subject, use: UnderRule, claims: Claims) -> None:
    """A learned scale whose cotangent forgets the one that flows in is not linear."""
    require(claims.linear, "the rule is said not to be linear")
    answered = [name for name in _learned(use) if _compare(subject, use, name)]
    require(bool(answered), "the rule gives no cotangent for a field, but for channels")


def _learned(use: UnderRule) -> list[str]:
    """Lists the fields that hold floating numbers, but no channel."""
    if use.rule is None:
        return []
    fields = {name: getattr(use.rule, name) for name in use.rule.data_fields()}
    return [name for name, field in fields.items() if inexact_and_others(_arrays(field))[0] and not _has_channel(field)]


def _compare(subject: Subject, use: UnderRule, name: str) -> bool:
    """Compares the cotangents of one field; says whether the rule answers for it."""
    primals, fill = inexact_and_others(_arrays(getattr(use.rule, name)))

    def run(primals: list[Any]) -> list[Any]:
        changed: Any = dataclasses.replace(use.rule, **{name: fill(primals)})  # pyright: ignore[reportArgumentType]
        out, _ = subject.run(subject.variables, subject.rest, under_rule(changed, use.key), *subject.inputs)
        return inexact_and_others(out)[0]

    out, pullback = jax.vjp(run, primals)
    y_bar = [jnp.cos(leaf) for leaf in out]
    try:
        bars = pullback(y_bar)
    except CotangentError:  # silent about it, which is an error only where somebody differentiates it
        return False
    close(  # twice, since a sum of two would round where the module's precision is low
        pullback([2 * bar for bar in y_bar]),
        jax.tree.map(lambda bar: 2 * bar, bars),
        f"the rule is said to be linear, but the cotangent of its field {name!r} is not homogeneous: is the cotangent "
        "that flows in forgotten? If it is meant, say linear=False",
    )
    return any(bool(jnp.any(bar)) for bar in jax.tree.leaves(bars))


def _arrays(field: Any) -> Any:
    """Makes arrays of Python numbers, which are fields like others."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf) if isinstance(leaf, float) else leaf, field)


def _has_channel(field: Any) -> bool:
    nodes = jax.tree.leaves(field, is_leaf=lambda node: isinstance(node, Channel))
    return any(isinstance(node, Channel) for node in nodes)
