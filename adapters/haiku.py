"""Haiku: the current frame, copied for each run around the parameters and state that the call touches.

A function under `jax.custom_vjp` may run when its frame is long gone, so the boundary holds a copy
of the frame and pushes a fresh copy of that for each run. Private names of Haiku are used in
`_haiku_frames.py` alone.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Mapping, Set
from typing import Any

import haiku as hk
import jax

from crossvjp import HandleError
from crossvjp.adapters._haiku_config import names_below, unnamed
from crossvjp.adapters._haiku_frames import Frame, MissedError, names_in_frame, refuse_frames, touched_by
from crossvjp.adapters._haiku_host import HaikuHosting
from crossvjp.adapters._haiku_migration import HaikuMigration
from crossvjp.adapters._haiku_models import HaikuModels
from crossvjp.adapters._haiku_transformed import TransformedAdapter
from crossvjp.adapters._haiku_transformed import bind as bind
from crossvjp.extend import Body, Partition, Predicate, flat_name, predicate, run_and_publish, unknown_choice


class HaikuBoundary:
    """The parameters and state of some modules of the current frame.

    The variables are `{module: {name: array}}`, as Haiku has them; if `grad_vars` asks for state
    too, `{"params": ..., "state": ...}` of such.
    """

    static = None  # modules are told apart by their names, which a rule may see

    def __init__(self, mdl: Any, grad_vars: Any, held: Set[str] | None):
        self.called = False
        self._mdl = mdl
        self._held = held
        self._frame = frame = Frame()
        pairs = _only(frame.state, held)
        state = {module: {name: pair.current for name, pair in values.items()} for module, values in pairs.items()}
        self._with_state = _asks_for_state(grad_vars)
        tree = {"params": _only(frame.params, held), "state": state}
        wanted = predicate(grad_vars, _named)
        self._partition = Partition(tree, lambda path, leaf: _chosen(wanted, path, leaf, self._with_state), grad_vars)
        both, rest = self._partition.take()
        self.variables = both if self._with_state else both["params"]
        initial = {module: {name: pair.initial for name, pair in values.items()} for module, values in pairs.items()}
        self.context = (rest, initial, frame.rng)

    def call(self, fn: Callable[..., Any], variables: Any, context: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        self.called = True
        rest, initial, rng = context
        tree = self._partition.combine(variables, rest)
        out, params, state, rng_after = self._frame.run(
            lambda: fn(self._mdl, *args, **kwargs), tree["params"], tree["state"], initial, rng, self._held
        )
        changed = {"params": _changed(params, tree["params"]), "state": _changed(state, tree["state"])}
        keys, keys_after = jax.tree.leaves(rng), jax.tree.leaves(rng_after)
        drawn = len(keys) != len(keys_after) or any(a is not b for a, b in zip(keys, keys_after, strict=True))
        return out, {**changed, "rng": rng_after if drawn else None}

    @property
    def unnamed(self) -> Any:
        frame = self._frame
        bundles = {"params": _only(frame.params, self._held), "state": _only(frame.state, self._held)}
        described = unnamed(self._mdl, self._held, bundles)
        rng = jax.tree.structure(frame.rng)
        return None if described is None else (described, self._partition.chosen, self._with_state, rng)

    def unnamed_updates(self, updates: Mapping[str, Any]) -> Any:
        bundles = {"params": updates["params"], "state": updates["state"]}
        return names_below(self._mdl.module_name, bundles), jax.tree.structure(updates["rng"])

    def publish(self, updates: Mapping[str, Any]) -> None:
        """Writes the updates into the live frame, and lets go of it."""
        self._frame.publish(updates["params"], updates["state"], updates["rng"])
        self.release()

    def release(self) -> None:
        """Lets go of the live frame."""
        self._frame.release()

    def closed(self) -> contextlib.AbstractContextManager[None]:
        return refuse_frames()


class HaikuAdapter:
    """Opens Haiku modules, and functions of modules, inside a transform. Collections are "params" and "state"."""

    name = "Haiku"
    by_reference = True
    finds_closures = True  # by running, see `_find`
    models = HaikuModels()
    migration = HaikuMigration()
    hosting = HaikuHosting()

    def matches(self, mdl: Any) -> bool:
        return isinstance(mdl, hk.Module) or (isinstance(mdl, types.FunctionType) and _inside_transform())

    def initializing(self, mdl: Any) -> bool:
        _check_inside(mdl)
        return hk.running_init()

    def channel(self, mdl: Any, name: str, initial: Any) -> Any:
        leaves, treedef = jax.tree_util.tree_flatten_with_path(initial)
        names = [flat_name(name, initial, path) for path, _ in leaves]
        made = [
            hk.get_parameter(flat, leaf.shape, leaf.dtype, init=lambda *_, leaf=leaf: leaf)
            for flat, (_, leaf) in zip(names, leaves, strict=True)
        ]
        return jax.tree.unflatten(treedef, made)

    def lift(self, mdl: Any, grad_vars: Any, body: Body) -> Any:
        _check_inside(mdl)
        held = _modules_below(mdl)
        if held is None:
            held = self._find(mdl, grad_vars, body)
        try:
            return run_and_publish(HaikuBoundary(mdl, grad_vars, held), body)
        except MissedError:  # the function reaches modules that the handle does not hold
            held = held | self._find(mdl, grad_vars, body)
        return run_and_publish(HaikuBoundary(mdl, grad_vars, held), body)

    def _find(self, mdl: Any, grad_vars: Any, body: Body) -> set[str]:
        """Lists the modules of the frame that a call touches, by tracing it once on shapes."""
        cell: list[HaikuBoundary] = []

        def run() -> None:
            cell.append(HaikuBoundary(mdl, True, None))  # made here, where the frame's copy takes the observers along
            body(cell[0])

        touched = touched_by(run)
        boundary = cell.pop()  # JAX keeps `run`, which must not keep the boundary, nor what that holds
        boundary.release()
        return {name for name in names_in_frame() if not boundary.called or _is_below(name, touched)}


def _inside_transform() -> bool:
    try:
        hk.running_init()
    except ValueError:
        return False
    return True


def _check_inside(mdl: Any) -> None:
    if not _inside_transform():
        names = [part.module_name for part in jax.tree.leaves(mdl) if isinstance(part, hk.Module)]
        raise HandleError(
            f"The Haiku module {', '.join(names)} is used outside of a transform, where it has no parameters. Call the "
            "rule inside `hk.transform`, or bind a transformed function, `crossvjp.adapters.haiku.bind`."
        )


def _modules_below(mdl: Any) -> set[str] | None:
    """Lists the frame's modules that belong to the handle or to a module it holds; `None` for functions."""
    names: set[str] = set()
    seen: set[int] = set()

    def visit(part: Any) -> None:
        if not isinstance(part, hk.Module) or id(part) in seen:
            return
        seen.add(id(part))
        names.add(part.module_name)
        for value in vars(part).values():
            for inner in jax.tree.leaves(value):
                visit(inner)

    for part in jax.tree.leaves(mdl):
        if not isinstance(part, hk.Module):
            return None
        visit(part)
    below = tuple(f"{name}/" for name in names)
    return {name for name in names_in_frame() if f"{name}/".startswith(below)}


