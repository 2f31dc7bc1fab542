"""`check_rule`: what a backward rule claims, checked on modules of every framework."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from .._arrays import is_inexact
from .._conform import Note, noting
from .._custom_vjp import custom_vjp
from .._errors import ArgumentError
from .._rule import Rule
from ._compare import assert_close, assert_same_bits, numbers
from ._one_by_one import one_by_one
from ._report import Check, NotApplicableError, Report, raise_failures, run_all
from ._subject import Subject, built_in_subjects, check_subjects
from ._transforms import inexact_and_others
from ._wraps import call

Use: TypeAlias = Callable[..., Any]
Functions: TypeAlias = tuple[Callable[..., Any], Callable[..., Any]]
"""`(forward_fn, backward_fn)`, as `custom_vjp` takes them."""


@dataclasses.dataclass(frozen=True)
class Claims:
    """What a rule says of itself.

    Args:
        linear: its cotangents are linear in `y_bar`.
        exact: they are those of autodiff, to rounding.
        replaces_forward: its forward pass gives another value than the function alone.
        stops: what it gives no cotangent for, on purpose: globs on paths that start with
            `variables/`, `inputs/<position>` or `keywords/<name>`.
    """

    linear: bool = True
    exact: bool = False
    replaces_forward: bool = False
    stops: tuple[str, ...] = ()


def check_rule(
    the_rule: Rule | Functions,
    subjects: Sequence[Subject] | None = None,
    *,
    linear: bool | None = None,
    exact: bool | None = None,
    replaces_forward: bool = False,
    stops: Sequence[str] = (),
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
        replaces_forward: as in `Claims`.
        stops: as in `Claims`.

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
    own = the_rule if isinstance(the_rule, Rule) else Rule
    claims = Claims(
        own.linear if linear is None else linear,
        own.exact if exact is None else exact,
        replaces_forward,
        (stops,) if isinstance(stops, str) else tuple(stops),
    )
    use = _use_of(the_rule)
    chosen = built_in_subjects() if subjects is None else check_subjects(subjects)
    reports = [run_all(RULE_CHECKS, subject.name, subject, use, claims) for subject in chosen]
    comparable = [subject for subject in chosen if subject.common is not None]
    reports.append(run_all([_SAME_EVERYWHERE], "all frameworks", comparable, use))
    raise_failures(reports)
    return reports


def _use_of(the_rule: Any) -> Use:
    if isinstance(the_rule, Rule):
        return the_rule.lift(call)
    if isinstance(the_rule, tuple) and len(the_rule) == 2 and all(map(callable, the_rule)):
        return custom_vjp(call, *the_rule)
    raise ArgumentError(f"`the_rule` must be a Rule or the pair (forward_fn, backward_fn), but is {the_rule!r}.")


class _Linearized:
    """One call of a subject, with its pullback: from cotangents of `(out, after)` to those of all arrays.

    `around` transforms the call before it is differentiated.
    """

    def __init__(self, subject: Subject, use: Use, inputs: Any = None, around: Callable[[Any], Any] = lambda run: run):
        arrays = subject.variables, subject.rest, subject.inputs if inputs is None else inputs
        primals, fill = inexact_and_others(arrays)

        def run(primals: list[Any]) -> tuple[list[Any], list[Any], Any]:
            variables, rest, inputs = fill(primals)
            out, after = subject.run(variables, rest, use, *inputs)
            return inexact_and_others(out)[0], inexact_and_others(after)[0], (out, after)

        def differentiable(primals: list[Any]) -> tuple[tuple[list[Any], list[Any]], Any]:
            out, after, seen = run(primals)
            return (out, after), seen

        (self.out, self.after), self._pull, self.seen = jax.vjp(around(differentiable), primals, has_aux=True)
        self.count = len(inexact_and_others(subject.variables)[0])

    def y_bar(self, seed: int) -> list[Any]:
        """Draws a cotangent of the output."""
        keys = jax.random.split(jax.random.key(seed), max(1, len(self.out)))
        return [jax.random.normal(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, self.out, strict=False)]

    def __call__(self, y_bar: list[Any], after_bar: list[Any] | None = None) -> list[Any]:
        zeros = [jnp.zeros_like(leaf) for leaf in self.after]
        return self._pull((y_bar, zeros if after_bar is None else after_bar))[0]


def _times(factor: float, bars: list[Any]) -> list[Any]:
    return [bar * jnp.asarray(factor, bar.dtype) for bar in bars]


def _same_forward(subject: Subject, use: Use, claims: Claims) -> None:
    """The output, the state and the RNG streams of a differentiated call are those of the module alone."""
    if claims.replaces_forward:
        raise NotApplicableError("the rule replaces the forward pass")
    assert_same_bits(_run(subject, use), _run(subject, call))
    for name, around in {"grad": lambda run: run, "grad(jit)": jax.jit, "grad(remat)": jax.checkpoint}.items():
        seen, expected = (
            one_by_one(lambda use=use, around=around: _Linearized(subject, use, around=around).seen)()
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
    _require(claims.linear, "the rule is said not to be linear")
    linearized = _Linearized(subject, use)
    y_bar = linearized.y_bar(0)
    for factor in (2.0, -1.0):  # powers of two, so that nothing rounds
        _close(
            linearized(_times(factor, y_bar)),
            _times(factor, linearized(y_bar)),
            "the rule is said to be linear, but twice the cotangent (or its negative) does not give twice the "
            "gradient: is the cotangent that flows in forgotten? If it is meant, say linear=False",
        )


def _additive(subject: Subject, use: Use, claims: Claims) -> None:
    _require(claims.linear, "the rule is said not to be linear")
    linearized = _Linearized(subject, use)
    one, other = linearized.y_bar(0), linearized.y_bar(1)
    both = [a + b for a, b in zip(one, other, strict=True)]
    added = [a + b for a, b in zip(linearized(one), linearized(other), strict=True)]
    _close(linearized(both), added, "the rule is said to be linear, but it is not additive; else say linear=False")


def _finite_at_zero(subject: Subject, use: Use, claims: Claims) -> None:
    linearized = _Linearized(subject, use)
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
    linearized, own = _Linearized(subject, use), _Linearized(subject, call)
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
        linearized = _Linearized(subject, use)
        linearized(linearized.y_bar(0))
    return [note for note in notes if note.argument != "the output"]  # a pullback may be asked for part of it


def _same_dtypes(subject: Subject, use: Use, claims: Claims) -> None:
    drifted = [note for note in _notes(subject, use) if note.came is not None and note.came.dtype != jax.dtypes.float0]
    assert not drifted, f"the rule returns {drifted[0]}: it is cast, but the computation had another precision"


def _state_cotangents(subject: Subject, use: Use, claims: Claims) -> None:
    """A gradient through the state that the call wrote arrives."""
    linearized, own = _Linearized(subject, use), _Linearized(subject, call)
    _require(bool(own.after), "the module writes no state that has a gradient")
    nothing = [jnp.zeros_like(leaf) for leaf in own.out]
    through_state = [jnp.cos(leaf) for leaf in own.after]
    expected = own(nothing, through_state)
    bars = linearized(nothing, through_state)
    flowing = [bool(jnp.any(bar)) for bar in expected[: own.count]]
    _require(any(flowing), "no gradient flows through the module's state to its variables")
    assert any(bool(jnp.any(bar)) for bar in bars[: own.count]), (
        "the gradient through the state that the call wrote does not reach the variables: a rule with `updates_bar` "
        "answers for it"
    )


def _exact(subject: Subject, use: Use, claims: Claims) -> None:
    _require(claims.exact, "the rule does not claim to be the function's own derivative")
    linearized, own = _Linearized(subject, use), _Linearized(subject, call)
    y_bar = own.y_bar(0)
    through_state = [jnp.cos(leaf) for leaf in own.after]
    _close(linearized(y_bar, through_state), own(y_bar, through_state), "the rule claims to be autodiff's gradient")


def _under(
    name: str,
    run: Callable[[Callable[[Any], Any], Any], list[Any]] = lambda bars, lanes: [bars(inputs) for inputs in lanes],
    around: Callable[[Any], Any] = lambda run: run,
) -> Check:
    """Compares gradients under a transform of them, or of the call, with those of each input alone, eagerly."""

    def check(subject: Subject, use: Use, claims: Claims) -> None:
        lanes = [subject.inputs, jax.tree.map(lambda x: -x if is_inexact(x) else x, subject.inputs)]
        y_bar = _Linearized(subject, use).y_bar(0)
        expected = [_Linearized(subject, use, inputs)(y_bar) for inputs in lanes]
        found = run(lambda inputs: _Linearized(subject, use, inputs, around)(y_bar), lanes)
        _close(found, expected, f"the rule gives another gradient under {name}")

    return Check(f"the same under {name}", check)


def _vmapped(bars: Callable[[Any], Any], lanes: list[Any]) -> list[Any]:
    stacked = jax.vmap(bars)(jax.tree.map(lambda *leaves: jnp.stack(leaves), *lanes))
    return [jax.tree.map(lambda leaf, lane=lane: leaf[lane], stacked) for lane in range(len(lanes))]


def _scanned(bars: Callable[[Any], Any], lanes: list[Any]) -> list[Any]:
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *lanes)
    _, found = jax.lax.scan(lambda carry, inputs: (carry, bars(inputs)), 0, stacked)
    return [jax.tree.map(lambda leaf, lane=lane: leaf[lane], found) for lane in range(len(lanes))]


def _require(condition: bool, reason: str) -> None:
    if not condition:
        raise NotApplicableError(reason)


def _close(one: Any, other: Any, message: str, rtol: float = 1e-5) -> None:
    try:
        assert_close(one, other, rtol)
    except AssertionError as error:
        raise AssertionError(f"{message} ({error})") from None


def _same_everywhere(subjects: Sequence[Subject], use: Use) -> None:
    """Compares the gradients of the subjects of one model, in the names and layouts that they share."""
    by_model: dict[str, list[Subject]] = {}
    for subject in subjects:
        by_model.setdefault(subject.model, []).append(subject)
    groups = [group for group in by_model.values() if len(group) > 1]
    _require(bool(groups), "fewer than two subjects are comparable")
    for first, *others in groups:
        expected = _common_bars(first, use)
        for other in others:
            _close(_common_bars(other, use), expected, f"{other.name} has another gradient than {first.name}")


def _common_bars(subject: Subject, use: Use) -> Any:
    def loss(variables: Any, inputs: Any) -> Any:
        out, _ = subject.run(variables, subject.rest, use, *inputs)
        return jnp.sum(out * jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape))

    variables_bar, inputs_bar = jax.grad(loss, argnums=(0, 1))(subject.variables, subject.inputs)
    assert subject.common is not None  # only such subjects are compared
    return subject.common(variables_bar), inputs_bar


RULE_CHECKS: Sequence[Check] = (
    Check("the forward pass is the function's own", _same_forward),
    Check("homogeneous in y_bar", _homogeneous),
    Check("additive in y_bar", _additive),
    Check("finite at zero", _finite_at_zero),
    Check("no cotangent is missing", _no_missing_cotangent),
    Check("dtypes are those of the primals", _same_dtypes),
    Check("the state's cotangents arrive", _state_cotangents),
    Check("equal to autodiff", _exact),
    _under("jit(grad)", lambda bars, lanes: [jax.jit(bars)(inputs) for inputs in lanes]),
    _under("grad(jit)", around=jax.jit),
    _under("remat", around=jax.checkpoint),
    _under("scan", _scanned),
    _under("vmap", _vmapped),
)

_SAME_EVERYWHERE = Check("the same in every framework", _same_everywhere)
