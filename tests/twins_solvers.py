"""Slow twin of the solver's gradient."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from twins import twin

from crossvjp.rules import BlackBoxSolver

# Two of three things must be taken, or the last of all.
FEASIBLE = np.array([[1.0, 1.0, 0.0], [1.0, 0.0, 1.0], [0.0, 1.0, 1.0], [0.0, 0.0, 3.0]])


def cheapest(p, w):
    return jnp.asarray(FEASIBLE, w.dtype)[jnp.argmin(jnp.asarray(FEASIBLE, w.dtype) @ w)]


# In the first the moved costs have the same solution, in the second another one.
@twin(BlackBoxSolver(lambda_=0.1), cheapest, inputs=(np.array([0.5, 0.4, 0.9]),))
@twin(BlackBoxSolver(lambda_=5.0), cheapest, inputs=(np.array([0.5, 0.4, 0.9]),))
def solved_again(case):
    (w,), rule = case.inputs, case.rule
    solve = lambda costs: min(FEASIBLE, key=lambda y: y @ costs)
    y = solve(w)
    return y, ((solve(w + rule.lambda_ * case.y_bar) - y) / rule.lambda_,), None
