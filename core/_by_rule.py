"""A `Rule` as the backward pass, and perhaps the forward pass, of one wrapped call.

The rule's `backward` is traced once on types alone, in the forward pass, and only what its results depend on
is kept. Where it can't be traced so, everything is kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
from jax.custom_derivatives import SymbolicZero

from ._arrays import ArrayType, Layout, Printed, is_inexact, take_apart
from ._behaviour import Answer, Perturbed, Primals, is_coming, run_alone
from ._call import Call, Part
from ._closures import name_of
from ._conform import Expected
from ._cotangents import Cotangents
from ._errors import ArgumentError, CotangentError
from ._inputs import has_parameter
from ._kept import GROUPS, Kept
from ._needed import dead_pullback, formally, needed
from ._one_call import is_zero
from ._own_functions import own_functions, with_functions
from ._pullback import Pullback, zero_of
from ._residuals import Residuals, with_residuals
from ._session import Outcome, Session
from ._site import Site

if TYPE_CHECKING:
    from ._rule import Rule


class ByRule:
    """The behaviour of a wrapped call whose backward pass is a `Rule`."""

    symbolic_zeros = True

    def __init__(self, the_rule: Rule, key: Any):
        arrays, self._layout = take_apart((the_rule, key))
        self.arrays: Sequence[Any] = arrays
        self.key = self._layout if the_rule.pure else None
        self.reads_names = the_rule.reads_names
        self._replaces = the_rule.replaces_forward
        functions = own_functions(the_rule)
        self.forward_functions: Sequence[Any] = functions if self._replaces else []
        self.backward_functions: Sequence[Any] = [] if self._replaces else functions
        self._types = list(map(ArrayType.of, arrays))
        self.asks_updates = has_parameter(the_rule.own_backward, "updates_bar")
        self.can_be_compared = not (self._replaces or self.asks_updates)
        self._needs_variables = the_rule.needs_variables
        self._zeros_as_none = the_rule.symbolic_zeros

    @property
    def author(self) -> str:
        return repr(self._layout.fill(map(Printed, self._types))[0])

    def check(self, session: Session) -> None:
        if self._needs_variables and not session.variables:
            raise ArgumentError(
                f"{self.author} acts on variables, but the module has none that are differentiable and that "
                "`grad_vars` selects. Put it on a module with parameters."
            )

    def release(self) -> None:
        self.arrays = []

    def run(self, session: Session, primals: Primals) -> Outcome:
        if not self._replaces:
            return run_alone(session, primals)
        groups = (primals.own, primals.variables, primals.context, primals.arrays)
        return self._replaced(session, primals, Perturbed(*(tuple(False for _ in group) for group in groups)))[0]

    def forward(self, session: Session, primals: Primals, perturbed: Perturbed) -> tuple[Outcome, Kept]:
        outcome, extra, pullback, failure = self._first_run(session, primals, perturbed)
        everything = Kept.everything(primals, outcome, extra, perturbed)
        found = self._needed(session, everything, [False] * len(outcome.arrays))
        kept, results = (everything, None) if found is None else (everything.only(found[0]), found[1])
        if results is not None and not any(results):
            return outcome, kept.without_pullback(pullback)
        if failure:
            raise failure
        if pullback is None:
            try:
                _, pullback = _linearized(session, primals)
            except Exception:
                if results is not None:
                    raise
                return outcome, kept  # the rule may never ask for it
        return outcome, kept.with_pullback(pullback, results)

    def backward(self, session: Session, residuals: Kept, y_bar: Any, updates_bar: Any) -> Answer:
        zeros = list(map(is_zero, jax.tree.leaves(y_bar)))
        mixed = self._zeros_as_none and any(zeros) and not all(zeros)
        if mixed:
            self._check_kept(session, residuals, zeros)
        pullback = residuals.filled_pullback() or dead_pullback(session)
        try:
            return self._answer(session, residuals, pullback, jax.tree.map(self._shown, y_bar), updates_bar)
        except (TypeError, ValueError, AttributeError) as error:
            if mixed:
                error.add_note(
                    "`y_bar` has None for outputs that nothing depends on. A rule that calculates with several "
                    "outputs says symbolic_zeros = False and gets zeros there."
                )
            raise

    def formal_backward(self, session: Session, primals: Primals, outcome: Outcome) -> list[Any] | None:
        if len(outcome.arrays) != 1:  # of several, some may come without a cotangent
            return None
        groups = (primals.own, primals.variables, primals.context, primals.arrays)
        everywhere = Perturbed(*(tuple(map(is_inexact, group)) for group in groups))
        everything = Kept.everything(primals, outcome, Residuals(), everywhere)
        results, touched = formally(session, everything, functools.partial(self._answer, session), absent=self._absent)
        return None if "perturbed" in touched else results

    def _first_run(
        self, session: Session, primals: Primals, perturbed: Perturbed
    ) -> tuple[Outcome, Residuals, Pullback | None, Exception | None]:
        """Runs the forward pass; gives the pullback too, or why there is none."""
        if self._replaces:
            return *self._replaced(session, primals, perturbed), None, None
        try:
            outcome, pullback = _linearized(session, primals)
        except Exception as error:  # a function without a derivative is no mistake where the rule asks for none
            return run_alone(session, primals), Residuals(), None, error
        return outcome, Residuals(), pullback, None

    def _shown(self, bar: Any) -> Any:
        return self._absent(bar) if is_zero(bar) else bar

    def _absent(self, like: ArrayType | SymbolicZero) -> Any:
        """What `y_bar` has for an output without a cotangent."""
        return None if self._zeros_as_none else zero_of(like)

    def _rule(self, session: Session, own: Sequence[Any]) -> tuple[Rule, Any]:
        the_rule, key = self._layout.fill(own)
        return with_functions(the_rule, session.functions), key

    def _replaced(self, session: Session, primals: Primals, perturbed: Perturbed) -> tuple[Outcome, Residuals]:
        """Runs the rule's own forward pass."""
        the_rule, key = self._rule(session, primals.own)
        site = Site(session, lambda: primals.context)
        inputs, keywords = session.inputs.rebuild(primals.arrays, ())
        parts: dict[str, Part] = {
            "variables": lambda: jax.tree.unflatten(session.variables_def, primals.variables),
            "inputs": lambda: inputs,
            "keywords": lambda: keywords,
            "key": lambda: key,
            "perturbed": lambda: self._flags(session, the_rule, perturbed),
        }
        y, extra = with_residuals(the_rule.forward(Call(site, parts)))
        arrays, layout = take_apart(y)
        seen = site.seen or _on_types(session, primals)
        if not _alike(arrays, layout, seen):  # its runs of the module may have been on parts of the inputs
            own = _on_types(session, primals)
            if not _alike(arrays, layout, own):
                raise self._wrong_output(session, y, layout.fill(str(ArrayType.of(array)) for array in arrays), own)
        state = site.seen_here or (run_alone(session, primals) if seen.updates else seen)
        return Outcome(arrays, layout, state.updates, state.updates_layout), extra

    def _wrong_output(self, session: Session, y: Any, came: Any, own: Outcome) -> ArgumentError:
        shown = own.layout.fill(map(str, own.output_types))
        hint = ""
        if isinstance(y, tuple) and len(y) == 2:
            hint = " What `backward` needs beside the output goes into Residuals: return (y, Residuals(name=...))."
        return ArgumentError(
            f"`forward` of {self.author} must return an output like that of {name_of(session.fn)}, {shown}, but "
            f"returned {came}.{hint}"
        )

    def _flags(self, session: Session, the_rule: Rule, perturbed: Perturbed) -> Cotangents:
        flags = session.signature.build(perturbed.variables, perturbed.arrays, "inputs_first")
        own = iter(perturbed.own)
        fields = {
            name: layout.fill_arrays_only([next(own) for _ in range(count)])
            for name, layout, count in _fields(the_rule)
        }
        return flags.replace(fields=fields)

    def _needed(
        self, session: Session, everything: Kept, zeros: Sequence[bool]
    ) -> tuple[dict[str, list[bool]], list[bool]] | None:
        run = functools.partial(self._answer, session)
        return needed(session, everything, run, asks_updates=self.asks_updates, absent=self._absent, zeros=zeros)

    def _check_kept(self, session: Session, kept: Kept, zeros: Sequence[bool]) -> None:
        """Refuses a rule that needs more where some outputs have no cotangent than where all have one."""
        found = self._needed(session, Kept({name: kept.group(name) for name in GROUPS}, [], kept.facts), zeros)
        for name, able in (found or ({}, []))[0].items():
            for array, needs, type_ in zip(kept.groups[name], able, kept.facts.types[name], strict=True):
                if array is None and needs and type_ is not None:
                    raise ArgumentError(
                        f"{self.author} needs {type_} of its {name} only where part of `y_bar` is None, so it was not "
                        "kept. Say symbolic_zeros = False, and zeros stand there."
                    )

    def _answer(
        self, session: Session, kept: Kept, pullback: Callable[[Any], Cotangents], y_bar: Any, updates_bar: Any
    ) -> Answer:
        """Runs `backward` and checks what it returned."""
        facts = kept.facts
        the_rule, key = self._rule(session, kept.group("own"))
        parts: dict[str, Part] = {
            "variables": lambda: jax.tree.unflatten(session.variables_def, kept.group("variables")),
            "inputs": lambda: session.inputs.rebuild(kept.group("arrays"), ())[0],
            "keywords": lambda: session.inputs.rebuild(kept.group("arrays"), ())[1],
            "output": lambda: facts.output.fill(kept.group("output")),
            "residuals": lambda: facts.extra.fill(kept.group("extra")),
            "perturbed": lambda: self._flags(session, the_rule, kept.looked_at_perturbed()),
            "key": lambda: key,
            "pullback": lambda: pullback,
            "conform": lambda: session.as_cotangents,
        }
        asked = {"updates_bar": updates_bar} if self.asks_updates else {}
        call = Call(Site(session, lambda: kept.group("context")), parts)
        result = the_rule.own_backward(call, y_bar, **asked)
        inputs, keywords, variables = session.signature.expected().conform(result, "inputs_first", self.author)
        fields = result.fields if isinstance(result, Cotangents) else {}
        return Answer(inputs, keywords, variables, self._own_bars(the_rule, fields, kept))

    def _own_bars(self, the_rule: Rule, given: Any, kept: Kept) -> list[Any]:
        """Lists the cotangents of the rule's own arrays."""
        facts = kept.facts
        fields = _fields(the_rule)
        unknown = sorted(set(given) - {name for name, _, _ in fields})
        if unknown:
            raise CotangentError(
                f"{self.author} returned a cotangent for its field {unknown[0]!r}, but its fields that may be arrays "
                f"are {[name for name, _, _ in fields]}."
            )
        types: list[Any] = facts.types["own"]
        bars: list[Any] = []
        for name, layout, count in fields:
            own = slice(len(bars), len(bars) + count)
            if self._replaces and name not in given and any(facts.perturbed.own[own]) and not is_coming():
                raise CotangentError(
                    f"{self.author} has its own forward pass, and its field {name!r} is differentiated, but `backward` "
                    f"gives no cotangent for it. Return bar.with_fields({name}=...), or put jax.lax.stop_gradient "
                    "around the field."
                )
            bars += Expected(f"the field `{name}`", layout, types[own]).conform(given.get(name), self.author)
        return bars + [None] * (len(types) - len(bars))


def _alike(arrays: list[Any], layout: Layout, seen: Outcome) -> bool:
    return layout == seen.layout and tuple(map(ArrayType.of, arrays)) == seen.output_types


def _linearized(session: Session, primals: Primals) -> tuple[Outcome, Pullback]:
    return session.linearize(primals.variables, primals.context, primals.arrays, "inputs_first")


def _on_types(session: Session, primals: Primals) -> Outcome:
    """Finds the types of the module's own results without computing them."""
    cell: list[Outcome] = []

    def run(variables: list[Any], context: list[Any], arrays: list[Any]) -> list[Any]:
        cell.append(session.run(session.fn, variables, context, arrays))
        return [*cell[0].arrays, *cell[0].updates]

    jax.eval_shape(run, primals.variables, primals.context, primals.arrays)
    return cell[0].with_types()


def _fields(the_rule: Rule) -> list[tuple[str, Layout, int]]:
    """Lists the rule's fields that may hold arrays: the name, the layout, and how many arrays it has."""
    found = []
    for name in the_rule.data_fields():
        arrays, layout = take_apart(getattr(the_rule, name))
        found.append((name, layout, len(arrays)))
    return found
