"""`check_rule`: what a backward rule claims, checked on modules of every framework."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._conform import Note, noting
from .._rule import Rule
from ._claims import Claims, Functions, UnderRule, claims_of, under_rule
from ._compare import assert_same_bits, numbers
from ._everywhere import SAME_EVERYWHERE
from ._fields import linear_in_fields
from ._linearized import Linearized, Use, close, require
from ._one_by_one import one_by_one
from ._report import Check, NotApplicableError, Report, raise_failures, run_all
from ._subject import Subject, built_in_subjects, check_subjects
from ._transforms import inexact_and_others
from ._under import UNDER_CHECKS
from ._wraps import call


def check_rule(
    the_rule: Rule | Functions,
    subjects: Sequence[Subject] | None = None,
    *,
    linear: bool | None = None,
    exact: bool | None = None,
    replaces_forward: bool | None = None,
    stops: Sequence[str] = (),
    key: Any = None,
) -> list[Report]:
    """Checks a rule on modules of every framework.

    It catches a rule that forgets the cotangent that flows in, gives `None` for what is
    differentiated, drops the cotangent of the state, returns another dtype, draws another dropout
    mask or changes the output in another way, makes NaN of a zero cotangent, or means something
    else under jit, remat, scan, vmap or in another framework.

    Args:
        the_rule: a `Rule`, or the pair `(forward_fn, backward_fn)` of `custom_vjp`.
        subjects: the modules; the built-in ones of all installed frameworks by default.
        linear: as `Rule.linear`, which is the default.
        exact: as `Rule.exact`, which is the default.
        replaces_forward: as in `Claims`; by default, whether the rule has a `forward`.
        stops: as in `Claims`.
        key: what a rule that draws random numbers gets, as in `Rule.lift`.

    Returns:
        A report for each subject, and one for the comparison of the frameworks.

    Raises:
        CheckError: a check failed; its message has all that did.
        ArgumentError: `the_rule` is neither.

    Example:
        >>> import jax, jax.numpy as jnp, crossvjp as cv
        >>> from crossvjp.testing import CheckError, built_in_subjects, check_rule
        >>> @cv.rule
        ... def forgets(call, y_bar):  # the cotangent that flows in
        ...     return call.pullback(jax.tree.map(jnp.ones_like, y_bar))
        >>> try:
        ...     check_rule(forgets, built_in_subjects("plain")[:1])
        ... except CheckError as error:
        ...     print(str(error).splitlines()[1].split(" (")[0])
        plain mlp: homogeneous in y_bar: failed: AssertionError: the rule is said to be linear, but twice the cotangent
    """
    said = {"linear": linear, "exact": exact, "replaces_forward": replaces_forward}
    claims = claims_of(
        the_rule,
        stops=(stops,) if isinstance(stops, str) else tuple(stops),
        **{name: claim for name, claim in said.items() if claim is not None},
    )
    use = under_rule(the_rule, key)
    chosen = built_in_subjects() if subjects is None else check_subjects(subjects)
    reports = [run_all(RULE_CHECKS, subject.name, subject, use, claims) for subject in chosen]
    comparable = [subject for subject in chosen if subject.common is not None]
    reports.append(run_all([SAME_EVERYWHERE], "all frameworks", comparable, use))
    raise_failures(reports)
    return reports


def _times(factor: float, bars: list[Any]) -> list[Any]:
    return [bar * jnp.asarray(factor, bar.dtype) for bar in bars]


def _same_forward(subject: Subject, use: Use, claims: Claims) -> None:
    """The output, the state and the RNG streams of a differentiated call are those of the module alone."""
    if claims.replaces_forward:
        require(claims.exact, "the rule replaces the forward pass")
        close(
            _run(subject, use),
            _run(subject, call),
            "the rule claims to be the function itself, computed in another way",
        )
        return
    assert_same_bits(_run(subject, use), _run(subject, call))
    for name, around in {"grad": lambda run: run, "grad(jit)": jax.jit, "grad(remat)": jax.checkpoint}.items():
        seen, expected = (
            one_by_one(lambda use=use, around=around: Linearized(subject, use, around=around).seen)()
            for use in (use, call)
        )
        try:
            assert_same_bits(seen, expected)
        except AssertionError as error:
            raise AssertionError(f"the differentiated call gives another value, under {name}: {error}") from None


def _run(subject: Subject, use: Use) -> Any:
    return subject.run(subject.variables, subject.rest, use, *subject.inputs)


def _homogeneous(subject: Subject, use: Use, claims: Claims) -> None:
    """A rule that forgets the cotangent that flows in is not homogeneous."""
    require(claims.linear, "the rule is said not to be linear")
    linearized = Linearized(subject, use)
    y_bar = linearized.y_bar(0)
    for factor in (2.0, -1.0):  # powers of two, so that nothing rounds
        close(
            linearized(_times(factor, y_bar)),
            _times(factor, linearized(y_bar)),
            "the rule is said to be linear, but twice the cotangent (or its negative) does not give twice the "
            "gradient: is the cotangent that flows in forgotten? If it is meant, say linear=False",
        )


def _additive(subject: Subject, use: Use, claims: Claims) -> None:
    require(claims.linear, "the rule is said not to be linear")
    linearized = Linearized(subject, use)
    one, other = linearized.y_bar(0), linearized.y_bar(1)
    both = [a + b for a, b in zip(one, other, strict=True)]
    added = [a + b for a, b in zip(linearized(one), linearized(other), strict=True)]
    close(linearized(both), added, "the rule is said to be linear, but it is not additive; else say linear=False")


def _finite_at_zero(subject: Subject, use: Use, claims: Claims) -> None:
    linearized = Linearized(subject, use)
    bars = linearized([jnp.zeros_like(leaf) for leaf in linearized.out])
    assert all(np.isfinite(bar).all() for bar in numbers(bars)), (
        "a zero cotangent gives NaN or infinity: does the rule divide by a norm? Guard the division"
    )
    if claims.linear:
        assert not any(bool(jnp.any(bar)) for bar in bars), "a zero cotangent gives a gradient that is not zero"


def _no_missing_cotangent(subject: Subject, use: Use, claims: Claims) -> None:
    notes = _notes(subject, use)
    missing = [note for note in notes if note.came is None or note.came.dtype == jax.dtypes.float0]
    stopped = lambda path: any(fnmatch.fnmatchcase(path, glob) for glob in claims.stops)
    unsaid = [note for note in missing if not stopped(_path(note))]
    assert not unsaid, (
        f"the rule returns {unsaid[0]}, although it is differentiated: its gradient, and that of all that it was "
        f"computed from, becomes zero. If that is meant, say stops=[{_path(unsaid[0])!r}]"
    )
    said = {_path(note) for note in missing}
    zero = [
        f"{start}/*"
        for start, count in _silently_zero(subject, use)
        if not stopped(f"{start}/*") and sum(path.startswith(f"{start}/") for path in said) < count
    ]
    assert not zero, (
        f"the rule's cotangent of {zero[0]} is zero, but the function's own is not. "
        f"If that is meant, say stops=[{zero[0]!r}]"
    )


def _silently_zero(subject: Subject, use: Use) -> list[tuple[str, int]]:
    """Lists whole arguments, and their numbers of arrays, whose cotangent is zero where the function's own is not."""
    linearized, own = Linearized(subject, use), Linearized(subject, call)
    y_bar = own.y_bar(0)
    bars, own_bars = linearized(y_bar), own(y_bar)
    vanished = [not bool(jnp.any(bar)) and bool(jnp.any(own_bar)) for bar, own_bar in zip(bars, own_bars, strict=True)]
    inputs = len(inexact_and_others(subject.inputs)[0])
    found = [("variables", own.count)] if own.count and all(vanished[: own.count]) else []
    return found + ([("inputs", inputs)] if inputs and all(vanished[-inputs:]) else [])


