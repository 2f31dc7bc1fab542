"""Slow twins of the rules in `crossvjp.rules._reversible`."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from twins import twin

import crossvjp as cv
from crossvjp.rules import ReversibleBlock, ReversibleStack

rng = np.random.default_rng(0)
WEIGHTS = {f"w{layer}": rng.normal(size=(3, 3)) for layer in range(4)}
HALVES = rng.normal(size=(2, 3)), rng.normal(size=(2, 3))


def stack(p, x1, x2, layer=None):
    for number in range(4) if layer is None else [layer]:
        x1, x2 = x2, x1 + jnp.tanh(x2 @ p[f"w{number}"])
    return x1, x2


@twin(ReversibleStack(depth=4), stack, WEIGHTS, HALVES, rtol=1e-11)  # what is computed again rounds in another way
def reversible_stack(case):
    x1, x2 = case.inputs
    kept = []
    for layer in range(4):
        kept.append(x2)
        x1, x2 = x2, x1 + np.tanh(x2 @ case.variables[f"w{layer}"])
    b1, b2 = case.y_bar
    bars = {}
    for layer in reversed(range(4)):
        w, x = case.variables[f"w{layer}"], kept[layer]
        before_bar = b2 * (1 - np.tanh(x @ w) ** 2)
        bars[f"w{layer}"] = x.T @ before_bar
        b1, b2 = b2, b1 + before_bar @ w.T
    return (x1, x2), (b1, b2), bars


@cv.rule
def its_own(call, y_bar):
    return call.pullback(y_bar)


def coupling(w, x1, x2, road):
    return x2, x1 + jnp.tanh(x2 @ w), road


def chain(p, x1, x2):
    road = cv.Highway((x1, x2))
    for layer in range(4):
        x1, x2, road = ReversibleBlock().lift(coupling)(p[f"w{layer}"], x1, x2, road)
    return road.depart((x1, x2), primal=True)


twin(its_own, chain, WEIGHTS, HALVES, rtol=1e-11, of=ReversibleBlock)(reversible_stack)  # rtol: as above
