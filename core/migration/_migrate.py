"""`migrate`: a trained model of one framework as a model of another."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from .._errors import ArgumentError, MigrationError
from ._canonical import moves_of, types_of
from ._layer import Arrays
from ._migration import Migration
from ._moving import Moving
from ._opened import Call, Opened, migration_of
from ._pairing import Candidate, Pair, paired
from ._pieces import Identity
from ._proof import Side, proof
from ._registry import layout_of
from ._report import Moved, Report
from ._settings import compare_settings
from ._tracing import Place, places_of


def migrate(
    source: Any,
    target: Any,
    *sample: Any,
    source_call: Call | None = None,
    target_call: Call | None = None,
    source_train: Call | None = None,
    target_train: Call | None = None,
    mapping: Mapping[str, str | None] | None = None,
    steps: int = 3,
    learning_rate: float = 0.01,
    tolerance: float | None = None,
    prove: bool = True,
    check: bool = True,
) -> Migration:
    """Moves a trained model to a rewrite of it in another framework, and proves that it computes the same.

    Both models run on types to find their layers. These are paired by the order of their calls, their classes and
    shapes, and by names where these leave several; every layer's parameters and state are converted. Then both run on
    the sample, and what comes out is compared. Neither model that was given is changed.

    Args:
        source: the trained model: a bound Linen module, `module.bind(variables)`; a bound Haiku function,
            `crossvjp.adapters.haiku.bind(net, params, state)`; an NNX module; an Equinox module, or the pair of it and
            its state; or a `Migration`, from which exactly what it lacked is still known.
        target: the rewrite: a Linen module, `hk.transform` or `hk.transform_with_state` of a function, an NNX module,
            an Equinox module or (module, state).
        *sample: what both are called with.
        source_call: `(mdl, *sample) -> y`, how the source is called; `mdl(*sample)` if left out. An Equinox model with
            state is called `(mdl, state, *sample) -> (y, state)`. Train flags, another order of axes, a `jax.vmap`
            belong here. The calls draw no dropout masks, or the models can't be compared.
        target_call: the same of the target.
        source_train: how the source is called while training; as `source_call` if left out.
        target_train: the same of the target. Linen and Haiku targets are initialised by it.
        mapping: `{path in the source: path in the target}` for layers that are paired so, in the words of the report;
            `None` for what is left behind.
        steps: how many steps of gradient descent both are trained for, to be compared afterwards. 0: none.
        learning_rate: of these steps, along gradients whose norm is clipped to 1.
        tolerance: how far figures may be apart, in units of the largest entry of their array; if left out, 1e-9 for
            float64, 1e-4 for float32, 2e-2 for float16, 1e-1 for bfloat16, by the coarsest dtype of the models.
        prove: whether both models run on the sample to be compared. If not, layers are paired and converted alone, and
            the sample may be `jax.ShapeDtypeStruct`s.
        check: whether a proof that fails is an error; if not, see `.report.proved`.

    Returns:
        The target with the source's values, and the report.

    Raises:
        MigrationError: layers don't pair up, or don't convert, or the proof fails. The error says which and why, and
            has the report if it came so far.
        ArgumentError: one of the two is no model of a framework that is known here.

    Example:
        >>> import equinox as eqx, flax.linen as nn, jax, jax.numpy as jnp
        >>> net, x = nn.Dense(3), jnp.ones((5, 2))
        >>> trained = net.bind(net.init(jax.random.key(0), x))
        >>> linear = eqx.nn.Linear(2, 3, key=jax.random.key(1))
        >>> moved = migrate(trained, linear, x, target_call=lambda mdl, x: jax.vmap(mdl)(x))
        >>> moved.report.proved, bool(jnp.allclose(jax.vmap(moved.model)(x), trained(x)))
        (True, True)
    """
    remainders: Mapping[Any, Any] = {}
    if isinstance(source, Migration):
        remainders = source.remainders
        calls = source.calls
        source_call, source_train = source_call or calls[0], source_train or calls[1]
        source = source.handle
    source_train, target_train = source_train or source_call, target_train or target_call
    one = _migration_of(source, "source").source(source)
    other = _opened_target(target, target_train, sample)
    pairs = _pairs(one, other, source_call, target_call, sample, mapping or {})
    moving = Moving(one, other, pairs)
    params, state, left = moving.values(one.params, one.state, remainders)
    model, variables, handle = other.made(params, state)
    sides = (
        Side(one, one.params, one.state, source_call, source_train),
        Side(other, params, state, target_call, target_train),
    )
    kept = _kept(pairs, one.state, state)
    report = Report([_moved(pair) for pair in pairs], [], _settings(pairs), (one.framework, other.framework), kept)
    if prove:
        try:
            checks = proof(moving, *sides, sample, steps=steps, learning_rate=learning_rate, tolerance=tolerance)
        except MigrationError as error:
            error.report = report
            raise
        report = dataclasses.replace(report, checks=checks)
        if check and not report.proved:
            error = MigrationError(
                "The two models don't compute the same. With `check=False` the moved model is returned nevertheless."
                "\n\n"
                f"{report.proof()}"
            )
            error.report = report
            raise error
    return Migration(model, variables, handle, report, left, (target_call, target_train), moving)


def _migration_of(model: Any, side: str) -> Any:
    found = migration_of(model)
    if found is None:
        raise ArgumentError(
            f"The {side} must be a model of Flax Linen, Flax NNX, Haiku or Equinox"
            + (", or a Migration" if side == "source" else "")
            + f", but is a {type(model).__name__}."
        )
    return found


def _opened_target(target: Any, call: Call | None, sample: Sequence[Any]) -> Opened:
    migration = _migration_of(target, "target")
    try:
        return migration.target(target, call, sample)
    except Exception as error:
        error.add_note("This came up while the target was initialised on types, as `target_train` calls it.")
        raise


def _pairs(
    one: Opened,
    other: Opened,
    call: Call | None,
    other_call: Call | None,
    sample: Sequence[Any],
    mapping: Mapping[str, str | None],
) -> list[Pair]:
    places: list[list[Place]] = []
    for side, opened, how in (("source", one, call), ("target", other, other_call)):
        try:
            places.append(places_of(opened, how, sample, layout_of))
        except Exception as error:
            error.add_note(f"This came up while the {side} ran on types, as `{side}_call` calls it.")
            raise
    optional: dict[str, frozenset[str]] = {}
    for place in (place for side in places for place in side):
        absent = frozenset(place.layout.absent if place.layout else ())
        optional[place.kind] = optional.get(place.kind, frozenset()) | absent
    candidates = [[_candidate(place, optional.get(place.kind, frozenset())) for place in side] for side in places]
    return paired(candidates[0], candidates[1], mapping)


def _candidate(place: Place, optional: frozenset[str]) -> Candidate:
    layer = place.layer
    if place.layout is None:
        (array,) = (*layer.params.values(), *layer.state.values())
        return Candidate(place, {"": tuple(array.shape)})
    try:
        types = {name: kind for move in moves_of(layer, place.layout) for name, kind in types_of(layer, move).items()}
    except ArgumentError as error:
        raise MigrationError(str(error)) from error
    return Candidate(place, {name: tuple(kind.shape) for name, kind in types.items()}, optional)


def _settings(pairs: Sequence[Pair]) -> list[Any]:
    both = [(a.place, b.place) for a, b in pairs if a.place.layout and b.place.layout]
    return [
        difference
        for a, b in both
        if a.layout and b.layout
        for difference in compare_settings(a.layer, a.layout, b.layer, b.layout)
    ]


def _kept(pairs: Sequence[Pair], state: Arrays, new_state: Arrays) -> dict[str, list[str]]:
    """Lists what of the source's state is not in the target's, by layers."""
    found: dict[str, list[str]] = {}
    for mine, theirs in pairs:
        layouts = mine.place.layout, theirs.place.layout
        if layouts[0] and layouts[1] and layouts[0].state and layouts[1].state and not mine.place.stacked:
            names = layouts[0].state.to_canonical(mine.place.layer, mine.place.of(state)).keys()
            left = names - layouts[1].state.to_canonical(theirs.place.layer, theirs.place.of(new_state)).keys()
            found |= {mine.name: sorted(left)} if left else {}
    return found


def _moved(pair: Pair) -> Moved:
    mine, theirs = pair
    named = [f"{name}[{','.join(map(str, shape))}]" for name, shape in mine.shapes.items()]
    shapes = " ".join(named if len(named) <= 3 else [*named[:2], f"and {len(named) - 2} more"])
    used = [_pieces(mine), [*reversed(_pieces(theirs))]]
    pieces = " ".join(dict.fromkeys(name for names in used for name in names))
    return Moved(mine.name, mine.place.class_name, theirs.name, theirs.place.class_name, shapes, pieces)


def _pieces(one: Candidate) -> list[str]:
    if one.place.layout is None:
        return []
    moves = moves_of(one.place.layer, one.place.layout)
    return [type(piece).__name__ for move in moves for piece in move.pieces if not isinstance(piece, Identity)]
