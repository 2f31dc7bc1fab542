"""What probes tell, entry by entry."""

from __future__ import annotations

import itertools

import jax
import numpy as np
from twins import in_jax, twin

import crossvjp as cv
from crossvjp.rules import FirstNaN, Histogram, KroneckerFactors, Probe, max_abs

EDGES = (-2.0, -0.5, 0.0, 0.5, 2.0)


def entries(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def seen(case):
    inputs_bar, variables_bar = case.pull(case.y_bar)
    return entries({"output": case.y_bar, "inputs": inputs_bar, "variables": variables_bar}[case.rule.of])


@twin(Probe(cv.Sum(()), of="inputs"))
def norm_of(case):
    value = sum(number**2 for number in seen(case)) ** 0.5
    return case.y, *case.pull(case.y_bar), {"tap": in_jax(case.rule.tap).emit(np.array(value))}


@twin(Probe(cv.Sum(()), of="variables", statistic=max_abs), of=max_abs)
def largest(case):
    value = max(abs(number) for number in seen(case))
    return case.y, *case.pull(case.y_bar), {"tap": in_jax(case.rule.tap).emit(np.array(value))}


@twin(Probe(cv.Sum((4,)), statistic=Histogram(EDGES)), of=Histogram)
def counts(case):
    between = list(itertools.pairwise(EDGES))
    value = np.array([sum(low <= number < high for number in seen(case)) for low, high in between], float)
    return case.y, *case.pull(case.y_bar), {"tap": in_jax(case.rule.tap).emit(value)}


@twin(FirstNaN(cv.Sum(())))
def all_is_finite(case):
    return case.y, *case.pull(case.y_bar), {"made_here": in_jax(case.rule.made_here).emit(np.array(0.0))}


@twin(KroneckerFactors(cv.Sum((4, 4)), cv.Sum((2, 2))), inputs=(np.random.default_rng(5).normal(size=(4, 5, 3)),))
def kronecker_factors(case):
    A, G = np.zeros((4, 4)), np.zeros((2, 2))
    rows = list(zip(case.inputs[0].reshape(-1, 3), case.y_bar.reshape(-1, 2), strict=True))
    for x, c in rows:
        a = np.append(x, 1)
        A += np.outer(a, a) / len(rows)
        G += np.outer(c, c) / len(rows)
    fields = {"inputs": in_jax(case.rule.inputs).emit(A), "outputs": in_jax(case.rule.outputs).emit(G)}
    return case.y, *case.pull(case.y_bar), fields
