"""Twins of the rules that multiply, round or guard cotangents."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from twins import twin

import crossvjp as cv
from crossvjp import rules


@twin(rules.SignGradient())
def sign_gradient(case):
    inputs_bar, g = case.pull(case.y_bar)
    return case.y, inputs_bar, {name: np.where(leaf > 0, 1.0, -1.0) for name, leaf in g.items()}


@twin(rules.ScaleGradient(factor=3.0, inputs=-0.5))
def scale_gradient(case):
    (x_bar,), g = case.pull(case.y_bar)
    return case.y, (-0.5 * x_bar,), {"w": 3.0 * g["w"], "b": 3.0 * g["b"]}


@twin(rules.ScaleGradient(factor={"w": 3.0, "*": 0.5}))
def scale_gradient_by_path(case):
    inputs_bar, g = case.pull(case.y_bar)
    return case.y, inputs_bar, {"w": 3.0 * 0.5 * g["w"], "b": 0.5 * g["b"]}


@twin(rules.Freeze("b"), stops=("variables/*b", "variables/*b/value"))
def freeze(case):
    inputs_bar, g = case.pull(case.y_bar)
    return case.y, inputs_bar, {"w": g["w"], "b": np.zeros_like(g["b"])}


@twin(rules.GradientReversal(strength=0.3))
def gradient_reversal(case):
    (x_bar,), g = case.pull(case.y_bar)
    return case.y, (-0.3 * x_bar,), g


@twin(rules.CastCotangents(jnp.bfloat16))
def cast_cotangents(case):
    # bfloat16 is float32 without its last 16 bits; to the nearest, and to the even one of two
    bits = case.y_bar.astype(np.float32).view(np.uint32)
    last = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = (bits + np.uint32(0x7FFF) + last) & np.uint32(0xFFFF0000)
    return case.y, *case.pull(rounded.view(np.float32).astype(np.float64))


@twin(rules.LossScaling(scale=1024.0))
def loss_scaling(case):
    return case.y, *case.pull(case.y_bar)


def root(p, x):
    return x * jnp.sqrt(p["w"])


WITH_ZEROS = {"w": np.array([0.0, 2.0, 0.0])}  # where the root is finite, but not its derivative


@twin(rules.ZeroNonFinite(zeroed=cv.Sum(())), root, WITH_ZEROS, (np.random.default_rng(7).normal(size=(4, 3)),))
def zero_non_finite(case):
    x, w, y_bar = case.inputs[0], case.variables["w"], case.y_bar
    g = np.array([0.0, np.sum(y_bar[:, 1] * x[:, 1]) / 2 / np.sqrt(2.0), 0.0])
    return case.y, (y_bar * np.sqrt(w),), {"w": g}, {"zeroed": cv.Sum(()).emit(2.0)}


@twin(rules.ZeroNonFinite("output"))
def zero_non_finite_output(case):
    return case.y, *case.pull(case.y_bar)


# The strength is computed in float32, when this file is imported.
@twin(rules.GradientReversal(rules.reversal_strength(0.03)), of=rules.reversal_strength, rtol=1e-6)
def reversal_strength(case):
    (x_bar,), g = case.pull(case.y_bar)
    return case.y, (-(2.0 / (1.0 + np.exp(-10.0 * 0.03)) - 1.0) * x_bar,), g
