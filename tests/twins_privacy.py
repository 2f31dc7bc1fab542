"""Per-example clipping, example by example."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from twins import Case, dense, in_jax, twin

import crossvjp as cv
from crossvjp.rules import GhostClip, PerExampleClip, PerExampleNorm, PerLayerClip

rng = np.random.default_rng(3)
ROWS = rng.normal(size=(4, 3))
SEQUENCE = (rng.normal(size=(4, 5, 3)),)
WIDE = {"w": rng.normal(size=(3, 5)), "b": rng.normal(size=5)}
PLAIN_MLP = {"w": rng.normal(size=(3, 2)), "b": rng.normal(size=2), "v": rng.normal(size=(2, 2))}


def two_layers(p, x):
    return jnp.tanh(x @ p["w"] + p["b"]) @ p["v"]


def under_norms(p, x, squares):
    norms = PerExampleNorm(squares).lift(dense)
    without_bias = PerExampleNorm(squares).lift(lambda v, x: x @ v)
    return without_bias(p["v"], jnp.tanh(norms({"w": p["w"], "b": p["b"]}, x)))


def gradients(case: Case) -> list[dict[str, np.ndarray]]:
    """Pulls the cotangent of each example back by itself."""
    found = []
    for i in range(len(case.y_bar)):
        alone = np.zeros_like(case.y_bar)
        alone[i] = case.y_bar[i]
        found.append(case.pull(alone)[1])
    return found


def squared(g: dict[str, np.ndarray]) -> float:
    return sum(float(np.sum(leaf**2)) for leaf in g.values())


def add_clipped(each: list[dict[str, np.ndarray]], max_norm: float) -> dict[str, np.ndarray]:
    factors = [min(1, max_norm / np.sqrt(squared(g))) for g in each]
    assert min(factors) < 1, "no example is clipped"
    assert max(factors) == 1, "every example is clipped"
    return {name: np.sum([c * g[name] for c, g in zip(factors, each, strict=True)], axis=0) for name in each[0]}


@twin(PerExampleClip(4.0), inputs=SEQUENCE)
@twin(PerExampleClip(2.0, independent=False))
@twin(PerLayerClip(4.0), inputs=SEQUENCE)
@twin(PerLayerClip(1.5), fn=two_layers, variables=PLAIN_MLP, inputs=(ROWS,))
def clipped(case):
    return case.y, case.pull(case.y_bar)[0], add_clipped(gradients(case), case.rule.max_norm)


@twin(PerExampleNorm(cv.Sum((4,))), variables=WIDE, inputs=(SEQUENCE[0][:, :2],))
@twin(PerExampleNorm(cv.Sum((4,))), fn=two_layers, variables=PLAIN_MLP, inputs=(ROWS,))
def per_example_norm(case):
    squares = np.array([squared(g) for g in gradients(case)])
    return case.y, *case.pull(case.y_bar), {"squares": in_jax(case.rule.squares).emit(squares)}


@twin(GhostClip(1.5), fn=under_norms, variables=PLAIN_MLP, inputs=(ROWS, cv.Sum((4,))))
def ghost_clip(case):
    (x, channel), p = in_jax(case.inputs), case.variables
    h = np.tanh(x @ p["w"] + p["b"])
    below = (case.y_bar @ p["v"].T) * (1 - h**2)
    each = [{"w": np.outer(x[i], below[i]), "b": below[i], "v": np.outer(h[i], case.y_bar[i])} for i in range(len(x))]
    squares = np.array([squared(g) for g in each])
    channel_bar = jax.tree.map(np.add, channel.emit(squares), channel.emit(0 * squares))  # two layers spoke
    return h @ p["v"], (below @ p["w"].T, channel_bar), add_clipped(each, case.rule.max_norm)