def _path(note: Note) -> str:
    words = note.argument.replace("`", "").replace("'", "").split()
    start = ["variables"] if words == ["variables"] else ["inputs" if words[-1].isdigit() else "keywords", words[-1]]
    return "/".join([*start, *note.path])


def _notes(subject: Subject, use: Use) -> list[Note]:
    with noting() as notes:
        linearized = Linearized(subject, use)
        linearized(linearized.y_bar(0))
    # A pullback may be asked for a part of the output, and a rule need not speak of its own fields.
    return [note for note in notes if note.argument != "the output" and not note.argument.startswith("the field ")]


def _same_dtypes(subject: Subject, use: Use, claims: Claims) -> None:
    drifted = [note for note in _notes(subject, use) if note.came is not None and note.came.dtype != jax.dtypes.float0]
    assert not drifted, f"the rule returns {drifted[0]}: it is cast, but the computation had another precision"


def _state_cotangents(subject: Subject, use: Use, claims: Claims) -> None:
    """A gradient through the state that the call wrote arrives."""
    linearized, own = Linearized(subject, use), Linearized(subject, call)
    require(bool(own.after), "the module writes no state that has a gradient")
    nothing = [jnp.zeros_like(leaf) for leaf in own.out]
    through_state = [jnp.cos(leaf) for leaf in own.after]
    expected = own(nothing, through_state)
    bars = linearized(nothing, through_state)
    flowing = [bool(jnp.any(bar)) for bar in expected[: own.count]]
    require(any(flowing), "no gradient flows through the module's state to its variables")
    assert any(bool(jnp.any(bar)) for bar in bars[: own.count]), (
        "the gradient through the state that the call wrote does not reach the variables: a rule with `updates_bar` "
        "answers for it"
    )


