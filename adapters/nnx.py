"""Flax NNX: split the module, merge a copy for each run, and write back what the run changed."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
from flax import nnx

from crossvjp import HandleError
from crossvjp.adapters._nnx_host import NnxHosting
from crossvjp.adapters._nnx_migration import NnxMigration
from crossvjp.adapters._nnx_models import NnxModels
from crossvjp.adapters._nnx_structure import check_structure
from crossvjp.extend import Body, Predicate, check_selected, is_inexact, predicate, run_and_publish, unknown_choice

# Graph mode throughout: it opens every module that tree mode opens, and shared variables besides.
_GRAPH = True


@dataclasses.dataclass(frozen=True)
class _At:
    """Where an updated value belongs in the module."""

    path: tuple[Any, ...]


class ChannelVariable(nnx.Variable[Any]):
    """A channel out of the backward pass as a variable of a module."""


nnx.register_variable_name("channels", ChannelVariable)  # the collection that Linen has them in


class _Spent:
    """What a Variable of a finished run holds, so that reading it is an error and not a stale value."""

    def __getattr__(self, name: str) -> Any:
        return self._refuse()

    def _refuse(self, *_: Any) -> Any:
        raise HandleError(
            "This NNX module belongs to a finished forward pass. Its variables are not usable in the backward pass: "
            "return a snapshot of them, `crossvjp.variables(mdl)`, among the residuals of `forward_fn`."
        )

    # Python looks operators up on the type, past `__getattr__`.
    __getitem__ = __array__ = __jax_array__ = __len__ = __iter__ = __bool__ = __neg__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __matmul__ = __rmatmul__ = _refuse
    __truediv__ = __rtruediv__ = __pow__ = __rpow__ = _refuse


class NnxBoundary:
    """A module as a graph definition, a state of variables, and a list of everything else.

    The context is a list, since a state may have keys that JAX can't sort: numbers beside names, as
    `nnx.capture` makes them.
    """

    def __init__(self, mdl: Any, grad_vars: Any):
        wanted = predicate(grad_vars, _named)
        self._graphdef, pairs = _flattened(mdl)
        self.static = self._graphdef
        able = [is_inexact(_raw(leaf)) for _, leaf in pairs]
        paths = [tuple(map(str, path)) for path, _ in pairs]
        self._chosen = [ok and wanted(path, pair[1]) for ok, path, pair in zip(able, paths, pairs, strict=True)]
        check_selected(grad_vars, sum(self._chosen), [path for ok, path in zip(able, paths, strict=True) if ok])
        self._paths = [path for path, _ in pairs]
        # These are the live Variables themselves; copies keep later writes to the module out.
        copies = [jax.tree.map(_same, leaf) for _, leaf in pairs]
        chosen = {path: leaf for ok, path, leaf in zip(self._chosen, self._paths, copies, strict=True) if ok}
        self.variables = chosen[()] if () in chosen else nnx.from_flat_state(chosen)
        self.context = [leaf for ok, leaf in zip(self._chosen, copies, strict=True) if not ok]
        self._mdl: Any = mdl

    def call(self, fn: Callable[..., Any], variables: Any, context: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        chosen, rest = dict(_flat(variables)), iter(context)
        leaves = [chosen[path] if ok else next(rest) for ok, path in zip(self._chosen, self._paths, strict=True)]
        before = {path: _raw(leaf) for path, leaf in zip(self._paths, leaves, strict=True)}
        mdl = nnx.merge(self._graphdef, leaves, copy=True)
        out = fn(mdl, *args, **kwargs)
        graphdef, after = _flattened(mdl)
        if graphdef != self._graphdef:
            check_structure(nnx.merge(self._graphdef, leaves, copy=True), mdl)
        updates: list[Any] = []
        for path, leaf in after:
            if path not in before or _raw(leaf) is not before[path]:
                updates += [_At(path), jax.tree.map(_same, leaf)]
        for _, leaf in after:
            if isinstance(leaf, nnx.Variable):
                leaf.set_raw_value(_Spent())
        return out, updates

    def publish(self, updates: list[Any]) -> None:
        """Writes the updates into the live module, under the checks that NNX makes of any write."""
        live = dict(_flattened(self._mdl)[1]) if updates else {}
        new: dict[tuple[Any, ...], Any] = {}
        for at, value in zip(updates[::2], updates[1::2], strict=True):
            variable = live.get(at.path)
            if isinstance(variable, nnx.Variable):
                variable.set_raw_value(_raw(value))
            else:
                new[at.path] = value
        if new:
            nnx.update(self._mdl, nnx.from_flat_state(new))
        self._mdl = None  # JAX keeps the boundary for late runs, and the live module may hold tracers

    def closed(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()  # the Variables of every run are spent already


class NnxAdapter:
    """Opens NNX modules. "params" is `nnx.Param`; any filter of NNX serves as `grad_vars`."""

    name = "Flax NNX"
    by_reference = True
    finds_closures = False
    models = NnxModels()
    migration = NnxMigration()
    hosting = NnxHosting()

    def matches(self, mdl: Any) -> bool:
        return isinstance(mdl, nnx.Pytree | nnx.Variable)

    def initializing(self, mdl: Any) -> bool:
        return False

    def channel(self, mdl: Any, name: str, initial: Any) -> Any:
        if not hasattr(mdl, name):
            setattr(mdl, name, ChannelVariable(initial))
        held = getattr(mdl, name)
        return held.get_value() if isinstance(held, nnx.Variable) else held

    def lift(self, mdl: Any, grad_vars: Any, body: Body) -> Any:
        return run_and_publish(NnxBoundary(mdl, grad_vars), body)


def _named(word: Any) -> Predicate:
    """Reads a collection's name as its Variable type, and everything else as a filter of NNX."""
    if isinstance(word, str):
        with contextlib.suppress(ValueError):  # what is no collection's name is a tag
            word = nnx.variable_type_from_name(word)
    try:
        chosen = nnx.filterlib.to_predicate(word)
    except (TypeError, ValueError):
        raise unknown_choice(word, "'params', a Variable type, a filter of NNX") from None
    return lambda path, leaf: chosen(path, leaf)


def _flattened(mdl: Any) -> tuple[Any, list[tuple[tuple[Any, ...], Any]]]:
    """Gives a module's definition and its leaves with their paths, in the order in which `nnx.merge` takes them."""
    graphdef, flat = nnx.graph.flatten(mdl, graph=_GRAPH)
    return graphdef, list(flat)


def _same(value: Any) -> Any:
    return value


def _flat(state: Any) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Lists the leaves of a state, which is a bare Variable where the module is one."""
    if isinstance(state, nnx.State):
        yield from nnx.to_flat_state(state)
    else:
        yield (), state


def _raw(leaf: Any) -> Any:
    return leaf.get_raw_value() if isinstance(leaf, nnx.Variable) else leaf


ADAPTERS = (NnxAdapter(),)