def _only(bundles: Mapping[str, Any], held: Set[str] | None) -> dict[str, dict[str, Any]]:
    """Keeps the bundles of some modules, or of all."""
    return {module: dict(values) for module, values in bundles.items() if held is None or module in held}


def _is_below(name: str, modules: Set[str]) -> bool:
    parts = name.split("/")
    return any("/".join(parts[:count]) in modules for count in range(len(parts) + 1))


def _asks_for_state(grad_vars: Any) -> bool:
    words = grad_vars if isinstance(grad_vars, list | tuple | set | frozenset) else [grad_vars]
    return any(word is True or (isinstance(word, str) and word == "state") for word in words)


def _named(word: Any) -> Predicate:
    if word in ("params", "state"):
        return lambda path, leaf: path[0] == word
    raise unknown_choice(word, "'params' or 'state'")


def _chosen(wanted: Predicate, path: tuple[str, ...], leaf: Any, with_state: bool) -> bool:
    """Asks for collections by their names, and for paths as Haiku writes them, `module/name`."""
    return (path[0] == "params" or with_state) and (wanted(path, leaf) or wanted(path[1:], leaf))


def _changed(after: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Keeps of `after` what `before` does not hold as the very same object."""
    found = {}
    for module, values in after.items():
        old = before.get(module, {})
        new = {name: value for name, value in values.items() if value is not old.get(name)}
        if new:
            found[module] = new
    return found


ADAPTERS = (HaikuAdapter(), TransformedAdapter())
