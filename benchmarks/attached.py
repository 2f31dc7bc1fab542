"""What a rule costs that is attached to a published model: Haiku's ResNet18, at all of its convolutions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import haiku as hk
import jax
import jax.numpy as jnp
from rich.table import Table

import crossvjp as cv
from benchmarks.cases import Variant
from benchmarks.compiled import cost_of
from benchmarks.timing import Samples, interleaved, settled, shown, tracing

Loss: TypeAlias = Callable[[Any], jax.Array]
"""Of the parameters."""

BATCH, SIZE, CLASSES = 2, 64, 1000
ROUNDS = 11
_CAPTION = (
    "make_jaxpr of the gradient: median of CPU time of the thread in milliseconds, on empty caches, ± half the\n"
    "distance between the quartiles, and the ratio to the plain model (median of the ratios within each round).\n"
    "flops: of the compiled gradient, as XLA says, in millions."
)


@cv.rule
def identity(call: cv.Call, y_bar: Any) -> cv.Cotangents:
    """Changes no gradient: so the attached model has the plain one's work to do, and no other."""
    return call.pullback(y_bar)


@functools.cache
def losses() -> tuple[dict[Variant, Loss], Any]:
    """Makes the losses of the model without and with the rule, and the parameters of both."""

    def forward(x: jax.Array) -> jax.Array:
        return hk.nets.ResNet18(CLASSES)(x, is_training=True)

    plain = hk.transform_with_state(forward)
    attached = cv.attach(plain, identity, where=hk.Conv2D)
    x = jnp.zeros((BATCH, SIZE, SIZE, 3))
    params, state = plain.init(jax.random.key(0), x)

    def loss(model: hk.TransformedWithState) -> Loss:
        return lambda params: jnp.mean(jnp.square(model.apply(params, state, None, x)[0]))

    return {"plain": loss(plain), "rule": loss(attached)}, params


def traces() -> Samples:
    """Times traces of the gradients, which take turns."""
    models, params = losses()
    runs: dict[Variant, Callable[[], float]] = {
        variant: functools.partial(tracing, jax.grad(loss), params) for variant, loss in models.items()
    }
    with settled():
        return interleaved(runs, ROUNDS)


def flops() -> dict[Variant, float]:
    """Counts the flops of the compiled gradients."""
    models, params = losses()
    return {variant: cost_of(jax.grad(loss), (params,)).flops for variant, loss in models.items()}


def table(samples: Samples, counted: Mapping[Variant, float]) -> Table:
    """Compares the two."""
    made = Table("variant", title="Attached: ResNet18 of Haiku, a rule at its 20 convolutions", caption=_CAPTION)
    for title in ("tracing", "flops"):
        made.add_column(title, justify="right", no_wrap=True)
    for variant, number in counted.items():
        made.add_row(variant, shown(samples, variant, "plain"), f"{number / 1e6:.2f}M")
    return made
