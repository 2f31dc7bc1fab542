"""Threads that trace at the same moment get, bit for bit, what each gets alone.

`Meeting` holds every run of the wrapped function, late ones too, until the other threads are inside
theirs, so that the traces are interleaved and not merely close in time.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import jmp
import pytest
from conftest import make_world
from flax import nnx
from rules import identity, plain, unchanged
from worlds import WORLDS, block_inputs

import crossvjp as cv
from crossvjp import _registry
from crossvjp.testing import assert_same_bits, one_by_one

PATIENCE = 60  # seconds; a thread that does not come is a failure, not a hang

by_rule = identity.lift


def by_custom_vjp(fn: Any) -> Any:
    """Wraps a function of a module by `custom_vjp` with its own gradient."""
    return cv.custom_vjp(fn, lambda mdl, *args, **kwargs: cv.vjp(fn, mdl, *args, **kwargs), unchanged)


SHARED: list[float] = []


def through_shared_memory(fn: Any) -> Any:
    """A wrapping that is not safe: each call leaves its factor where the other threads find it."""

    def unsafe(mdl: Any, *args: Any, **kwargs: Any) -> Any:
        SHARED.append(len(SHARED) + 1.0)
        out = fn(mdl, *args, **kwargs)  # where the threads meet
        return jax.tree.map(lambda leaf: SHARED[-1] * leaf if leaf.dtype == jnp.float32 else leaf, out)

    return by_rule(unsafe)


LIFTS = {"rule": by_rule, "custom_vjp": by_custom_vjp, "unsafe": through_shared_memory}
SAFE = ["rule", "custom_vjp"]


class Meeting:
    """Where threads wait for each other; each has runs of its own number.

    The barrier of run number `k` is for the threads that have as many runs.
    """

    def __init__(self, runs: Sequence[int]):
        self.runs = [0] * len(runs)
        self._barriers = [threading.Barrier(sum(count > k for count in runs)) for k in range(max(runs))]

    def attended(self, thread: int) -> Callable[..., Any]:
        """Makes the function to wrap: it calls the module while all others are inside theirs."""

        def call(mdl: Any, *args: Any, **kwargs: Any) -> Any:
            number = self.runs[thread]
            self.runs[thread] += 1
            # More runs than alone find no barrier; the test compares the numbers.
            barrier = self._barriers[number] if number < len(self._barriers) else threading.Barrier(1)
            barrier.wait(PATIENCE)
            out = mdl(*args, **kwargs)
            barrier.wait(PATIENCE)
            return out

        return call


# What a thread does: `task(call)` gets the function to wrap, and gives arrays.
Task = Callable[[Callable[..., Any]], Any]


def alone(task: Task) -> tuple[Any, int]:
    """Runs a task in this thread, the others being absent; returns its result and how often its function ran."""
    runs = itertools.count()

    def call(mdl: Any, *args: Any, **kwargs: Any) -> Any:
        next(runs)
        return mdl(*args, **kwargs)

    result = task(call)
    return result, next(runs)


def together(tasks: Sequence[Task], runs: Sequence[int]) -> list[Any]:
    """Runs each task in a thread of its own."""
    meeting = Meeting(runs)
    with ThreadPoolExecutor(len(tasks)) as pool:
        futures = [pool.submit(task, meeting.attended(index)) for index, task in enumerate(tasks)]
        results = [future.result() for future in futures]
    assert meeting.runs == list(runs)
    return results


def check(tasks: Sequence[Task]) -> None:
    """Compares what the threads get with what each gets alone."""
    expected, runs = zip(*map(alone, tasks), strict=True)
    for result, own in zip(together(tasks, runs), expected, strict=True):
        assert_same_bits(result, own)


def training(name: str, lift: str, thread: int, run: Any = one_by_one) -> Task:
    """Values, masks, state and gradients of a model with dropout and batch norm; each thread has other numbers.

    Its program runs operation by operation, which is quicker than to compile it; what threads could
    disturb is the tracing.
    """
    world = make_world(name)
    share = 1 + thread / 8
    x = share * block_inputs()
    params = jax.tree.map(lambda leaf: share * leaf, world.variables["params"])
    rest = jax.tree.map(lambda leaf: _other_key(leaf, thread), world.variables["rest"])

    def task(call: Callable[..., Any]) -> Any:
        wrap = lambda block: lambda *args, **kwargs: LIFTS[lift](call)(block, *args, **kwargs)

        def loss(params: Any, x: Any, rest: Any) -> Any:
            out, after = world.run({"params": params, "rest": rest}, x, wrap)
            return jnp.sum(jnp.sin(out) * jnp.arange(out.size).reshape(out.shape)), (out, after)

        return run(jax.value_and_grad(jax.jit(loss), argnums=(0, 1), has_aux=True))(params, x, rest)

    return task


def _other_key(leaf: Any, thread: int) -> Any:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.fold_in(leaf, thread)
    return leaf + thread if jnp.issubdtype(leaf.dtype, jnp.unsignedinteger) else leaf


@pytest.mark.parametrize("lift", SAFE)
@pytest.mark.parametrize("name", sorted(WORLDS))
def test_two_models_of_one_framework(name, lift):
    check([training(name, lift, thread) for thread in range(2)])


@pytest.mark.parametrize("names", list(itertools.combinations(sorted(WORLDS), 2)), ids="-".join)
def test_two_frameworks(names):
    check([training(name, "rule", thread) for thread, name in enumerate(names)])


@pytest.mark.parametrize("lift", SAFE)
def test_eight_models_of_all_frameworks(lift):
    names = ["linen", "nnx", "haiku", "equinox", "plain", "haiku", "linen", "nnx"]
    check([training(name, lift, thread) for thread, name in enumerate(names)])


def test_compiled_models_of_all_frameworks():
    as_it_is = lambda function: function
    check([training(name, "rule", thread, as_it_is) for thread, name in enumerate(sorted(WORLDS))])


@pytest.mark.parametrize("name", sorted(WORLDS))
def test_the_models_of_two_threads_differ(name):
    """Else a mixture of the two would go unseen."""
    (one, runs), (other, _) = (alone(training(name, "rule", thread)) for thread in range(2))
    assert runs >= 2  # so late runs meet too
    (_, (out, (_, drawn))), (_, x_bar) = one
    (_, (other_out, (_, other_drawn))), (_, other_x_bar) = other
    assert ((out == 0) != (other_out == 0)).any()
    assert drawn != other_drawn
    assert (x_bar != other_x_bar).all()


@pytest.mark.parametrize("name", sorted(WORLDS))
def test_the_comparison_catches_threads_that_share_memory(name):
    def fresh(task: Task) -> Task:
        def run(call: Callable[..., Any]) -> Any:
            SHARED.clear()
            return task(call)

        return run

    tasks = [training(name, "unsafe", thread) for thread in range(2)]
    expected, runs = zip(*(alone(fresh(task)) for task in tasks), strict=True)
    SHARED.clear()
    results = together(tasks, runs)
    with pytest.raises(AssertionError, match="Arrays are not equal"):
        assert_same_bits(results, list(expected))


def test_the_meeting_catches_a_thread_that_does_not_come(monkeypatch):
    monkeypatch.setattr("test_threads.PATIENCE", 0.1)
    task = lambda call: call(lambda: jnp.zeros(()))
    with pytest.raises(threading.BrokenBarrierError):
        together([task, lambda call: jnp.zeros(())], [1, 1])


class Block(nnx.Module):
    """Linear, batch norm and dropout."""

    def __init__(self, seed: int):
        rngs = nnx.Rngs(seed)
        self.dense = nnx.Linear(3, 5, rngs=rngs)
        self.norm = nnx.BatchNorm(5, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.dropout(self.norm(self.dense(x)))


def test_live_modules_each_get_their_own_state():
    def task_of(thread: int) -> Task:
        def task(call: Callable[..., Any]) -> Any:
            block = Block(thread)
            loss = lambda block: jnp.sum(jnp.sin(by_rule(call)(block, block_inputs())))
            return nnx.jit(nnx.grad(loss))(block), nnx.state(block)

        return task

    check([task_of(0), task_of(1)])


def linen_interceptor(factor: float) -> Any:
    def scale(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        out = next_fun(*args, **kwargs)
        return factor * out if isinstance(context.module, nn.Dense) else out

    return nn.intercept_methods(scale)


def haiku_interceptor(factor: float) -> Any:
    def scale(next_method: Any, args: Any, kwargs: Any, context: Any) -> Any:
        out = next_method(*args, **kwargs)
        is_output = isinstance(context.module, hk.Linear) and context.method_name == "__call__"
        return factor * out if is_output else out

    return hk.intercept_methods(scale)


CONTEXTS = {
    "linen_interceptor": ("linen", linen_interceptor),
    "haiku_interceptor": ("haiku", haiku_interceptor),
}


@pytest.mark.parametrize("name", CONTEXTS)
def test_what_surrounds_a_call_stays_in_its_thread(name):
    world_name, context = CONTEXTS[name]

    def task_of(thread: int, factor: float) -> Task:
        inner = training(world_name, "rule", thread)

        def task(call: Callable[..., Any]) -> Any:
            with context(factor):
                return inner(call)

        return task

    check([task_of(0, 2.0), training(world_name, "rule", 0), task_of(1, 3.0)])


class Half(hk.Module):
    """A layer that computes in half precision, with what surrounds it."""

    def __init__(self, wrap: Any):
        super().__init__(name="half")
        self.wrap = wrap

    def __call__(self, x: Any) -> Any:
        return self.wrap(hk.Linear(3))(x)


def test_haikus_precision_policy_of_another_thread():
    def task(wrap: Any) -> Any:
        policy = jmp.get_policy("params=float32,compute=float16,output=float32")
        hk.mixed_precision.set_policy(Half, policy)  # of this thread
        net = hk.transform(lambda x, wrap: Half(wrap)(x))
        params = net.init(jax.random.PRNGKey(0), block_inputs(), plain)
        loss = jax.jit(lambda params: jnp.sum(jnp.sin(net.apply(params, None, block_inputs(), wrap))))
        return jax.value_and_grad(loss)(params)

    with ThreadPoolExecutor(1) as pool:
        assert_same_bits(pool.submit(task, identity).result(), pool.submit(task, plain).result())


class Silent:
    """An adapter that knows no handle."""

    name = "silent"
    by_reference = False
    finds_closures = False

    def matches(self, mdl: Any) -> bool:
        return False

    def initializing(self, mdl: Any) -> bool:
        return False

    def channel(self, mdl: Any, name: str, initial: Any) -> Any:
        return getattr(mdl, name)

    def lift(self, mdl: Any, grad_vars: Any, body: Any) -> Any:
        raise AssertionError


class Waiting(Silent):
    """It knows no handle either, and takes its time to say so."""

    def __init__(self) -> None:
        self.asked, self.answer = threading.Event(), threading.Event()

    def matches(self, mdl: Any) -> bool:
        self.asked.set()
        assert self.answer.wait(PATIENCE)
        return False


@pytest.fixture
def registry(monkeypatch):
    """Forgets afterwards which adapters were registered."""
    monkeypatch.setattr(_registry, "_registered", [])
    yield
    monkeypatch.undo()
    _registry._by_type.clear()


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("name", sorted(WORLDS))
def test_registering_an_adapter_while_others_trace(name):
    """The second thread registers adapters at the moments at which the first is inside its function."""
    task = training(name, "rule", 0)
    expected, runs = alone(task)

    def register(call: Callable[..., Any]) -> Any:
        for _ in range(runs):
            call(lambda: cv.register_adapter(Silent()))
        return jnp.zeros(())

    result, _ = together([task, register], [runs, runs])
    assert_same_bits(result, expected)


class Box:
    """A handle that only `BoxAdapter` knows."""

    value = jnp.ones(())


class BoxBoundary:
    """Its boundary."""

    def __init__(self, box: Box):
        self.variables, self.context = {"value": box.value}, {}

    def call(self, fn: Any, variables: Any, context: Any, *args: Any, **kwargs: Any) -> Any:
        box = Box()
        box.value = variables["value"]
        return fn(box, *args, **kwargs), None

    def closed(self) -> Any:
        return contextlib.nullcontext()


class BoxAdapter(Silent):
    """Its adapter."""

    name = "box"

    def matches(self, mdl: Any) -> bool:
        return isinstance(mdl, Box)

    def lift(self, mdl: Any, grad_vars: Any, body: Any) -> Any:
        return body(BoxBoundary(mdl))[0]


@pytest.mark.usefixtures("registry")
def test_an_adapter_that_is_registered_while_another_thread_asks_is_found_afterwards():
    waiting = Waiting()
    cv.register_adapter(waiting)
    use = lambda: by_rule(lambda box: 2 * box.value)(Box())
    with ThreadPoolExecutor(1) as pool:
        early = pool.submit(use)
        assert waiting.asked.wait(PATIENCE)
        cv.register_adapter(BoxAdapter())
        waiting.answer.set()
        with contextlib.suppress(cv.HandleError):  # it asked before there was an adapter
            early.result()
    assert use() == 2


def test_an_adapter_that_is_registered_before_is_found(registry):
    cv.register_adapter(BoxAdapter())
    assert by_rule(lambda box: 2 * box.value)(Box()) == 2
    _registry._registered.clear()
    _registry._by_type.clear()
    with pytest.raises(cv.HandleError, match="must be a module of"):
        by_rule(lambda box: 2 * box.value)(Box())
