"""The proof that two models are the same: outputs, gradients and training, each with the largest difference."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._arrays import is_array, is_inexact, take_apart
from .._errors import MigrationError
from ._layer import Arrays
from ._moving import Moving
from ._opened import Call, Opened
from ._report import Check

# Of the largest entry of an array, by the coarsest dtype that the models compute in.
TOLERANCES = {"float64": 1e-9, "float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}

# Each program runs a few times at most; compiling it well would take most of the time.
_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

_FLOOR = 1e-2  # of the largest entry of all: below, arrays are sums that cancel, such as a bias before a batch norm


@dataclasses.dataclass(frozen=True)
class Side:
    """One of two models, with its values and how it is called.

    Attributes:
        opened: the model.
        params: its parameters.
        state: its state.
        call: how it is called for outputs and gradients.
        train: how it is called for training.
    """

    opened: Opened
    params: Arrays
    state: Arrays
    call: Call | None
    train: Call | None


def proof(
    moving: Moving,
    source: Side,
    target: Side,
    sample: Sequence[Any],
    *,
    steps: int,
    learning_rate: float,
    tolerance: float | None,
) -> list[Check]:
    """Compares two models.

    Raises:
        MigrationError: their outputs have different shapes.
    """
    with jax.default_matmul_precision("highest"):
        mine, theirs = (_gradients(side, sample) for side in (source, target))
        held = [array for side in (source, target) for array in (*side.params.values(), *side.state.values())]
        bound = tolerance or _tolerance([*mine.outputs.values(), *held])
        _check_alike(mine.outputs, theirs.outputs)
        checks = [
            compared("outputs", mine.outputs, theirs.outputs, bound),
            compared("gradients of inputs", mine.inputs_bar, theirs.inputs_bar, bound),
            compared("gradients of parameters", moving.cotangents(mine.params_bar), theirs.params_bar, bound),
        ]
        if steps:
            (outputs, params, state), (other_outputs, other_params, other_state) = (
                _trained(side, sample, steps, learning_rate) for side in (source, target)
            )
            expected = moving.values(params, state, {})[0]
            after = f"after {steps} steps"
            checks += [
                compared(f"outputs of {steps} steps", outputs, other_outputs, bound),
                compared(f"parameters {after}", expected, other_params, bound),
                compared(f"state {after}", *_canonical(moving, state, other_state), bound),
            ]
    return [check for check in checks if check.arrays]


@dataclasses.dataclass(frozen=True)
class _Figures:
    outputs: dict[Any, Any]
    inputs_bar: dict[Any, Any]
    params_bar: Arrays


def _gradients(side: Side, sample: Sequence[Any]) -> _Figures:
    arrays, layout = take_apart(tuple(sample))
    moved = [index for index, array in enumerate(arrays) if is_inexact(array)]
    params, fixed = _split(side.params)

    def run(params: Arrays, inputs: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        filled = list(arrays)
        for index, array in zip(moved, inputs, strict=True):
            filled[index] = array
        out, _ = side.opened.run(side.call, {**params, **fixed}, side.state, layout.fill(filled))
        leaves = [leaf for leaf in jax.tree.leaves(out) if is_array(leaf)]
        return [leaf for leaf in leaves if is_inexact(leaf)], leaves

    @_jit
    def figures(params: Arrays, inputs: Sequence[Any]) -> tuple[Any, Any, Any]:
        y, pullback, leaves = jax.vjp(run, params, inputs, has_aux=True)
        return leaves, *pullback([_random(index, leaf) for index, leaf in enumerate(y)])

    leaves, params_bar, inputs_bar = figures(params, [arrays[index] for index in moved])
    zeros = {path: jnp.zeros_like(array, jnp.float32) for path, array in fixed.items()}
    return _Figures(_named("output", leaves), _named("input", inputs_bar), {**params_bar, **zeros})


def _trained(side: Side, sample: Sequence[Any], steps: int, rate: float) -> tuple[dict[Any, Any], Arrays, Arrays]:
    """Takes steps of gradient descent towards a fixed output, along gradients of norm 1 at most."""
    params, fixed = _split(side.params)
    state, outputs = side.state, {}

    def loss(params: Arrays, state: Arrays) -> tuple[Any, Any]:
        out, state = side.opened.run(side.train, {**params, **fixed}, state, sample)
        y = [leaf for leaf in jax.tree.leaves(out) if is_inexact(leaf)]
        return sum(jnp.mean(jnp.abs(leaf - _random(i, leaf)) ** 2) for i, leaf in enumerate(y)), (y, state)

    @_jit
    def stepped(params: Arrays, state: Arrays) -> tuple[Arrays, Arrays, list[Any]]:
        bars, (y, state) = jax.grad(loss, has_aux=True)(params, state)
        norm = jnp.sqrt(sum(jnp.sum(jnp.abs(bar) ** 2) for bar in bars.values()))
        scale = rate / jnp.maximum(1.0, norm)
        moved = {path: (array - scale * bars[path].conj()).astype(array.dtype) for path, array in params.items()}
        return moved, state, y

    for step in range(steps):
        params, state, y = stepped(params, state)
        outputs |= {(f"step {step + 1}", f"output {index}"): leaf for index, leaf in enumerate(y)}
    return outputs, {**params, **fixed}, state


def compared(what: str, expected: Mapping[Any, Any], got: Mapping[Any, Any], tolerance: float) -> Check:
    """Finds the largest difference between two sets of arrays."""
    wide = {path: (_wide(expected[path]), _wide(got[path])) for path in got}
    largest = max((float(np.abs(one).max(initial=0)) for one, _ in wide.values()), default=0.0)
    worst = (0.0, 0.0, "")
    for path, (one, other) in wide.items():
        with np.errstate(invalid="ignore"):
            apart = np.where(one == other, 0.0, np.abs(one - other))  # infinities too
        if not apart.size:
            continue
        index = np.unravel_index(np.argmax(np.where(np.isnan(apart), np.inf, apart)), apart.shape)
        absolute = float(apart[index])
        scale = max(float(np.abs(one).max()), _FLOOR * largest)
        difference = absolute / scale if scale else absolute
        if not difference <= worst[0]:
            where = "/".join(path) + (f"[{', '.join(map(str, index))}]" if index else "")
            worst = (difference, absolute, where)
            if np.isnan(difference):
                break
    return Check(what, len(wide), *worst, tolerance)


def _canonical(moving: Moving, state: Arrays, other: Arrays) -> tuple[Arrays, Arrays]:
    """Gives both states in canonical form, as far as both have it."""
    found: tuple[Arrays, Arrays] = ({}, {})
    for pair in moving.pairs:
        mine, theirs = (one.place for one in pair)
        held = mine.of(state), theirs.of(other)
        if mine.layout is None or theirs.layout is None:
            both: tuple[Arrays, Arrays] = held
        elif mine.layout.state is None or theirs.layout.state is None:
            continue
        else:
            both = (
                {(name,): array for name, array in mine.layout.state.to_canonical(mine.layer, held[0]).items()},
                {(name,): array for name, array in theirs.layout.state.to_canonical(theirs.layer, held[1]).items()},
            )
        for path in both[0].keys() & both[1].keys():
            if is_inexact(both[0][path]):
                found[0][*theirs.path, *path] = both[0][path]
                found[1][*theirs.path, *path] = both[1][path]
    return found


def _check_alike(mine: Mapping[Any, Any], theirs: Mapping[Any, Any]) -> None:
    shapes = [[tuple(array.shape) for array in side.values()] for side in (mine, theirs)]
    if shapes[0] != shapes[1]:
        one, other = (", ".join(map(str, map(list, side))) or "nothing" for side in shapes)
        raise MigrationError(
            f"The source gives outputs of shapes {one}, the target {other}. `source_call` and `target_call`, functions "
            "`(mdl, *sample) -> y`, must give the same: an axis moved, a batch put around, a state taken off."
        )


def _split(params: Arrays) -> tuple[Arrays, Arrays]:
    moved = {path: array for path, array in params.items() if is_inexact(array)}
    return moved, {path: array for path, array in params.items() if path not in moved}


def _named(name: str, arrays: Sequence[Any]) -> dict[Any, Any]:
    return {(f"{name} {index}",): array for index, array in enumerate(arrays)}


def _random(index: int, like: Any) -> Any:
    return jax.random.normal(jax.random.fold_in(jax.random.key(5), index), like.shape, like.dtype)


def _wide(array: Any) -> np.ndarray:
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    found = np.asarray(array)
    return found.astype(np.complex128 if found.dtype.kind == "c" else np.float64)


def _tolerance(arrays: Sequence[Any]) -> float:
    names = {jnp.finfo(array.dtype).dtype.name for array in arrays if is_inexact(array)}
    return max((TOLERANCES.get(name, TOLERANCES["float32"]) for name in names), default=TOLERANCES["float32"])
