"""`check_rule` passes what is right, and catches each of the ways in which a rule goes wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import IMPLEMENTATIONS, custom_vjp_of, is_coming

import crossvjp as cv
from crossvjp.testing import (
    RULE_CHECKS,
    CheckError,
    Claims,
    Report,
    Subject,
    built_in_subjects,
    check_rule,
    identity,
    under_rule,
)

SUBJECTS = {subject.name: subject for subject in built_in_subjects("plain", "linen", "haiku")}
MLP, HALF, BLOCK = SUBJECTS["plain mlp"], SUBJECTS["plain mlp in bfloat16"], SUBJECTS["plain block"]

FORWARD = "the forward pass is the function's own"
HOMOGENEOUS = "homogeneous in y_bar"
ADDITIVE = "additive in y_bar"
FIELDS = "linear in the fields' cotangents"
FINITE = "finite at zero"
MISSING = "no cotangent is missing"
DTYPES = "dtypes are those of the primals"
STATE = "the state's cotangents arrive"
EXACT = "equal to autodiff"
UNUSED = "an output may be unused"
EVERYWHERE = "the same in every framework"
UNDER = "the same under "


def call(mdl, *args):
    return mdl(*args)


def forward(mdl, *args):
    return cv.vjp(call, mdl, *args)


def own(pullback, y_bar):
    return pullback(y_bar)


def on_variables(change: Callable[[Any], Any], **options: Any) -> Any:
    """Makes a rule that changes each parameter's cotangent."""

    def backward(call, y_bar):
        bar = call.pullback(y_bar)
        return bar.replace(variables=jax.tree.map(change, bar.variables))

    return cv.rule(**options)(backward)


def norm(tree: Any) -> Any:
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)))


def is_traced(tree: Any) -> bool:
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


class Scale(cv.Rule):
    """Scales the parameters' gradient."""

    factor: float = 3.0

    def backward(self, call, y_bar):
        bar = call.pullback(y_bar)
        return bar.replace(variables=jax.tree.map(lambda g: jnp.asarray(self.factor, g.dtype) * g, bar.variables))


@cv.rule(linear=False)
def sign_gradient(call, y_bar):
    bar = call.pullback(y_bar)
    return bar.replace(variables=jax.tree.map(jnp.sign, bar.variables))


@cv.rule
def reverse_gradient(call, y_bar):
    return jax.tree.map(jnp.negative, call.pullback(y_bar))


def clip_by_norm(max_norm: float, **options: Any) -> Any:
    @cv.rule(**options)
    def clip(call, y_bar):
        bar = call.pullback(y_bar)
        scale = jnp.minimum(1, max_norm / jnp.maximum(norm(bar), 1e-12))
        return jax.tree.map(lambda g: scale * g, bar)

    return clip


def rounded_forward(mdl, x):
    y, pullback = forward(mdl, x)
    return jnp.round(y), pullback


straight_through = rounded_forward, own


@cv.rule
def freeze(call, y_bar):
    return call.pullback(y_bar).replace(variables=None)


@cv.rule
def freeze_one(call, y_bar):
    bar = call.pullback(y_bar)
    leaves, treedef = jax.tree.flatten(bar.variables)
    return bar.replace(variables=treedef.unflatten([None, *leaves[1:]]))


@dataclasses.dataclass(frozen=True)
class Right:
    """A rule that keeps to what it claims."""

    name: str
    the_rule: Any
    claims: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


RIGHT = (
    Right("identity", identity, {"exact": True}),
    Right("scaling", Scale()),
    Right("sign", sign_gradient),
    Right("gradient reversal", reverse_gradient),
    Right("straight through", straight_through, {"replaces_forward": True}),
    Right("freezing", freeze, {"stops": ["variables/*"]}),
    Right("freezing one parameter", freeze_one, {"stops": ["variables/*/bias_1"]}),
)
NOT_CLAIMED = {
    FORWARD: "the rule replaces the forward pass",
    HOMOGENEOUS: "the rule is said not to be linear",
    ADDITIVE: "the rule is said not to be linear",
    STATE: "the module writes no state that has a gradient",
    EXACT: "the rule does not claim to be the function's own derivative",
    FIELDS: "the rule gives no cotangent for a field, but for channels",
    UNUSED: "a forward function belongs to one function",
    EVERYWHERE: "fewer than two subjects are comparable",
}


