"""What the Haiku adapter needs of Haiku's private API, all in one place; tests/test_private_api.py pins it."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable, Iterator, Mapping, Set
from typing import Any

import haiku as hk
import jax
from haiku._src import base, mixed_precision
from haiku._src import module as haiku_module

from crossvjp import HandleError


def _stacks() -> tuple[Any, ...]:
    """Lists this thread's stacks that a call runs under. A late run finds them empty, so each run sets them."""
    return (
        base.param_creator_stack,
        base.state_creator_stack,
        base.param_getter_stack,
        base.state_getter_stack,
        base.state_setter_stack,
        base.closure_boundary_stack,
        haiku_module.interceptor_stack,
        mixed_precision._thread_local_state._current_policy,
    )


def names_in_frame() -> set[str]:
    """Lists the modules of the current frame that have parameters or state so far."""
    frame: Any = base.current_frame()
    return {*frame.params, *(frame.state or {})}


class MissedError(Exception):
    """A call touched parameters or state of the live frame that the boundary does not hold."""


class Frame:
    """A copy of the current frame: names, counters and everything else that a run depends on but its arrays."""

    def __init__(self) -> None:
        self._live: Any = base.current_frame()
        self._start = self._live.evolve(None, None, None)._replace(rng_stack=_no_keys())
        self._context: Any = base.current_context()
        self._stacks = [stack.clone() for stack in _stacks()]
        self.params: Mapping[str, Mapping[str, Any]] = self._live.params
        self.state: Mapping[str, Mapping[str, Any]] = self._live.state or {}
        self._known = {*self.params, *self.state}
        sequence = self._live.rng_stack.peek()
        self.rng = None if sequence is None else sequence.internal_state

    def run(
        self, fn: Callable[[], Any], params: Any, state: Any, initial: Any, rng: Any, held: Set[str] | None
    ) -> tuple[Any, Any, Any, Any]:
        """Runs `fn` in a fresh copy of the frame.

        Args:
            fn: what to run.
            params: the parameters, by module and name.
            state: the current values of the state, by module and name.
            initial: the initial values of the same.
            rng: the internal state of the RNG sequence, or `None`.
            held: the modules whose parameters and state are given, or `None` for all.

        Returns:
            What `fn` returned, and the parameters, current state and RNG state after it.

        Raises:
            MissedError: `fn` touched a module of the live frame that is not among `held`.
        """
        pairs: Any = collections.defaultdict(dict)  # as Haiku has it: reading a new module's bundle makes it
        for module, values in state.items():
            for name, value in values.items():
                pairs[module][name] = base.StatePair(initial[module][name], value)
        sequence = None if rng is None else base.PRNGSequence(rng)
        frame = self._start.evolve({module: dict(values) for module, values in params.items()}, pairs, sequence)

        def refuse_missed(next_creator: Any, shape: Any, dtype: Any, init: Any, context: Any) -> Any:
            if held is not None and context.module_name in self._known and context.module_name not in held:
                raise MissedError
            return next_creator(shape, dtype, init)

        with contextlib.ExitStack() as stack:
            stack.enter_context(self._entered())
            stack.enter_context(base.context_stack(self._context))
            stack.enter_context(base.frame_stack(frame))
            stack.enter_context(base.push_jax_trace_level())
            stack.enter_context(hk.custom_creator(refuse_missed, params=True, state=True))
            out = fn()
            self._names = frame.counter_stack, frame.used_names_stack
        current = {
            module: {name: pair.current for name, pair in held.items()} for module, held in pairs.items() if held
        }
        return out, frame.params, current, None if sequence is None else sequence.internal_state

    def publish(self, params: Any, state: Any, rng: Any) -> None:
        """Writes what a run changed into the live frame, together with the names that it gave out."""
        live: Any = self._live
        for module, values in params.items():
            for name, value in values.items():
                live.params[module][name] = value
        for module, values in state.items():
            for name, value in values.items():
                before = live.state[module].get(name)
                live.state[module][name] = base.StatePair(value if before is None else before.initial, value)
        if rng is not None:
            live.rng_stack.peek().replace_internal_state(rng)
        counters, used_names = self._names
        for counter, after in zip(live.counter_stack, counters, strict=True):
            counter.update({name: count - counter[name] for name, count in after.items()})
        for names, after in zip(live.used_names_stack, used_names, strict=True):
            names |= after

    def release(self) -> None:
        """Lets go of the live frame and its context; late runs get an empty context."""
        self._live = None
        self._context = base.new_context(params={}, state={}, rng=None)
        self.params, self.state, self.rng = {}, {}, None

    @contextlib.contextmanager
    def _entered(self) -> Iterator[None]:
        """Sets this thread's stacks as they were when the frame was copied."""
        stacks = _stacks()
        saved = [stack._storage for stack in stacks]
        try:
            for stack, then in zip(stacks, self._stacks, strict=True):
                stack._storage = then.clone()._storage
            yield
        finally:
            for stack, storage in zip(stacks, saved, strict=True):
                stack._storage = storage


def _no_keys() -> Any:
    """Makes a stack without RNG sequences; each run pushes its own."""
    return type(base.current_frame().rng_stack)()


def touched_by(run: Callable[[], None]) -> set[str]:
    """Runs abstractly and lists the modules that are called or whose parameters or state are read."""
    touched: set[str] = set()

    def note_parameter(next_getter: Any, value: Any, context: Any) -> Any:
        touched.add(context.module_name)
        return next_getter(value)

    def note_setting(next_setter: Any, value: Any, context: Any) -> Any:
        touched.add(context.module_name)
        return next_setter(value)

    def note_call(next_method: Any, args: Any, kwargs: Any, context: Any) -> Any:
        prefix = getattr(context.module, "prefix_name", None)  # of `hk.lift`, which reads a whole subtree
        name = getattr(context.module, "module_name", None)  # none yet in a constructor, which reads nothing
        touched.update(found for found in (name if prefix is None else prefix,) if found is not None)
        return next_method(*args, **kwargs)

    with (
        hk.custom_getter(note_parameter, params=True, state=True),
        hk.custom_setter(note_setting),
        hk.intercept_methods(note_call),
    ):
        jax.eval_shape(run)
    return touched


def run_inner(interceptor: Any, context: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Runs an intercepted method under the interceptors that come after the given one.

    Haiku's own `next_fun` can do that only once: it takes them off a list.
    """
    stack = list(haiku_module.interceptor_stack._storage)
    call = context.orig_method
    for inner in reversed(stack[stack.index(interceptor) + 1 :]):
        call = _under(inner, call, context)
    return call(*args, **kwargs)


def _under(interceptor: Any, call: Callable[..., Any], context: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: interceptor(call, args, kwargs, context)


class _ClosedFrame:
    """Stands for the frame in the backward pass, where there is none."""

    module_stack = ()  # Haiku walks all frames when a transform inside the backward pass initialises

    def __getattr__(self, name: str) -> Any:
        raise HandleError(
            "A Haiku module is not usable in the backward pass: its parameters belong to the forward pass. Return a "
            "snapshot of them, `crossvjp.variables(mdl)`, among the residuals of `forward_fn`."
        )


@contextlib.contextmanager
def refuse_frames() -> Iterator[None]:
    """Makes every use of the current frame an error; transformed functions bring their own and still run."""
    with base.frame_stack(_ClosedFrame()):  # pyright: ignore[reportArgumentType]  it only looks like a frame
        yield
