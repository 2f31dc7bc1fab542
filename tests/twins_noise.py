"""Twins of the rules that draw; the draws are JAX's, with the keys that the rules' docstrings promise."""

from __future__ import annotations

import jax
import numpy as np
from twins import twin

from crossvjp import rules


@twin(rules.GradientNoise(eta=0.3, step=20.0, gamma=0.55), key=3)
def gradient_noise(case):
    inputs_bar, g = case.pull(case.y_bar)
    keys = jax.random.split(case.key, 2)  # leaves come in the order of their names
    sigma = np.sqrt(0.3 / 21.0**0.55)
    noise = {name: np.asarray(jax.random.normal(key, g[name].shape)) for name, key in zip("bw", keys, strict=True)}
    return case.y, inputs_bar, {name: g[name] + sigma * noise[name] for name in g}


@twin(rules.KeepWithProbability(probability=0.25), key=4)
def keep_with_probability(case):
    (key,) = jax.random.split(case.key, 1)
    kept = np.asarray(jax.random.bernoulli(key, 0.25, case.y_bar.shape))
    assert 0 < kept.sum() < kept.size
    return case.y, *case.pull(np.where(kept, case.y_bar * 4.0, 0.0))


@twin(rules.StochasticRounding(), key=5)
def stochastic_rounding(case):
    return case.y, *case.pull(rounded(case.y_bar, 7, case.key))


@twin(rules.StochasticRounding(mantissa_bits=0), key=5)
def stochastic_rounding_to_powers_of_two(case):
    return case.y, *case.pull(rounded(case.y_bar, 0, case.key))


def rounded(c, mantissa_bits, key):
    """Rounds by arithmetic on the numbers, not on their bits."""
    (key,) = jax.random.split(key, 1)
    grid = 2 ** (23 - mantissa_bits)  # steps of float32 between two numbers that stay
    chance = np.asarray(jax.random.bits(key, c.shape, np.uint32)) // (2**32 // grid)  # 0 to grid - 1
    mantissa, exponent = np.frexp(np.abs(c.astype(np.float32)).astype(np.float64))  # mantissa in [0.5, 1)
    steps = mantissa * 2**24  # whole, since float32 has 24 bits
    up = np.floor((steps + chance) / grid) * grid
    return np.sign(c) * np.ldexp(up / 2**24, exponent)