@pytest.mark.parametrize("right", RIGHT, ids=str)
def test_a_right_rule_passes_and_what_is_not_applicable_has_a_stated_reason(right: Right):
    of_subject, of_all = check_rule(right.the_rule, [MLP], **right.claims)
    assert [result.name for result in of_subject.results] == [check.name for check in RULE_CHECKS]
    assert [result.name for result in of_all.results] == [EVERYWHERE]
    expected = {EVERYWHERE, STATE, FIELDS}
    expected |= {FORWARD, UNUSED} if right.the_rule is straight_through else set()
    expected |= {HOMOGENEOUS, ADDITIVE} if right.the_rule is sign_gradient else set()
    expected |= {EXACT} if not right.claims.get("exact") else set()
    came = {result.name: result.message for result in (*of_subject["not applicable"], *of_all["not applicable"])}
    reasons = NOT_CLAIMED | ({FIELDS: NOT_CLAIMED[ADDITIVE]} if right.the_rule is sign_gradient else {})
    assert came == {name: reasons[name] for name in expected}
    assert {result.outcome for result in (*of_subject.results, *of_all.results)} <= {"passed", "not applicable"}


@cv.rule
def forgets_the_cotangent(call, y_bar):
    return call.pullback(jax.tree.map(jnp.ones_like, y_bar))


@cv.rule
def no_input(call, y_bar):
    bar = call.pullback(y_bar)
    return bar.replace(inputs=(None,) * len(bar.inputs))


@cv.rule
def adds_a_constant(call, y_bar):
    bar = call.pullback(y_bar)
    return bar.replace(variables=jax.tree.map(lambda g, w: g + 0.1 * w, bar.variables, call.variables))


@cv.rule
def ignores_updates_bar(call, y_bar, updates_bar=None):
    return call.pullback(y_bar)


@cv.rule(exact=True)
def makes_up_the_states_cotangent(call, y_bar, updates_bar=None):
    bar = call.pullback(y_bar)
    total = sum(jnp.sum(leaf) for leaf in jax.tree.leaves(updates_bar))
    return bar.replace(variables=jax.tree.map(lambda g: g + 7 * total, bar.variables))


def wider(mdl, *args):
    y, pullback = forward(mdl, *args)
    return y.astype(jnp.float32), pullback


def calls_twice(mdl, *args):
    call(mdl, *args)
    return forward(mdl, *args)


def folds_the_key(mdl, x, mean, key):
    return forward(mdl, x, mean, jax.random.fold_in(key, 1))


def folds_the_key_when_traced(mdl, x, mean, key):
    return forward(mdl, x, mean, jax.random.fold_in(key, 1) if is_traced((x, mean, key)) else key)


def next_number(mdl, *args):
    y, pullback = forward(mdl, *args)
    return jnp.nextafter(y, jnp.inf), pullback


@cv.rule(linear=False)
def normalizes(call, y_bar):
    bar = call.pullback(y_bar)
    return bar.replace(variables=jax.tree.map(lambda g: g / norm(bar.variables), bar.variables))


@cv.rule
def signs_and_keeps_the_norm(call, y_bar):
    """Homogeneous: twice the cotangent gives twice the norm."""
    bar = call.pullback(y_bar)
    return bar.replace(variables=jax.tree.map(lambda g: norm(bar.variables) * jnp.sign(g), bar.variables))


@cv.rule(linear=False, symbolic_zeros=False)
def normalizes_each_output(call, y_bar):
    return call.pullback(jax.tree.map(lambda bar: bar / norm(bar), y_bar))


@cv.rule
def counts_the_outputs(call, y_bar):
    """Linear, but an output that is not used is none."""
    count = len(jax.tree.leaves(y_bar))
    return jax.tree.map(lambda g: count * g, call.pullback(y_bar))


class RoundsTheOutput(cv.Rule):
    """Replaces the forward pass, and says that it computes the same in another way."""

    exact = True

    def forward(self, call):
        return jnp.round(call(call.variables, *call.inputs))

    def backward(self, call, y_bar):
        return call.pullback(y_bar)


@cv.rule
def looks_whether_it_is_traced(call, y_bar):
    bar = call.pullback(y_bar)
    factor = 2 if is_traced(y_bar) or is_traced(bar) else 1
    return jax.tree.map(lambda g: factor * g, bar)


@cv.rule
def needs_numbers(call, y_bar):
    scale = float(jnp.abs(call.output).max())
    return jax.tree.map(lambda g: scale * g, call.pullback(y_bar))


