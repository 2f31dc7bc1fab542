"""`check_adapter` passes a third party's right adapter, and catches each of the mistakes that one can make."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import crossvjp as cv
from crossvjp.extend import Partition, held_channel, predicate, run_and_publish, unknown_choice
from crossvjp.testing import ADAPTER_CHECKS, CheckError, Subject, check_adapter


class Rng:
    """The framework's keys, with a counter that is a Python number."""

    def __init__(self, key: Any, count: int = 0):
        self.key, self.count = key, count

    def next(self) -> Any:
        self.count += 1
        return jax.random.fold_in(self.key, self.count)


class Layer:
    """A dense layer with a running mean of its outputs, and dropout."""

    reads_mean = False

    def __init__(self, params: Any, mean: Any, rng: Rng):
        self.params, self.mean, self.rng = params, mean, rng

    def __call__(self, x: Any) -> Any:
        y = jnp.tanh(x @ self.params["kernel"] + self.params["bias"])
        y = y - self.mean if self.reads_mean else y
        self.mean = 0.9 * self.mean + 0.1 * y.mean(0)
        return jnp.where(jax.random.bernoulli(self.rng.next(), 0.5, y.shape), 2 * y, 0)


class LayerBoundary:
    """The right boundary; those that are wrong override one of its methods."""

    def __init__(self, mdl: Any, grad_vars: Any):
        leaves, self._treedef = jax.tree.flatten(mdl)  # a Layer is no pytree, and so a leaf
        self._live = list({id(leaf): leaf for leaf in leaves}.values())
        self._places = [self._live.index(leaf) for leaf in leaves]
        self._kinds = [type(layer) for layer in self._live]
        self.static = None  # for this adapter, layers are told apart by what they compute alone
        self._counts = [layer.rng.count for layer in self._live]
        self._partition = self.partition(grad_vars)
        self.variables, self.context = self._partition.take()

    def partition(self, grad_vars: Any) -> Partition:
        def named(word: Any) -> Any:
            if word not in ("params", "state"):
                raise unknown_choice(word, "'params' or 'state'")
            return lambda path, leaf: path[1] == word

        held = [{"params": each.params, "state": each.mean, "key": each.rng.key} for each in self._live]
        return Partition(held, predicate(grad_vars, named), grad_vars)

    def call(self, fn: Any, variables: Any, context: Any, *args: Any, **kwargs: Any) -> Any:
        copies = self.copies(self._partition.combine(variables, context))
        before = [layer.mean for layer in copies]
        out = fn(self._treedef.unflatten([copies[place] for place in self._places]), *args, **kwargs)
        updates = [self.update(*pair) for pair in zip(copies, before, strict=True)]
        self.spend(copies)
        return out, updates

    def copies(self, held: Any) -> list[Layer]:
        rngs = [Rng(arrays["key"], count) for arrays, count in zip(held, self._counts, strict=True)]
        each = zip(self._kinds, held, rngs, strict=True)
        return [kind(arrays["params"], arrays["state"], rng) for kind, arrays, rng in each]

    def update(self, layer: Layer, before: Any) -> dict[str, Any]:
        mean = {} if layer.mean is before else {"mean": layer.mean}
        return {"count": layer.rng.count, **mean}

    def spend(self, copies: list[Layer]) -> None:
        for layer in copies:
            layer.params = layer.mean = Spent()

    def publish(self, updates: Any) -> None:
        for layer, update in zip(self._live, updates, strict=True):
            layer.mean, layer.rng.count = update.get("mean", layer.mean), update["count"]
        self._live = []

    def closed(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


class Spent:
    """Stands for the arrays of a layer whose run is over."""

    def __getitem__(self, name: str) -> Any:
        raise cv.HandleError("This layer is not usable in the backward pass.")


class LayerAdapter:
    """Opens one kind of layer with one kind of boundary."""

    name = "Layers"
    by_reference = True
    finds_closures = False

    def __init__(self, kind: type[Layer], boundary: type[LayerBoundary]):
        self._kind, self._boundary = kind, boundary

    def matches(self, mdl: Any) -> bool:
        return type(mdl) is self._kind

    def initializing(self, mdl: Any) -> bool:
        return False

    def channel(self, mdl: Any, name: str, initial: Any) -> Any:
        return held_channel(mdl, name)

    def lift(self, mdl: Any, grad_vars: Any, body: Any) -> Any:
        return run_and_publish(self._boundary(mdl, grad_vars), body)


def subject_of(boundary: type[LayerBoundary], **attributes: Any) -> Subject:
    """Makes a kind of layer of its own, opened by this boundary."""
    kind = type("Layer", (Layer,), attributes)
    cv.register_adapter(LayerAdapter(kind, boundary))

    def run(variables: Any, rest: Any, use: Any, x: Any) -> Any:
        layer = kind(variables, rest["mean"], Rng(rest["key"]))
        out = use(layer, x)
        return out, (layer.mean, jax.random.normal(layer.rng.next()))

    kernel = jax.random.normal(jax.random.key(0), (3, 2))
    rest = {"mean": jnp.array([0.25, -0.5]), "key": jax.random.key(1)}
    x = jax.random.normal(jax.random.key(2), (4, 3))
    return Subject(boundary.__name__, {"kernel": kernel, "bias": jnp.ones(2)}, rest, (x,), run)


def test_a_right_adapter_passes_every_check():
    (report,) = check_adapter(subject_of(LayerBoundary))
    assert [result.name for result in report.results] == [check.name for check in ADAPTER_CHECKS]
    assert {result.outcome for result in report.results} == {"passed"}, report


class NeverPublishes(LayerBoundary):
    """Drops what the call wrote."""

    def publish(self, updates):
        self._live = []


class PublishesTwice(LayerBoundary):
    """Where the update is a difference, the order does not matter, but the number of times does."""

    def publish(self, updates):
        drawn = [update["count"] - before for update, before in zip(updates, self._counts, strict=True)]
        twice = [before + 2 * more for before, more in zip(self._counts, drawn, strict=True)]
        super().publish([update | {"count": count} for update, count in zip(updates, twice, strict=True)])


class AddsTheNewCount(LayerBoundary):
    """Right for the first call, which starts at zero."""

    def publish(self, updates):
        pairs = zip(self._live, updates, strict=True)
        super().publish([update | {"count": layer.rng.count + update["count"]} for layer, update in pairs])


class ForgetsAfterTwo(LayerBoundary):
    """Publishes what the first two calls of a layer wrote."""

    def publish(self, updates):
        late = [layer.rng.count >= 2 for layer in self._live]
        kept = zip(updates, self._counts, late, strict=True)
        super().publish([{"count": count + 1} if is_late else update for update, count, is_late in kept])


class CountsOn(LayerBoundary):
    """Shares one counter among all runs, so that a late one draws another mask."""

    def copies(self, held):
        made = super().copies(held)
        self._shared = getattr(self, "_shared", 0)
        for layer in made:
            layer.rng.count += self._shared
        return made

    def update(self, layer, before):
        drawn = layer.rng.count - self._shared
        self._shared = layer.rng.count
        return super().update(layer, before) | {"count": drawn}


class RunsOnTheLiveLayer(LayerBoundary):
    """Puts the arrays of a run into the live layer, and takes them out only after a good end."""

    def call(self, fn, variables, context, *args, **kwargs):
        self._live = self._live or self._late
        self._late = self._live
        self._saved = [(layer.params, layer.mean, layer.rng) for layer in self._live]
        out, updates = super().call(fn, variables, context, *args, **kwargs)
        for layer, saved in zip(self._live, self._saved, strict=True):
            layer.params, layer.mean, layer.rng = saved
        return out, updates

    def copies(self, held):
        for layer, made in zip(self._live, super().copies(held), strict=True):
            layer.params, layer.mean, layer.rng = made.params, made.mean, made.rng
        return self._live

    def spend(self, copies):
        pass


class PublishesDuringTheRun(LayerBoundary):
    """A late run writes its tracers into the live layer."""

    def update(self, layer, before):
        self._kept = getattr(self, "_kept", self._live)
        for live in self._kept:
            live.mean = layer.mean
        return super().update(layer, before)


class KeepsTheCopies(LayerBoundary):
    """JAX keeps the boundary for late runs, and this one keeps the tracers of each."""

    def copies(self, held):
        self._held = held
        return super().copies(held)


class KeepsTheLiveLayer(LayerBoundary):
    """Holds on to a module that may hold tracers, when it has published."""

    def publish(self, updates):
        live = self._live
        super().publish(updates)
        self._live = live


class ForgetsTheStructure(LayerBoundary):
    """Gives the updates as a flat list."""

    def call(self, fn, variables, context, *args, **kwargs):
        out, updates = super().call(fn, variables, context, *args, **kwargs)
        return out, jax.tree.leaves(updates)


class DoesNotSpend(LayerBoundary):
    """Leaves the arrays in the modules of finished runs."""

    def spend(self, copies):
        pass


class IgnoresGradVars(LayerBoundary):
    """Takes all parameters, whatever is asked for."""

    def partition(self, grad_vars):
        return super().partition("params")


class SingleHandles(LayerBoundary):
    """Knows no tuples and dicts of layers."""

    def __init__(self, mdl, grad_vars):
        assert isinstance(mdl, Layer), "one layer, please"
        super().__init__(mdl, grad_vars)


class OpensALayerTwice(LayerBoundary):
    """Makes two copies of one layer that stands in a handle twice."""

    def __init__(self, mdl, grad_vars):
        leaves, self._treedef = jax.tree.flatten(mdl)
        self._live, self._places = leaves, list(range(len(leaves)))
        self._kinds = [type(layer) for layer in leaves]
        self._counts = [layer.rng.count for layer in leaves]
        self._partition = self.partition(grad_vars)
        self.variables, self.context = self._partition.take()


class SharesStateBetweenThreads(LayerBoundary):
    """Looks the layer of a run up where another run may have put its own."""

    current: list[Layer]

    def copies(self, held):
        SharesStateBetweenThreads.current = super().copies(held)
        return self.current

    def update(self, layer, before):
        return super().update(SharesStateBetweenThreads.current[0], before)


class DropsADraw(LayerBoundary):
    """Publishes a counter that lags behind."""

    def update(self, layer, before):
        return super().update(layer, before) | {"count": layer.rng.count - 1}


class ClosesOverTheContext(LayerBoundary):
    """Uses the arrays that it was opened with, where it is given others."""

    def __init__(self, mdl, grad_vars):
        super().__init__(mdl, grad_vars)
        self._held = self.context

    def call(self, fn, variables, context, *args, **kwargs):
        return super().call(fn, variables, self._held, *args, **kwargs)


class ClosesOverTheVariables(LayerBoundary):
    """Uses the arrays that it was opened with, where it is given others."""

    def __init__(self, mdl, grad_vars):
        super().__init__(mdl, grad_vars)
        self._held = self.variables

    def call(self, fn, variables, context, *args, **kwargs):
        return super().call(fn, self._held, context, *args, **kwargs)


class CopiesOfAnotherClass(LayerBoundary):
    """Rebuilds the base class, which no adapter knows."""

    def copies(self, held):
        self._kinds = [Layer]
        return super().copies(held)


class ChangesADtype(LayerBoundary):
    """Publishes the state in another precision."""

    def update(self, layer, before):
        return super().update(layer, before) | {"mean": layer.mean.astype(jnp.bfloat16)}


class MakesOutputsFloat(LayerBoundary):
    """Casts what the function returned."""

    def call(self, fn, variables, context, *args, **kwargs):
        out, updates = super().call(fn, variables, context, *args, **kwargs)
        is_integer = lambda leaf: hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.integer)
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32) if is_integer(leaf) else leaf, out), updates


