"""Checks of how a wrapped call composes: derivatives of all that there is, second order, leaks, sharding, threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from ._compare import assert_close, assert_same_bits
from ._leaks import checking_leaks
from ._report import Check, NotApplicableError
from ._subject import Subject
from ._transforms import TRANSFORMS, inexact_and_others
from ._wraps import WRAPS, arguments, call, gradient, identity, loss_of

Use = Callable[..., Any]


def _everything_differentiable(subject: Subject) -> None:
    """With respect to all arrays, state among them, and through the state that the call leaves behind."""

    def total(use: Use) -> Callable[[list[Any]], Any]:
        def loss(chosen: list[Any]) -> Any:
            variables, rest, inputs = fill(chosen)
            leaves, _ = inexact_and_others(subject.run(variables, rest, use, *inputs))
            return sum(jnp.sum(jnp.real(leaf * leaf)).astype(jnp.float32) for leaf in leaves)

        return loss

    chosen, fill = inexact_and_others((subject.variables, subject.rest, subject.inputs))
    for wrap in WRAPS.values():
        # The derivative through the output and the one through the state are added in another order.
        assert_close(jax.grad(total(wrap(call)))(chosen), jax.grad(total(call))(chosen))


def _second_order(subject: Subject) -> None:
    """Reverse over reverse differentiates the rule."""

    def norm(use: Use) -> Callable[[list[Any]], Any]:
        def of(chosen: list[Any]) -> Any:
            loss = lambda chosen: loss_of(subject, use)(*fill(chosen), subject.rest)[0]
            return sum(jnp.sum(jnp.abs(bar) ** 2).astype(jnp.float32) for bar in jax.grad(loss)(chosen))

        return of

    chosen, fill = inexact_and_others((subject.variables, subject.inputs))
    for wrap in WRAPS.values():
        assert_close(jax.grad(norm(wrap(call)))(chosen), jax.grad(norm(call))(chosen), rtol=1e-5)


def _no_leaks(subject: Subject) -> None:
    with checking_leaks():
        for wrap in WRAPS.values():
            for transform in TRANSFORMS:
                if transform.name in ("grad(jit)", "jit(grad)", "grad of scan"):
                    transform.apply(loss_of(subject, wrap(call)))(*arguments(subject))


def _sharded(check_vma: bool) -> Callable[[Subject], None]:
    """Inputs cut along their first axis; one device is enough for the types of varying values to be checked."""

    def check(subject: Subject) -> None:
        mesh = Mesh(jax.devices()[:1], ("shards",))
        chosen, fill = inexact_and_others((subject.variables, subject.inputs))
        count = len(inexact_and_others(subject.variables)[0])
        whole = PartitionSpec()
        specs = [
            PartitionSpec("shards") if index >= count and leaf.ndim else whole for index, leaf in enumerate(chosen)
        ]

        def bars(use: Use) -> Any:
            def loss(chosen: list[Any], rest: Any) -> Any:
                return jax.lax.psum(loss_of(subject, use)(*fill(chosen), rest)[0], "shards")

            sharded = jax.shard_map(loss, mesh=mesh, in_specs=(specs, whole), out_specs=whole, check_vma=check_vma)
            return jax.jit(jax.grad(sharded))(chosen, subject.rest)

        try:
            expected = bars(call)
        except Exception as error:
            raise NotApplicableError(f"the module itself raises {type(error).__name__}: {error}"[:200]) from error
        for wrap in WRAPS.values():
            assert_close(bars(wrap(call)), expected)  # compiled as wholes

    return check


def _threads(subject: Subject) -> None:
    """Two threads that trace at once, each inside its call, do not disturb each other."""
    barrier = threading.Barrier(2, timeout=60)
    expected = gradient(subject, call)
    results: list[Any] = []

    def together(mdl: Any, *args: Any, **kwargs: Any) -> Any:
        barrier.wait()
        out = mdl(*args, **kwargs)
        barrier.wait()
        return out

    def run() -> None:
        try:
            results.append(gradient(subject, identity.lift(together)))
        except BaseException as error:
            barrier.abort()
            results.append(error)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise AssertionError(f"a thread failed: {type(result).__name__}: {result}") from result
        assert_same_bits(result, expected)


COMPOSITION_CHECKS: Sequence[Check] = (
    Check("everything is differentiable", _everything_differentiable),
    Check("second order", _second_order),
    Check("no tracer leaks", _no_leaks),
    Check("shard_map with check_vma", _sharded(True)),
    Check("shard_map without check_vma", _sharded(False)),
    Check("threads", _threads),
)