def divides_by_a_norm_on_the_host(vmap_method: str) -> cv.Rule:
    """All lanes arrive at once on the host, unless they are asked for one after the other."""

    def norm_on_host(g):
        return np.sqrt(np.square(g).sum()).astype(np.float32)

    def norm_of_lanes(g):
        return np.broadcast_to(norm_on_host(g), g.shape[: g.ndim - 2])

    @cv.rule(linear=False)
    def divides(call, y_bar):
        bar = call.pullback(y_bar)
        scalar = jax.ShapeDtypeStruct((), jnp.float32)
        size = jax.pure_callback(norm_of_lanes, scalar, bar.inputs[0], vmap_method=vmap_method)
        return jax.tree.map(lambda g: g / jnp.maximum(size, 1e-6), bar)

    return divides


@cv.rule
def raises(call, y_bar):
    raise RuntimeError("no backward pass here")


class LearnedScale(cv.Rule):
    """Scales the output by a learned number, whose cotangent is right, or forgets the one that flows in."""

    scale: Any = 2.0
    forgets: bool = cv.static(default=False)

    def forward(self, call):
        y = call(call.variables, *call.inputs)
        return self.scale * y, cv.Residuals(y=y)

    def backward(self, call, y_bar):
        through = jnp.ones_like(y_bar) if self.forgets else y_bar
        return call.pullback(self.scale * y_bar).with_fields(scale=jnp.sum(through * call.residuals.y))


@dataclasses.dataclass(frozen=True)
class Wrong:
    """A rule that is wrong in one way.

    Args:
        name: the mistake.
        the_rule: a rule, or `(forward_fn, backward_fn)`.
        checks: the checks that catch it.
        text: what their messages say.
        subject: where it shows.
        claims: what it claims beside.
    """

    name: str
    the_rule: Any
    checks: tuple[str, ...]
    text: str
    subject: Subject = MLP
    claims: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


def under(*names: str) -> tuple[str, ...]:
    return tuple(UNDER + name for name in names)


WRONG = (
    Wrong("forgets the cotangent", forgets_the_cotangent, (HOMOGENEOUS,), "is the cotangent that flows in forgotten?"),
    Wrong("is not zero at zero", adds_a_constant, (FINITE,), "a gradient that is not zero"),
    Wrong("no cotangent of the input", no_input, (MISSING,), "returns None for input 0, which is float32[5, 3]"),
    Wrong("no cotangent of the variables", freeze, (MISSING,), "returns None for `variables`, which is float32"),
    Wrong(
        "no cotangent of one parameter",
        freeze_one,
        (MISSING,),
        "`variables`, which is float32[4] at ['0']['0']['bias_1']",
    ),
    Wrong("zeros for the variables", on_variables(jnp.zeros_like), (MISSING,), "cotangent of variables/* is zero"),
    Wrong("drops the state", ignores_updates_bar, (STATE,), "does not reach the variables", SUBJECTS["linen block"]),
    Wrong(
        "wider parameters",
        on_variables(lambda g: g.astype(jnp.float32)),
        (DTYPES,),
        "returns float32[4] for `variables`, which is bfloat16[4] at ",
        HALF,
    ),
    # JAX's coming custom_vjp runs the function itself too, so that the two outputs are compared before.
    Wrong(
        "a wider output",
        (wider, own),
        (FORWARD,),
        "but wider float32[5, 2]" if is_coming() else "(dtypes float32, bfloat16 mismatch)",
        HALF,
    ),
    Wrong("two calls", (calls_twice, own), (FORWARD,), "gives another value, under grad", SUBJECTS["haiku block"]),
    Wrong("another key", (folds_the_key, own), (FORWARD,), "gives another value, under grad", BLOCK),
    Wrong("another key in jit", (folds_the_key_when_traced, own), (FORWARD,), "another value, under grad", BLOCK),
    Wrong("the next number", (next_number, own), (FORWARD,), "gives another value, under grad"),
    Wrong("NaN at zero", normalizes, (FINITE,), "does the rule divide by a norm?", claims={"linear": False}),
    Wrong("clips", clip_by_norm(0.5), (HOMOGENEOUS, ADDITIVE), "say linear=False"),
    Wrong("homogeneous alone", signs_and_keeps_the_norm, (ADDITIVE,), "it is not additive; else say linear=False"),
    Wrong("NaN at an unused output", normalizes_each_output, (UNUSED,), "by a norm of its cotangent?"),
    Wrong(
        "a field forgets the cotangent",
        LearnedScale(forgets=True),
        (FIELDS,),
        "of its field 'scale' is not homogeneous",
    ),
    Wrong("another forward pass", RoundsTheOutput(), (FORWARD,), "claims to be the function itself"),
    Wrong("not exact", Scale(), (EXACT,), "claims to be autodiff's gradient", claims={"exact": True}),
    Wrong(
        "not exact through the state",
        makes_up_the_states_cotangent,
        (EXACT,),
        "claims to be autodiff's gradient",
        SUBJECTS["linen block"],
    ),
    Wrong(
        "depends on being traced",
        looks_whether_it_is_traced,
        under("jit(grad)", "grad(jit)", "remat", "scan", "vmap"),
        "another gradient under ",
    ),
    Wrong("needs numbers", needs_numbers, under("jit(grad)", "grad(jit)", "scan", "vmap"), "ConcretizationTypeError"),
    Wrong(
        "one norm for all lanes",
        divides_by_a_norm_on_the_host("broadcast_all"),
        under("vmap"),
        "another gradient under vmap",
        claims={"linear": False},
    ),
)


