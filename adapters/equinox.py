"""Equinox: a module is a pytree, and so are its bound methods; `eqx.nn.State` is an input and an output."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax

from crossvjp.adapters._equinox_host import EquinoxHosting
from crossvjp.adapters._equinox_migration import EquinoxMigration
from crossvjp.adapters._equinox_models import EquinoxModels
from crossvjp.adapters.pytree import ValueBoundary
from crossvjp.extend import Body, Predicate, held_channel, predicate, unknown_choice


class EquinoxAdapter:
    """Opens Equinox modules. "params" is every floating array: Equinox marks no others."""

    name = "Equinox"
    by_reference = False
    finds_closures = False
    models = EquinoxModels()
    migration = EquinoxMigration()
    hosting = EquinoxHosting()

    def matches(self, mdl: Any) -> bool:
        return isinstance(mdl, eqx.Module)

    def initializing(self, mdl: Any) -> bool:
        return False

    def channel(self, mdl: Any, name: str, initial: Any) -> Any:
        return held_channel(mdl, name)

    def lift(self, mdl: Any, grad_vars: Any, body: Body) -> Any:
        return body(ValueBoundary(mdl, _wanted(mdl, grad_vars), grad_vars))[0]


def _wanted(mdl: Any, grad_vars: Any) -> Predicate:
    """Reads `grad_vars` as a filter spec where it is one: a tree of booleans and functions of leaves."""
    if isinstance(grad_vars, eqx.Module | dict):
        chosen = {id(leaf) for leaf in jax.tree.leaves(eqx.filter(mdl, grad_vars))}
        return lambda path, leaf: id(leaf) in chosen

    def named(word: Any) -> Predicate:
        if word == "params":
            return lambda path, leaf: True
        raise unknown_choice(word, "'params', a filter spec")

    return predicate(grad_vars, named)


ADAPTERS = (EquinoxAdapter(),)