class StopsTheStatesGradient(LayerBoundary):
    """Cuts the state that is written off from what it was computed from."""

    def update(self, layer, before):
        return super().update(layer, before) | {"mean": jax.lax.stop_gradient(layer.mean)}


TRANSPARENT = tuple(check.name for check in ADAPTER_CHECKS if " is transparent under " in check.name)
SHARDED = ("shard_map with check_vma", "shard_map without check_vma")
COMPILED = tuple(check.name for check in ADAPTER_CHECKS if " agrees, compiled, under " in check.name)
GRADIENTS = ("a rule acts on variables and inputs", "the documented contract", "second order")
COMPOSITES = ("a tuple of handles", "a dict of handles")
CALLS = (
    "fn alone runs without a gradient",
    "a module called twice",
    "a rule inside a rule",
    *COMPOSITES,
    "a bound method",
    "the choice of variables",
    "cotangents in other forms",
)
LATE = tuple(f"a wrapped call is transparent under {name}" for name in ("grad(jit)", "remat"))


@dataclasses.dataclass(frozen=True)
class Mistake:
    """A boundary that is wrong in one way, the checks that catch it, and what their messages match."""

    boundary: type[LayerBoundary]
    checks: tuple[str, ...]
    pattern: str

    def __str__(self) -> str:
        return self.boundary.__name__


