"""Slow twins: each rule of the catalogue once more, in NumPy from its paper's formula, on numbers to compare the two.

A file `twins_<family>.py` has the twins of one family:

    @twin(ClipByNorm(max_norm=0.5))
    def clip_by_norm(case):
        (x_bar,), g = case.pull(case.y_bar)  # the function's own cotangents
        norm = np.sqrt(sum(np.sum(leaf**2) for leaf in g.values()))
        return case.y, (x_bar,), {name: leaf * min(1, case.rule.max_norm / norm) for name, leaf in g.items()}

A twin returns `y, inputs_bar, variables_bar` and, if the rule gives its own fields cotangents, a dict of them by their
names; `None` is zero. A channel's cotangent is `(value, count)`. Two decorators make two cases of one twin.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import crossvjp as cv

CASES: list[Case] = []


def dense(p: Any, x: Any) -> Any:
    """Computes what most rules are put on: one dense layer."""
    return x @ p["w"] + p["b"]


@dataclasses.dataclass(frozen=True)
class Case:
    """One use of a rule, in NumPy's float64.

    Args:
        rule: the rule, with its fields.
        twin: the same in NumPy, a function of the case.
        fn: the function under the rule, `fn(variables, *inputs)`.
        variables: a dict of arrays; an empty one for a function of inputs only, which gets it or `None`.
        inputs: any pytrees.
        key: what a random rule gets, `rule.lift(fn, key=key)`.
        rtol: how far the rule may be from its twin in float64, relative to an array's largest entry.
        stops: what the rule gives no cotangent for on purpose, as in `check_rule`.
        of: the public name that this is a twin of, if not that of the rule's class.
    """

    rule: cv.Rule
    twin: Callable[[Case], tuple[Any, ...]]
    fn: Callable[..., Any]
    variables: Mapping[str, Any]
    inputs: tuple[Any, ...]
    key: Any = None
    rtol: float = 1e-12
    stops: tuple[str, ...] = ()
    of: Any = None

    def __repr__(self) -> str:
        return f"{type(self.rule).__name__} {self.twin.__name__}"

    @functools.cached_property
    def y(self) -> Any:
        """What the function itself returns."""
        if self.fn is dense:
            return self.inputs[0] @ self.variables["w"] + self.variables["b"]
        with jax.enable_x64(True):
            return jax.tree.map(np.asarray, self.fn(in_jax(dict(self.variables)), *in_jax(self.inputs)))

    @functools.cached_property
    def y_bar(self) -> Any:
        """A cotangent of the output; for integers, zeros that hold nothing."""
        rng = np.random.default_rng(1)
        draw = lambda leaf: rng.normal(size=leaf.shape) if leaf.dtype.kind == "f" else np.zeros(leaf.shape, "V0")
        return jax.tree.map(draw, self.y)

    def pull(self, y_bar: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Gives the function's own cotangents of the inputs and of the variables."""
        if self.fn is dense:
            (x,), batch = self.inputs, tuple(range(y_bar.ndim - 1))
            return (y_bar @ self.variables["w"].T,), {
                "w": np.tensordot(x, y_bar, (batch, batch)),
                "b": y_bar.sum(batch),
            }
        return self.pull_at(self.variables, self.inputs, y_bar)

    def pull_at(self, variables: Any, inputs: Any, y_bar: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Gives the function's own cotangents at other primals, by `jax.vjp`."""
        with jax.enable_x64(True):
            _, (variables_bar, inputs_bar) = _vjp(
                lambda variables, inputs: self.fn(variables, *inputs), (dict(variables), tuple(inputs)), y_bar
            )
        return inputs_bar, variables_bar


def twin(
    rule: cv.Rule,
    fn: Callable[..., Any] | None = None,
    variables: Mapping[str, Any] | None = None,
    inputs: tuple[Any, ...] | None = None,
    *,
    key: Any = None,
    **options: Any,
) -> Callable[[Callable[[Case], tuple[Any, ...]]], Any]:
    """Registers a function as the slow twin of a rule.

    Args:
        rule: the rule, with fields for which the formula's parts can be told apart.
        fn: as in `Case`; a dense layer by default.
        variables: as in `Case`; by default `w` of shape (3, 2) and `b`, or none if `fn` is given.
        inputs: as in `Case`; by default an array of shape (4, 3).
        key: a seed or a key.
        **options: others of `Case`: `rtol` (say why), `stops`, `of`.
    """
    rng = np.random.default_rng(0)
    numbers = {"w": rng.normal(size=(3, 2)), "b": rng.normal(size=2)} if fn is None else {}

    def register(function: Callable[[Case], tuple[Any, ...]]) -> Callable[[Case], tuple[Any, ...]]:
        CASES.append(
            Case(
                rule,
                function,
                fn or dense,
                _in_numpy(numbers if variables is None else dict(variables)),
                _in_numpy((rng.normal(size=(4, 3)),) if inputs is None else tuple(inputs)),
                jax.random.key(key) if isinstance(key, int) else key,
                **options,
            )
        )
        return function

    return register


def all_cases() -> list[Case]:
    """Imports the twins of all families, and gives their cases."""
    for path in sorted(pathlib.Path(__file__).parent.glob("twins_*.py")):
        importlib.import_module(path.stem)
    return CASES


def lifted(case: Case, rule: cv.Rule | None = None) -> Callable[..., Any]:
    """Puts the case's rule, or the same with other fields, on its function."""
    return (rule or case.rule).lift(case.fn, key=case.key)


def compare(case: Case) -> None:
    """Compares a rule with its twin in float64: the output, and the cotangents of inputs, variables and own fields.

    Raises:
        AssertionError: they differ; the message says where.
    """
    with jax.enable_x64(True):
        y, inputs_bar, variables_bar, *rest = case.twin(case)
        fields_bar = rest[0] if rest else {}
        # Where a rule has its own forward pass, only autodiff could say that a field's cotangent is zero.
        names = [name for name in case.rule.data_fields() if name in fields_bar or not case.rule.replaces_forward]
        assert set(fields_bar) <= set(names), f"{case} has no data field {sorted(set(fields_bar) - set(names))}"
        rule = in_jax(case.rule)

        def call(fields: Any, variables: Any, inputs: Any) -> Any:
            return lifted(case, dataclasses.replace(rule, **fields))(variables or None, *inputs)

        primals = {name: getattr(rule, name) for name in names}, dict(case.variables), case.inputs
        found_y, found = _vjp(call, primals, case.y_bar)
        _same("y", found_y, y, case.rtol)
        found_fields, *found = found
        for name, bar in found_fields.items():
            _same(f"fields['{name}']", bar, _as_leaves_of(bar, fields_bar.get(name)), case.rtol)
        for name, bar, expected in zip(("variables", "inputs"), found, (variables_bar, inputs_bar), strict=True):
            _same(name, bar, expected, case.rtol)


def _as_leaves_of(bar: Any, expected: Any) -> Any:
    """Lets a twin give a channel's cotangent as a tuple, `(value, count)`."""
    return None if expected is None else jax.tree.unflatten(jax.tree.structure(bar), jax.tree.leaves(expected))


def _same(name: str, found: Any, expected: Any, rtol: float) -> None:
    """Compares two trees, array by array; `None` is zero, and stands for a whole subtree too."""
    is_none = lambda leaf: leaf is None
    zeros = lambda part: jax.tree.map(np.zeros_like, part)
    whole = jax.tree.map(lambda e, f: zeros(f) if e is None else e, expected, found, is_leaf=is_none)
    for (path, f), e in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(whole), strict=True):
        where = f"{name}{jax.tree_util.keystr(path)}"
        assert np.shape(f) == np.shape(e), f"{where} has shape {np.shape(f)}, but its twin {np.shape(e)}"
        scale = max(1.0, float(np.max(np.abs(e), initial=0)))
        np.testing.assert_allclose(f, e, rtol=0, atol=rtol * scale, err_msg=where)


