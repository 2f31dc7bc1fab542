"""`check_adapter`: what every adapter must hold to, on modules of its author's choice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .._cotangents import Cotangents
from .._custom_vjp import custom_vjp
from .._errors import ArgumentError, CotangentError, CrossVJPError, HandleError
from .._function_rule import rule
from .._registry import adapter_of
from .._vjp import variables as snapshot
from .._vjp import vjp
from ._compare import assert_same_bits
from ._composition import COMPOSITION_CHECKS
from ._handles import HANDLE_CHECKS
from ._report import Check, NotApplicableError, Report, raise_failures, run_all
from ._subject import Subject, check_subjects
from ._transforms import inexact_and_others
from ._transparency import TRANSPARENCY_CHECKS
from ._wraps import WRAPS, by_custom_vjp, call, gradient, identity

Use = Callable[..., Any]


def check_adapter(*subjects: Subject) -> list[Report]:
    """Checks the contract of an adapter on its own modules: every check of `ADAPTER_CHECKS`.

    Values, masks, state and RNG streams of a wrapped call are compared bit for bit with those of the
    unwrapped one, operation by operation, under jit, grad, vmap, scan, remat and their combinations.

    Args:
        *subjects: modules of the adapter's framework. Take one with state and randomness, and one
            whose call gives an array, since some checks call it twice.

    Returns:
        A report for each subject; a check may be "not applicable", where the unwrapped module can't do it either.

    Raises:
        CheckError: a check failed; its message has all that did.

    Example:
        >>> from crossvjp.testing import ADAPTER_CHECKS, built_in_subjects
        >>> subject = built_in_subjects("plain")[0]
        >>> print(ADAPTER_CHECKS[0](subject))  # `check_adapter(subject)` runs them all
        a wrapped call is transparent under eager: passed
    """
    reports = [run_all(ADAPTER_CHECKS, subject.name, subject) for subject in check_subjects(subjects)]
    raise_failures(reports)
    return reports


def _acts(subject: Subject) -> None:
    """A rule sees and replaces the cotangents: powers of two, so that all stays exact."""

    @rule
    def twice_and_minus(call: Any, y_bar: Any) -> Any:
        bar = call.pullback(y_bar)
        return Cotangents(jax.tree.map(jnp.negative, bar.inputs), jax.tree.map(lambda g: 2 * g, bar.variables))

    _, variables_bar, inputs_bar = gradient(subject, twice_and_minus.lift(call))
    _, own_variables_bar, own_inputs_bar = gradient(subject, call)
    if own_variables_bar:
        assert_same_bits(variables_bar, [2 * bar for bar in own_variables_bar])
    assert_same_bits(inputs_bar, [-bar for bar in own_inputs_bar])


def _contract(subject: Subject) -> None:
    """The functions of the documented contract; the pullback and a snapshot as residuals, the pullback called twice."""

    def forward(mdl: Any, *args: Any, **kwargs: Any) -> Any:
        y, pullback = vjp(call, mdl, *args, **kwargs)
        return y, (pullback, snapshot(mdl))

    def backward(residuals: Any, y_bar: Any) -> Any:
        pullback, held = residuals
        *inputs_bar, variables_bar = pullback(y_bar)
        again = pullback(y_bar).variables
        return *inputs_bar, jax.tree.map(lambda a, b, w: a + b + w, variables_bar, again, held)

    _, variables_bar, inputs_bar = gradient(subject, custom_vjp(call, forward, backward))
    _, own_variables_bar, own_inputs_bar = gradient(subject, call)
    held, _ = inexact_and_others(subject.variables)
    assert_same_bits(
        [*variables_bar, *inputs_bar],
        [*(2 * g + w for g, w in zip(own_variables_bar, held, strict=True)), *own_inputs_bar],
    )


def _fn_alone(subject: Subject) -> None:
    """`fn` alone runs when no gradient is asked for."""
    refused = custom_vjp(call, _must_not_run, _must_not_run)
    wrapped, unwrapped = (subject.run(*_run_arguments(subject, use)) for use in (refused, call))
    assert_same_bits(wrapped, unwrapped)


def _must_not_run(*_: Any, **__: Any) -> Any:
    raise AssertionError("the rule ran although no gradient was asked for")


def _run_arguments(subject: Subject, use: Use) -> tuple[Any, ...]:
    return (subject.variables, subject.rest, use, *subject.inputs)


class _Anything:
    """An argument that is no pytree and has no equality of its own."""


def _arguments_of_all_kinds(subject: Subject) -> None:
    """Arguments and outputs of every kind arrive as they are, keyword and keyword-only ones among them."""
    anything, key = _Anything(), jax.random.key(3)
    mixed = {"none": None, "int": jnp.arange(3), "bool": jnp.array([True]), "key": key, "static": (anything, "text", 2)}
    seen: list[Any] = []

    def use(mdl: Any, mixed: Any, args: Any, kwargs: Any, *, scale: Any, flag: bool) -> Any:
        seen.append((mixed["static"], flag))
        return mdl(*args, **kwargs), {"scaled": scale * 2, "mixed": mixed}

    for wrap in WRAPS.values():
        wrapped = wrap(use)

        def outer(scale: Any, wrapped: Use = wrapped) -> Any:
            kept: list[Any] = []

            def keep(mdl: Any, *args: Any, **kwargs: Any) -> Any:
                out, extra = wrapped(mdl, mixed, args, kwargs, scale=scale, flag=True)
                kept.append(extra)
                return out

            subject.run(*_run_arguments(subject, keep))
            came = kept[0]["mixed"]
            assert came.pop("static") == (anything, "text", 2), "static parts of an output were changed"
            assert came["none"] is None, "None in an output was changed"
            return jnp.sum(kept[0]["scaled"]), came

        scale_bar, came = jax.grad(outer, has_aux=True)(jnp.ones(2))
        assert_same_bits(scale_bar, jnp.full(2, 2.0))
        assert_same_bits(came, {name: value for name, value in mixed.items() if name != "static"})
    assert all(static == (anything, "text", 2) and flag is True for static, flag in seen)


def _chosen_variables(subject: Subject) -> None:
    """`grad_vars` in the words of every framework; what it leaves out keeps the module's own derivative."""
    own = gradient(subject, call)
    for grad_vars in ("params", True, "*", ["*"], lambda path, leaf: True):
        assert_same_bits(gradient(subject, by_custom_vjp(call, grad_vars=grad_vars)), own)

    seen: list[Any] = []
    noting = by_custom_vjp(call, grad_vars=lambda path, leaf: not seen.append(path))
    subject.run(*_run_arguments(subject, noting))
    assert seen, "a predicate given as `grad_vars` was never asked"
    assert any(_stops_one_variable(subject, path, own[1]) for path in seen), "no predicate chose a single variable"
    _must_raise(
        lambda: subject.run(*_run_arguments(subject, by_custom_vjp(call, grad_vars="*/no such variable"))),
        ArgumentError,
        "selects no differentiable array",
    )