# While it describes some leaks under the coming custom_vjp, JAX fails itself.
LEAKED = "Leaked tracer|list index out of range"

MISTAKES = (
    Mistake(NeverPublishes, (*TRANSPARENT, *CALLS), "Arrays are not equal|must write the same state"),
    Mistake(PublishesTwice, (TRANSPARENT[0], "a rule inside a rule"), "Arrays are not equal"),
    Mistake(AddsTheNewCount, ("two calls, one after the other",), "Arrays are not equal"),
    Mistake(ForgetsAfterTwo, ("calls that repeat agree, compiled",), "Not equal to tolerance|Arrays are not equal"),
    Mistake(
        CountsOn,
        (*LATE, "a wrapped call agrees, compiled, under grad(jit)"),
        "Arrays are not equal|Not equal to tolerance",
    ),
    Mistake(RunsOnTheLiveLayer, ("failed calls change nothing",), "Arrays are not equal"),
    Mistake(RunsOnTheLiveLayer, ("handles are spent in the backward pass", "no tracer leaks"), "[Tt]racer"),
    Mistake(PublishesDuringTheRun, ("no tracer leaks",), LEAKED),
    Mistake(KeepsTheCopies, ("no tracer leaks",), LEAKED),
    Mistake(KeepsTheLiveLayer, ("no tracer leaks",), LEAKED),
    Mistake(ForgetsTheStructure, (*COMPILED, *SHARDED, "arguments of all kinds"), "'int' object has no attribute"),
    Mistake(DoesNotSpend, ("handles are spent in the backward pass",), "no HandleError where 'backward pass'"),
    Mistake(IgnoresGradVars, ("the choice of variables",), "was never asked"),
    Mistake(SingleHandles, COMPOSITES, "one layer, please"),
    Mistake(OpensALayerTwice, ("a module twice in a handle",), "Arrays are not equal"),
    Mistake(SharesStateBetweenThreads, ("threads", "a rule inside a rule"), ""),
    Mistake(DropsADraw, TRANSPARENT[:2], "Arrays are not equal"),
    Mistake(ClosesOverTheContext, (*LATE, "everything is differentiable"), "UnexpectedTracerError"),
    Mistake(ClosesOverTheVariables, GRADIENTS, "UnexpectedTracerError"),
    Mistake(CopiesOfAnotherClass, ("the documented contract", "a rule inside a rule"), "HandleError"),
    Mistake(ChangesADtype, TRANSPARENT[:2], "dtypes bfloat16, float32 mismatch"),
    Mistake(MakesOutputsFloat, ("arguments of all kinds",), "dtypes float32, int32 mismatch"),
    Mistake(StopsTheStatesGradient, ("everything is differentiable",), "Not equal to tolerance"),
)