def _exact(subject: Subject, use: Use, claims: Claims) -> None:
    require(claims.exact, "the rule does not claim to be the function's own derivative")
    linearized, own = Linearized(subject, use), Linearized(subject, call)
    y_bar = own.y_bar(0)
    through_state = [jnp.cos(leaf) for leaf in own.after]
    close(linearized(y_bar, through_state), own(y_bar, through_state), "the rule claims to be autodiff's gradient")


def _unused_output(subject: Subject, use: UnderRule, claims: Claims) -> None:
    """A loss may use one of two outputs alone; the cotangent of the other is a symbolic zero.

    Or an array of zeros, in JAX's coming custom_vjp: then only NaN shows.
    """
    on_two = use.on(_two_outputs)
    try:
        both = Linearized(subject, on_two)
        y_bar = both.y_bar(0)
        both(y_bar)
    except Exception as error:
        text = f"the rule can't be put on a function with two outputs: {type(error).__name__}: {error}"
        raise NotApplicableError(text[:200]) from error
    one = Linearized(subject, lambda mdl, *args, **kwargs: on_two(mdl, *args, **kwargs)[0])
    used, unused = y_bar[: len(one.out)], y_bar[len(one.out) :]
    bars = one(used)
    assert all(np.isfinite(bar).all() for bar in numbers(bars)), (
        "an output that the loss does not use gives NaN or infinity: does the rule divide by a norm of its cotangent?"
    )
    if claims.linear:
        zeros = [jnp.zeros_like(bar) for bar in unused]
        close(bars, both([*used, *zeros]), "an output that the loss does not use gives another gradient than zeros")


def _two_outputs(mdl: Any, *args: Any, **kwargs: Any) -> Any:
    out = mdl(*args, **kwargs)
    return out, [jnp.sin(leaf) for leaf in inexact_and_others(out)[0]]


RULE_CHECKS: Sequence[Check] = (
    Check("the forward pass is the function's own", _same_forward),
    Check("homogeneous in y_bar", _homogeneous),
    Check("additive in y_bar", _additive),
    Check("linear in the fields' cotangents", linear_in_fields),
    Check("finite at zero", _finite_at_zero),
    Check("no cotangent is missing", _no_missing_cotangent),
    Check("dtypes are those of the primals", _same_dtypes),
    Check("the state's cotangents arrive", _state_cotangents),
    Check("equal to autodiff", _exact),
    Check("an output may be unused", _unused_output),
    *UNDER_CHECKS,
)