def _stops_one_variable(subject: Subject, chosen: Any, own: list[Any]) -> bool:
    """Puts a rule that gives no gradient on one path; says whether it met a parameter there."""
    nothing = rule(lambda call, y_bar: call.pullback(y_bar).replace(variables=None))
    use = nothing.lift(call, grad_vars=lambda path, leaf: path == chosen)
    _, variables_bar, _ = gradient(subject, use)
    kept = [bool(jnp.all(bar == own_bar)) for bar, own_bar in zip(variables_bar, own, strict=True)]
    lost = [index for index, same in enumerate(kept) if not same]
    assert all(not bool(jnp.any(variables_bar[index])) for index in lost), "a variable outside `grad_vars` was changed"
    assert len(lost) <= 1, "a rule on one variable reached others"
    return len(lost) == 1


def _must_raise(run: Callable[[], Any], kind: type[Exception], text: str) -> None:
    try:
        run()
    except kind as error:
        assert text in str(error), f"the error says {error}, and not {text!r}"
        return
    raise AssertionError(f"no {kind.__name__} where {text!r} was expected")


def _cotangents_in_other_forms(subject: Subject) -> None:
    """Cotangents are forgiven their containers and their dtypes; what has another shape is refused by its path."""

    def returning(change: Callable[[Any], Any]) -> Use:
        return rule(lambda call, y_bar: change(call.pullback(y_bar))).lift(call)

    own = gradient(subject, call)
    wider = lambda bar: bar.replace(variables=jax.tree.map(lambda g: g.astype(jnp.complex64).real, bar.variables))
    assert_same_bits(gradient(subject, returning(wider)), own)
    as_tuple = lambda bar: (*bar.inputs, bar.variables) if not bar.keywords else bar
    assert_same_bits(gradient(subject, returning(as_tuple)), own)
    _, variables_bar, inputs_bar = gradient(subject, returning(lambda bar: bar.replace(variables=None)))
    assert not any(bool(jnp.any(bar)) for bar in variables_bar), "None for the variables is not zero"
    assert_same_bits(inputs_bar, own[2])
    for change, text in (
        (lambda g: g[None], "of `variables` must be"),
        (lambda g: g * 1j, "take its real part"),
        (lambda g: object(), "is of type object"),
    ):
        broken = lambda bar, change=change: bar.replace(variables=jax.tree.map(change, bar.variables))
        _must_raise(lambda broken=broken: gradient(subject, returning(broken)), CotangentError, text)
    more = lambda bar: bar.replace(variables={"nowhere": jnp.zeros(2)})
    _must_raise(lambda: gradient(subject, returning(more)), CotangentError, "['nowhere']")