@pytest.mark.parametrize("mistake", MISTAKES, ids=str)
def test_a_mistake_is_caught_by_the_checks_that_are_about_it(mistake: Mistake):
    subject = subject_of(mistake.boundary)
    results = [check.attempt(subject) for check in ADAPTER_CHECKS if check.name in mistake.checks]
    assert [result.name for result in results if result.outcome != "failed"] == []
    assert [str(result) for result in results if not re.search(mistake.pattern, result.message)] == []
    assert len(results) == len(mistake.checks)
    as_both = [each for each in results if each.name in (*TRANSPARENT, *COMPILED)]
    assert [
        str(each) for each in as_both if "as rule: " not in each.message or "as custom_vjp: " not in each.message
    ] == []


def test_each_check_catches_a_mistake():
    caught = {name for mistake in MISTAKES for name in mistake.checks}
    assert [check.name for check in ADAPTER_CHECKS if check.name not in caught] == []


def test_each_mistake_is_asked_about():
    assert set(LayerBoundary.__subclasses__()) == {mistake.boundary for mistake in MISTAKES}


def test_a_layer_that_reads_the_state_it_writes_passes_two_calls():
    """The second call's derivative through the first one's state is added to that of the output."""
    subject = subject_of(LayerBoundary, reads_mean=True)
    results = [check(subject) for check in ADAPTER_CHECKS if check.name == "two calls, one after the other"]
    assert [result.outcome for result in results] == ["passed"]


def test_what_the_unwrapped_module_cannot_do_is_not_asked():
    def run(variables: Any, rest: Any, use: Any, x: Any) -> Any:
        return use(jax.tree_util.Partial(lambda w, x: jnp.tanh(w) * x, variables), x), ()

    subject = Subject("a function", jnp.ones(2), (), (jnp.ones(2),), run)
    results = [check(subject) for check in ADAPTER_CHECKS if check.name == "a bound method"]
    assert [str(result) for result in results] == [
        "a bound method: not applicable: Partial has no method written in Python"
    ]


def test_the_error_names_the_subject_and_every_check_that_failed():
    subject = dataclasses.replace(subject_of(ForgetsTheStructure), name="my layer")
    with pytest.raises(CheckError, match=r"^\d+ checks failed\.\nmy layer: ") as caught:
        check_adapter(subject)
    (report,) = caught.value.reports
    failed = [line.split(": failed: ")[0] for line in str(caught.value).splitlines() if ": failed: " in line]
    assert failed == [f"my layer: {result.name}" for result in report["failed"]]
    first = caught.value.__cause__
    assert first is not None
    assert isinstance(first.__cause__, AttributeError)  # below what came of each way to wrap a call


@pytest.mark.parametrize("subjects", [(), ([],)], ids=["none", "a list"])
def test_a_check_of_nothing_is_refused(subjects):
    with pytest.raises(cv.ArgumentError, match="Expected one Subject or more, in a sequence, but there is "):
        check_adapter(*subjects)