def run(the_rule: Any, subject: Subject, *names: str, **claims: Any) -> Report:
    """Runs the checks of these names, on the claims of the rule and others."""
    said = ("linear", "exact", "replaces_forward")
    own = {name: getattr(the_rule, name) for name in said if isinstance(the_rule, cv.Rule)}
    checks = [check for check in RULE_CHECKS if check.name in names]
    assert len(checks) == len(names)
    return Report(
        subject.name, tuple(check.attempt(subject, under_rule(the_rule), Claims(**own | claims)) for check in checks)
    )


def passed(report: Report) -> set[str]:
    return {result.name for result in report["passed"]}


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_a_wrong_rule_is_caught_by_the_check_that_is_about_it(wrong: Wrong):
    report = run(wrong.the_rule, wrong.subject, *wrong.checks, **wrong.claims)
    assert [result.outcome for result in report.results] == ["failed"] * len(wrong.checks), report
    assert [result for result in report.results if wrong.text not in result.message] == []


@pytest.mark.parametrize("mode", IMPLEMENTATIONS)
def test_a_rule_that_takes_an_unused_output_for_no_zeros_is_caught_today_alone(mode):
    with custom_vjp_of(mode):
        (result,) = run(counts_the_outputs, MLP, UNUSED).results
    if mode == "coming":  # an unused output has zeros there, so that the rule can't see it
        assert result.outcome == "passed"
        return
    assert result.outcome == "failed"
    assert "gives another gradient than zeros" in result.message


def test_a_learned_field_with_a_right_cotangent_passes():
    subjects = [subject for subject in built_in_subjects("plain") if "mlp" in subject.name]
    assert any("bfloat16" in subject.name for subject in subjects)  # where sums round
    for of_subject in check_rule(LearnedScale(), subjects)[:-1]:
        assert FIELDS in {result.name for result in of_subject["passed"]}


def test_each_check_catches_a_wrong_rule():
    assert {check.name for check in RULE_CHECKS} == {name for wrong in WRONG for name in wrong.checks}


def test_under_vmap_each_lane_is_its_own():
    """A norm over the batch is one over the lane's, as on the lane alone; so no rule in plain JAX is wrong there."""
    for the_rule in (clip_by_norm(0.5, linear=False), divides_by_a_norm_on_the_host("sequential")):
        assert passed(run(the_rule, MLP, UNDER + "vmap")) == {UNDER + "vmap"}


def test_what_needs_state_and_randomness_passes_where_the_module_has_both():
    report = run(identity, SUBJECTS["haiku block"], FORWARD, STATE)
    assert passed(report) == {FORWARD, STATE}


def test_coarse_dtypes_pass():
    names = (FORWARD, HOMOGENEOUS, ADDITIVE, DTYPES, UNDER + "grad(jit)")
    assert passed(run(Scale(), HALF, *names)) == set(names)


def test_a_rule_says_of_itself_what_it_claims():
    says_exact = cv.rule(exact=True)(lambda call, y_bar: call.pullback(y_bar))
    assert passed(run(says_exact, MLP, EXACT)) == {EXACT}
    assert check_outcomes(says_exact, exact=False)[EXACT] == "not applicable"
    with pytest.raises(CheckError, match=HOMOGENEOUS):
        check_rule(sign_gradient, [MLP], linear=True)


def check_outcomes(the_rule: Any, **claims: Any) -> dict[str, str]:
    report, _ = check_rule(the_rule, [MLP], **claims)
    return {result.name: result.outcome for result in report.results}