def _spent_handles(subject: Subject) -> None:
    """A module that is a reference can't be used in the backward pass: an error, not a stale value."""
    cell: list[Any] = []

    def forward(mdl: Any, *args: Any, **kwargs: Any) -> Any:
        cell.append((mdl, args, kwargs))
        return vjp(call, mdl, *args, **kwargs)

    def backward(pullback: Any, y_bar: Any) -> Any:
        mdl, args, kwargs = cell[-1]
        mdl(*args, **kwargs)
        return pullback(y_bar)

    handles: list[Any] = []
    subject.run(
        *_run_arguments(subject, lambda mdl, *args, **kwargs: handles.append(mdl) or call(mdl, *args, **kwargs))
    )
    if not adapter_of(handles[0]).by_reference:
        raise NotApplicableError("a handle of this framework is a value")
    _must_raise(lambda: gradient(subject, custom_vjp(call, forward, backward)), HandleError, "backward pass")


def _failed_calls(subject: Subject) -> None:
    """A call that fails changes nothing: the next one is as if it had not been."""

    def bad_pair(mdl: Any, *args: Any, **kwargs: Any) -> Any:
        return call(mdl, *args, **kwargs), None, None

    bad = custom_vjp(call, bad_pair, lambda residuals, y_bar: None)

    def use(mdl: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            bad(mdl, *args, **kwargs)
        except CrossVJPError:
            return call(mdl, *args, **kwargs)
        raise AssertionError("a forward function that returns no pair was not refused")

    def fails_in_fn(mdl: Any, *args: Any, **kwargs: Any) -> Any:
        def fn(mdl: Any, *args: Any, **kwargs: Any) -> Any:
            call(mdl, *args, **kwargs)
            raise _DeliberateError

        try:
            identity.lift(fn)(mdl, *args, **kwargs)
        except _DeliberateError:
            return call(mdl, *args, **kwargs)

    assert_same_bits(gradient(subject, use), gradient(subject, call))
    assert_same_bits(gradient(subject, fails_in_fn), gradient(subject, call))


class _DeliberateError(Exception):
    pass


ADAPTER_CHECKS: Sequence[Check] = (
    *TRANSPARENCY_CHECKS,
    Check("a rule acts on variables and inputs", _acts),
    Check("the documented contract", _contract),
    Check("fn alone runs without a gradient", _fn_alone),
    *HANDLE_CHECKS,
    Check("arguments of all kinds", _arguments_of_all_kinds),
    Check("the choice of variables", _chosen_variables),
    Check("cotangents in other forms", _cotangents_in_other_forms),
    Check("handles are spent in the backward pass", _spent_handles),
    Check("failed calls change nothing", _failed_calls),
    *COMPOSITION_CHECKS,
)
