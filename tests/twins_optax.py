"""Twins of `Optax`, with two transformations written out."""

from __future__ import annotations

import jax
import numpy as np
import optax
from twins import twin

from crossvjp import rules


@twin(rules.Optax(optax.scale(-0.25)))
def optax_without_state(case):
    inputs_bar, g = case.pull(case.y_bar)
    return case.y, inputs_bar, {name: -0.25 * leaf for name, leaf in g.items()}


# A state without parameters' arrays, since the containers of these differ between frameworks.
@twin(rules.Optax.of(optax.scale_by_schedule(lambda count: -1.0 / (4.0 + count)), {}))
def first_step_of_a_schedule(case):
    inputs_bar, g = case.pull(case.y_bar)
    # The step count is 1, its lower two bytes and its upper two; beside it stands how many sent it.
    sent = [np.array([1.0, 0.0]), np.array(1.0)]
    state = jax.tree.unflatten(jax.tree.structure(case.rule.state), sent)
    return case.y, inputs_bar, {name: -0.25 * leaf for name, leaf in g.items()}, {"state": state}
