"""What rules that spare memory keep for the backward pass, and take while they run, at growing size."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from rich.table import Table

import crossvjp as cv
from benchmarks.growth import exponent
from crossvjp.rules import BlockwiseAttention, ChunkedCrossEntropy, PackResiduals, Recompute, ReversibleBlock

BATCH, WIDTH, LAYERS = 128, 64, 4  # LAYERS: in one step of a scan
BLOCK = 64
_CAPTION = (
    "Kilobytes. residuals: what the forward pass keeps for the backward pass beside its arguments, run eagerly.\n"
    "temporary: of the compiled gradient. exponent: e in the fit c * size^e."
)


@dataclasses.dataclass(frozen=True)
class Kept:
    """Bytes of residuals and of temporaries."""

    residuals: int
    temporary: int


@dataclasses.dataclass(frozen=True)
class Family:
    """Ways to compute one function, the plain one first, each made for a size."""

    size: str
    sizes: tuple[int, ...]
    ways: dict[str, Callable[[int], tuple[Callable[..., Any], tuple[Any, ...]]]]

    def measured(self) -> dict[str, dict[int, Kept]]:
        """Gives the bytes, by way and size."""
        return {name: {size: kept(*make(size)) for size in self.sizes} for name, make in self.ways.items()}


def kept(fn: Callable[..., Any], args: tuple[Any, ...]) -> Kept:
    """Measures a function that is differentiated with respect to all its arguments, given as shapes.

    An array that is kept twice counts once, and arguments don't count.
    """
    jaxpr = jax.make_jaxpr(lambda *args: jax.tree.leaves(jax.vjp(fn, *args)[1]))(*args).jaxpr
    given = set(map(id, jaxpr.invars))
    avals: list[Any] = [*{id(var): var.aval for var in jaxpr.outvars if id(var) not in given}.values()]
    residuals = sum(math.prod(aval.shape) * aval.dtype.itemsize for aval in avals if hasattr(aval, "shape"))
    gradient = jax.grad(lambda *args: sum(jnp.sum(leaf) for leaf in jax.tree.leaves(fn(*args))), range(len(args)))
    analysis = jax.jit(gradient).lower(*args).compile().memory_analysis()
    if analysis is None:
        raise RuntimeError(f"XLA does not say what a program takes on {jax.default_backend()}.")
    return Kept(residuals, analysis.temp_size_in_bytes)


def table(title: str, family: Family, measured: dict[str, dict[int, Kept]]) -> Table:
    """Shows one family."""
    made = Table("rule", title=f"Memory: {title}", caption=_CAPTION)
    for measure in ("residuals", "temporary"):
        for size in family.sizes:
            made.add_column(f"{measure}\n{size}", justify="right", no_wrap=True)
        made.add_column("exponent\n", justify="right", no_wrap=True)
    made.columns[0].header = f"rule\n{family.size} →"
    for name, found in measured.items():
        cells = []
        for measure in ("residuals", "temporary"):
            values = {size: getattr(each, measure) for size, each in found.items()}
            cells += [f"{value / 1024:,.1f}" for value in values.values()]
            cells.append(f"{exponent(values):.2f}" if all(values.values()) else "-")
        made.add_row(name, *cells)
    return made


def _shape(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _layers(weights: Any, x: Any) -> Any:
    for w in weights:
        x = jnp.tanh(x @ w)
    return x


def _scan(use: Callable[[Any], Any], steps: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    run = use(_layers)

    def steps_of(weights: Any, x: Any) -> Any:
        return jax.lax.scan(lambda x, w: (run(w, x), None), x, weights)[0]

    return steps_of, ([_shape(steps, WIDTH, WIDTH)] * LAYERS, _shape(BATCH, WIDTH))


def _packed(bits: int) -> Callable[[Any], Any]:
    return lambda fn: PackResiduals(bits).lift(fn, key=jax.random.key(0))


def _coupling(w: Any, x1: Any, x2: Any) -> Any:
    return x2, x1 + 0.5 * jnp.tanh(x2 @ w)


def _reversible(is_ours: bool, depth: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    def ours(weights: Any, x1: Any, x2: Any) -> Any:
        run = ReversibleBlock().lift(lambda w, x1, x2, road: (*_coupling(w, x1, x2), road))
        start = (x1, x2, cv.Highway((x1, x2)))
        (x1, x2, road), _ = jax.lax.scan(lambda carry, w: (run(w, *carry), None), start, weights)
        return road.depart((x1, x2), primal=True)

    def plain(weights: Any, x1: Any, x2: Any) -> Any:
        return jax.lax.scan(lambda carry, w: (_coupling(w, *carry), None), (x1, x2), weights)[0]

    return ours if is_ours else plain, (_shape(depth, WIDTH, WIDTH), _shape(BATCH, WIDTH), _shape(BATCH, WIDTH))


def _head(use: Callable[[Any], Any], tokens: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    vocabulary = 1024

    def loss(w: Any, hidden: Any, labels: Any) -> Any:
        logits = jax.nn.log_softmax(hidden @ w)
        return -jnp.mean(jnp.take_along_axis(logits, labels[:, None], 1))

    labels = jnp.arange(tokens) % vocabulary
    return lambda w, hidden: use(loss)(w, hidden, labels), (_shape(WIDTH, vocabulary), _shape(tokens, WIDTH))


def _attention(use: Callable[[Any], Any], length: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    run = use(lambda _, q, k, v: jax.nn.dot_product_attention(q, k, v))
    return lambda q, k, v: run(None, q, k, v), (_shape(1, length, 2, 32),) * 3


def _as_it_is(fn: Any) -> Any:
    return fn


def _ways(make: Callable[..., Any], **uses: Any) -> dict[str, Any]:
    return {name: functools.partial(make, use) for name, use in uses.items()}


FAMILIES = {
    f"steps of {LAYERS} tanh layers in a scan": Family(
        "steps",
        (16, 64, 256),
        {
            "plain": functools.partial(_scan, _as_it_is),
            "Recompute": functools.partial(_scan, Recompute().lift),
            "PackResiduals, 8 bits": functools.partial(_scan, _packed(8)),
            "PackResiduals, 2 bits": functools.partial(_scan, _packed(2)),
        },
    ),
    "additive couplings in a scan": Family(
        "couplings",
        (16, 64, 256),
        {
            "plain": functools.partial(_reversible, False),
            "ReversibleBlock": functools.partial(_reversible, True),
        },
    ),
    "cross-entropy of 1024 words": Family(
        "tokens",
        (512, 2048, 8192),
        {
            "plain": functools.partial(_head, _as_it_is),
            "ChunkedCrossEntropy, 16 parts": functools.partial(_head, ChunkedCrossEntropy(16).lift),
        },
    ),
    "attention": Family(
        "length",
        (128, 512, 2048),
        {
            "plain": functools.partial(_attention, _as_it_is),
            f"BlockwiseAttention, {BLOCK}": functools.partial(_attention, BlockwiseAttention(BLOCK).lift),
        },
    ),
}
