"""Every rule of the catalogue is what its paper says: it equals its slow twin, and none is without one."""

from __future__ import annotations

import inspect
import types
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from twins import CASES, Case, all_cases, compare, twin

import crossvjp as cv
import crossvjp.rules


def without_twin(public: Mapping[str, Any], cases: list[Case]) -> list[str]:
    """Lists the public names that no case is a twin of: rules, and functions and classes that are fields of none."""

    def is_missing(name: str, thing: Any) -> bool:
        if name.startswith("_") or isinstance(thing, types.ModuleType) or inspect.isabstract(thing):
            return False
        return not any(thing is part or type(part) is thing for case in cases for part in (case.of, *parts_of(case)))

    return [name for name, thing in public.items() if is_missing(name, thing)]


def parts_of(case: Case) -> list[Any]:
    """Lists a case's rule, and what its fields hold."""
    return [case.rule, *vars(case.rule).values()]


def case_of(rule: cv.Rule, function: Any, **options: Any) -> Case:
    """Makes a case that is not registered."""
    twin(rule, **options)(function)
    return CASES.pop()


ALL = list(all_cases())


@pytest.mark.parametrize("case", ALL, ids=str)
def test_a_rule_equals_its_slow_twin(case):
    compare(case)


def test_no_public_rule_is_without_a_twin():
    assert without_twin(vars(crossvjp.rules), ALL) == []


class Scale(cv.Rule):
    """Scales the gradient of the variables."""

    factor: Any = 3.0

    def backward(self, call, y_bar):
        bar = call.pullback(y_bar)
        return bar.replace(variables=jax.tree.map(lambda g: self.factor * g, bar.variables))


@cv.rule
def reverse(call, y_bar):
    return jax.tree.map(jnp.negative, call.pullback(y_bar))


def scale(case):
    inputs_bar, g = case.pull(case.y_bar)
    return case.y, inputs_bar, {name: case.rule.factor * bar for name, bar in g.items()}


def test_a_rule_without_a_twin_is_found():
    public = {"Scale": Scale, "reverse": reverse, "_Hidden": Scale, "module": jax, "make": scale}
    of_scale = case_of(Scale(), scale)
    assert without_twin(public, [of_scale]) == ["reverse", "make"]
    assert without_twin(public, [of_scale, case_of(reverse, scale), case_of(Scale(), scale, of=scale)]) == []


def two_layers(p, x):
    return jnp.tanh(x @ p["w"]) @ p["v"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"inputs": (np.ones((2, 5, 3)),)},
        {"fn": two_layers, "variables": {"w": np.eye(3), "v": np.ones((3, 1))}, "inputs": (np.ones((2, 3)),)},
    ],
    ids=["a dense layer", "a sequence", "another function"],
)
def test_a_right_rule_passes(options):
    compare(case_of(Scale(), scale, **options))


def change(part: int, by: Any) -> Any:
    """Makes a twin that differs from the right one in one part."""

    def twin_of(case):
        parts = [*scale(case), {}]
        parts[part] = by(parts[part])
        return tuple(parts)

    return twin_of


WRONG = {
    "another output": (change(0, lambda y: y + 1e-9), "y"),
    "another cotangent of the input": (change(1, lambda bars: (bars[0] * 1.001,)), r"inputs\[0\]"),
    "no cotangent of the variables": (change(2, lambda g: None), r"variables\['b'\]"),
    "another cotangent of one variable": (change(2, lambda g: g | {"w": -g["w"]}), r"variables\['w'\]"),
    "another shape": (change(2, lambda g: g | {"b": g["b"][None]}), r"shape \(2,\), but its twin \(1, 2\)"),
    "a cotangent of a field": (change(3, lambda _: {"factor": np.array(1.0)}), r"fields\['factor'\]"),
    "a field that there is not": (change(3, lambda _: {"rate": np.array(1.0)}), "no data field"),
}


@pytest.mark.parametrize(("wrong", "message"), WRONG.values(), ids=WRONG)
def test_a_rule_that_differs_from_its_twin_is_caught(wrong, message):
    with pytest.raises(AssertionError, match=message):
        compare(case_of(Scale(), wrong))