def in_jax(tree: Any) -> Any:
    """Makes JAX arrays of a tree's floats, in the widest precision that is enabled."""

    def convert(leaf: Any) -> Any:
        is_number = isinstance(leaf, float) or (isinstance(leaf, np.ndarray | jax.Array) and not _is_key(leaf))
        return (jnp.asarray(leaf, float) if _is_float(leaf) else jnp.asarray(leaf)) if is_number else leaf

    return jax.tree.map(convert, tree)


def _in_numpy(tree: Any) -> Any:
    return jax.tree.map(
        lambda leaf: np.asarray(leaf, np.float64) if _is_float(leaf) else leaf if _is_key(leaf) else np.asarray(leaf),
        tree,
    )


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, float) or (not _is_key(leaf) and jnp.issubdtype(jnp.result_type(leaf), jnp.floating))


def _vjp(fn: Callable[..., Any], primals: Any, y_bar: Any) -> tuple[Any, Any]:
    """Gives the output, and the cotangents of all that has one, in NumPy."""
    chosen, others = eqx.partition(in_jax(primals), eqx.is_inexact_array)
    y, pull = jax.vjp(lambda chosen: fn(*eqx.combine(chosen, others)), chosen)
    seed = lambda leaf, bar: jnp.asarray(bar) if _is_float(leaf) else np.zeros(leaf.shape, jax.dtypes.float0)
    return jax.tree.map(np.asarray, (y, pull(jax.tree.map(seed, y, y_bar))[0]))
