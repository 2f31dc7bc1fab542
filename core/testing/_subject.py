"""A module under test, as a pure function of its arrays."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jaxtyping import PyTree

from .._errors import ArgumentError

# Which framework each file of `crossvjp.adapters.subjects` needs.
_BUILT_IN = {"plain": "jax", "linen": "flax", "nnx": "flax", "haiku": "haiku", "equinox": "equinox"}


@dataclasses.dataclass(frozen=True)
class Subject:
    """A module and a call of it, so that the call can be put under any transform, with and without a rule.

    Args:
        name: what reports call it.
        variables: the module's trainable parameters, as `grad_vars="params"` chooses them.
        rest: everything else that a call can read: state, buffers, keys. Any pytree of arrays.
        inputs: the arrays that the call gets.
        run: `run(variables, rest, use, *inputs) -> (out, after)`. It makes a live module of the
            arrays, calls `use(mdl, *args, **kwargs)` once, and gives what that returned, and
            everything that can be seen after the call: the state, and a number drawn from each RNG
            stream behind the call. It is pure, and `use` may be any function of the live handle.
        common: turns a tree like `variables` into a flat dict of arrays, by names and in layouts that
            all subjects of the same `model` share; `None` if it is not to be compared with others.
        model: what the subject is the same as in other frameworks.

    Example:
        >>> import jax.numpy as jnp
        >>> dense = Subject(
        ...     "dense", {"w": jnp.ones((2, 3))}, (), (jnp.ones(2),),
        ...     lambda variables, rest, use, x: (use(jax.tree_util.Partial(lambda p, x: x @ p["w"], variables), x), ()),
        ... )
        >>> import jax
        >>> dense.run(dense.variables, dense.rest, lambda mdl, x: mdl(x), *dense.inputs)[0].tolist()
        [2.0, 2.0, 2.0]
    """

    name: str
    variables: PyTree
    rest: PyTree
    inputs: tuple[Any, ...]
    run: Callable[..., tuple[Any, Any]]
    common: Callable[[Any], Mapping[str, Any]] | None = None
    model: str = ""

    def __repr__(self) -> str:
        return self.name


def check_subjects(subjects: Any) -> list[Subject]:
    """Refuses what could not fail, no subject at all, and what is none.

    Raises:
        ArgumentError: `subjects` is no sequence of subjects, or is empty.
    """
    given = list(subjects) if isinstance(subjects, Iterable) else [subjects]
    wrong = [each for each in given if not isinstance(each, Subject)]
    if wrong or not given or given == [subjects]:
        came = f"a {type(wrong[0]).__name__} among them" if wrong else "none" if not given else "a bare Subject"
        raise ArgumentError(f"Expected one Subject or more, in a sequence, but there is {came}.")
    return given


def built_in_subjects(*frameworks: str) -> list[Subject]:
    """Gives small modules of each framework: an `mlp`, the same in all, and a `block` with state and dropout.

    Args:
        *frameworks: "plain", "linen", "nnx", "haiku" or "equinox"; all that are installed, if none is given.

    Raises:
        ArgumentError: another name is given.
    """
    unknown = sorted(set(frameworks) - set(_BUILT_IN))
    if unknown:
        raise ArgumentError(f"There are subjects of {', '.join(_BUILT_IN)}, but none of {unknown[0]!r}.")
    chosen = frameworks or [name for name, package in _BUILT_IN.items() if importlib.util.find_spec(package)]
    modules = [importlib.import_module(f"crossvjp.adapters.subjects.{name}") for name in chosen]
    return [subject for module in modules for subject in module.subjects()]
