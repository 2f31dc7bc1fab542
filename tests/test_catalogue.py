"""Each rule of the catalogue keeps to what it says of itself, in every framework and under every transform."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from five import five
from twins import all_cases, dense, in_jax

import crossvjp as cv
from crossvjp.testing import check_rule
from crossvjp.testing._claims import under_rule
from crossvjp.testing._everywhere import SAME_EVERYWHERE

CASES = list(all_cases())
# What a framework changes does not depend on the numbers, so one case of each rule will do there.
FIRST = list({case.of or type(case.rule): case for case in reversed(CASES)}.values())[::-1]


def subjects_of(case):
    return five(in_jax(dict(case.variables)), case.fn, in_jax(case.inputs), str(case))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_rule_keeps_to_what_it_says_of_itself_and_is_the_same_under_every_transform(case):
    check_rule(in_jax(case.rule), subjects_of(case)[:1], stops=case.stops, key=case.key)


@pytest.mark.parametrize("case", FIRST, ids=str)
def test_a_rule_is_the_same_in_every_framework(case):
    SAME_EVERYWHERE(subjects_of(case), under_rule(in_jax(case.rule), case.key))


def by_containers(call, y_bar):
    """Takes what is no `Partial`, as in plain JAX, for something else."""
    bar = call.pullback(y_bar)
    is_plain = isinstance(call.variables, jax.tree_util.Partial)
    return bar if is_plain else bar.replace(variables=jax.tree.map(jnp.negative, bar.variables))


@pytest.mark.parametrize("other", [1, 2, 3, 4], ids=["linen", "nnx", "haiku", "equinox"])
def test_a_rule_that_is_another_in_one_framework_is_caught(other):
    subjects = five({"w": jnp.ones((3, 2)), "b": jnp.ones(2)}, dense, (jnp.ones((4, 3)),))
    result = SAME_EVERYWHERE.attempt([subjects[0], subjects[other]], under_rule(cv.rule(by_containers)))
    assert (result.outcome, "has another gradient than plain" in result.message) == ("failed", True)
