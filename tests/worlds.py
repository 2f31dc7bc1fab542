"""The blocks of `crossvjp.testing` as functions that put a rule on a module, `wrap(module)(x)`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from crossvjp.testing import Subject, built_in_subjects
from crossvjp.testing.common import FEATURES as FEATURES
from crossvjp.testing.common import batch

Wrap = Callable[[Any], Any]
block_inputs = batch


@dataclasses.dataclass(frozen=True)
class World:
    """One framework's block.

    Args:
        name: the framework.
        variables: `{"params": ..., "rest": ...}`, the second with state and keys.
        run: `(variables, x, wrap) -> (out, after)`, where `after` is the state after the call and
            a number drawn from the RNG stream behind the block.
    """

    name: str
    variables: dict[str, Any]
    run: Callable[[dict[str, Any], Any, Wrap], tuple[Any, Any]]

    def __repr__(self) -> str:
        return self.name


def world_of(name: str) -> World:
    """Makes the world of a framework."""
    block: Subject = next(subject for subject in built_in_subjects(name) if subject.name.endswith("block"))

    def run(variables: dict[str, Any], x: Any, wrap: Wrap) -> tuple[Any, Any]:
        use = lambda mdl, *args, **kwargs: wrap(mdl)(*args, **kwargs)
        out, after = block.run(variables["params"], variables["rest"], use, x)
        if isinstance(out, tuple):  # where the state is an output
            out, state = out
            after = (state, after)
        return out, after

    return World(name, {"params": block.variables, "rest": block.rest}, run)


WORLDS = ("equinox", "haiku", "linen", "nnx", "plain")