@cv.rule
def by_names(call, y_bar):
    """Freezes what Flax calls a kernel."""

    def freeze_kernels(path, g):
        return 0 * g if "kernel" in jax.tree_util.keystr(path) else g

    bar = call.pullback(y_bar)
    return bar.replace(variables=jax.tree_util.tree_map_with_path(freeze_kernels, bar.variables))


@cv.rule
def by_shapes(call, y_bar):
    """Takes the first axis for that of the inputs, which in Equinox it is not."""

    def scale(g):
        return g / g.shape[0] if g.ndim == 2 else g

    bar = call.pullback(y_bar)
    return bar.replace(variables=jax.tree.map(scale, bar.variables))


@pytest.mark.parametrize(("the_rule", "others"), [(by_names, "haiku"), (by_shapes, "equinox")], ids=["names", "shapes"])
def test_a_rule_that_depends_on_the_framework_is_caught(the_rule, others):
    subjects = [subject for subject in built_in_subjects("plain", others) if subject.common is not None]
    with pytest.raises(CheckError, match=f"^1 check failed.\nall frameworks: {EVERYWHERE}.*{others} mlp has another"):
        check_rule(the_rule, subjects)


def test_a_rule_that_raises_fails_every_check_that_runs_it_with_its_own_error():
    with pytest.raises(CheckError, match="RuntimeError: no backward pass here") as caught:
        check_rule(raises, [MLP])
    of_subject, of_all = caught.value.reports
    outcomes = {result.name: result.outcome for result in of_subject.results}
    assert {name for name, outcome in outcomes.items() if outcome != "failed"} == {
        FORWARD,
        FIELDS,
        STATE,
        EXACT,
        UNUSED,
    }
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert [result.outcome for result in of_all.results] == ["not applicable"]


def test_the_message_of_the_error_lists_every_failure_with_its_subject_and_its_check():
    # JAX's coming custom_vjp has zeros for an output that is not used, and the rule makes ones of them too.
    names = (HOMOGENEOUS, ADDITIVE, FINITE) if is_coming() else (HOMOGENEOUS, ADDITIVE, FINITE, UNUSED)
    with pytest.raises(CheckError, match=rf"^{2 * len(names)} checks failed\.\n") as caught:
        check_rule(forgets_the_cotangent, [MLP, dataclasses.replace(MLP, name="another")])
    failed = [line.split(": failed: ")[0] for line in str(caught.value).splitlines() if ": failed: " in line]
    assert failed == [f"{subject}: {name}" for subject in ("plain mlp", "another") for name in names]
    assert [len(report["failed"]) for report in caught.value.reports] == [len(names), len(names), 0]


@pytest.mark.parametrize("stops", [["inputs/0"], ["inputs/*"], ["*"]], ids=str)
def test_a_stopped_input_is_said_by_its_position_or_a_glob(stops):
    assert passed(run(no_input, MLP, MISSING, stops=tuple(stops))) == {MISSING}


@pytest.mark.parametrize("stops", [["variables/*"], ["variables/*/kernel_?", "variables/*/bias_?"], ["*"]], ids=str)
def test_stopped_variables_are_said_all_at_once_or_one_by_one(stops):
    assert passed(run(freeze, MLP, MISSING, stops=tuple(stops))) == {MISSING}


def test_what_is_not_stopped_is_still_missing():
    report = run(no_input, MLP, MISSING, stops=("variables/*", "inputs/1"))
    assert "say stops=['inputs/0']" in report["failed"][0].message


@pytest.mark.parametrize(
    "wrong",
    [Scale, lambda call, y_bar: call.pullback(y_bar), (forward,), (forward, "backward"), [forward, own], None],
    ids=["a class", "a function", "one function", "a string", "a list", "None"],
)
def test_what_is_no_rule_is_refused(wrong):
    with pytest.raises(cv.ArgumentError, match=r"`the_rule` must be a Rule or the pair \(forward_fn, backward_fn\)"):
        check_rule(wrong, [MLP])


def test_an_unknown_framework_is_refused_by_its_name():
    with pytest.raises(cv.ArgumentError, match="plain, linen, nnx, haiku, equinox, but none of 'torch'"):
        built_in_subjects("torch")


@pytest.mark.parametrize("subjects", [[], MLP, ["plain mlp"]], ids=["none", "a bare one", "a name"])
def test_what_is_no_sequence_of_subjects_is_refused(subjects):
    with pytest.raises(cv.ArgumentError, match="Expected one Subject or more, in a sequence, but there is "):
        check_rule(identity, subjects)
