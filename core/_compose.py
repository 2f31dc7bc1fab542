"""`compose`: one rule around another."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from ._call import Call, Part
from ._cotangents import Cotangents
from ._errors import ArgumentError
from ._inputs import has_parameter
from ._residuals import Residuals, with_residuals
from ._rule import Rule

_INNER = "the fields of rules inside"


def compose(*rules: Rule) -> Composed:
    """Puts rules around each other: the first sees the second's pullback as the module's own, and so on.

    The cotangent that flows in goes through the first rule first, and the gradient comes out of it last:
    `compose(clip, scale)` scales and then clips.

    Args:
        *rules: at least one. Each keeps its fields, whose gradients are found at `.rules[index]`.

    Returns:
        A rule, with its own forward pass if one of them has. Each draws random numbers from a key of its own.

    Raises:
        ArgumentError: one is no rule, or asks for the cotangents of the updates.

    Example:
        >>> import jax.numpy as jnp, crossvjp as cv
        >>> def on_gradient(f):
        ...     return cv.rule(lambda call, y_bar: (bar := call.pullback(y_bar)).replace(variables=f(bar.variables)))
        >>> sign, double = on_gradient(jnp.sign), on_gradient(lambda g: 2 * g)
        >>> both = compose(sign, double), compose(double, sign)
        >>> [float(jax.grad(rule.lift(lambda w, x: w * x))(3.0, 5.0)) for rule in both]
        [1.0, 2.0]
    """
    for index, the_rule in enumerate(rules or (None,)):
        if not isinstance(the_rule, Rule):
            raise ArgumentError(f"`compose` takes rules, the outermost first, but argument {index} is {the_rule!r}.")
        if has_parameter(the_rule.own_backward, "updates_bar"):
            raise ArgumentError(
                f"{the_rule.described()} asks for the cotangents of the updates, which can't be handed through other "
                "rules. Put it on the module by itself."
            )
    flat = [part for the_rule in rules for part in (the_rule.rules if isinstance(the_rule, Composed) else (the_rule,))]
    return Composed(tuple(flat))


class Composed(Rule):
    """Rules around each other, the outermost first."""

    rules: tuple[Rule, ...]

    @property
    def linear(self) -> bool:
        """Whether all are."""
        return all(part.linear for part in self.rules)

    @property
    def exact(self) -> bool:
        """Whether all are."""
        return all(part.exact for part in self.rules)

    @property
    def pure(self) -> bool:
        """Whether all are."""
        return all(part.pure for part in self.rules)

    @property
    def reads_names(self) -> bool:
        """Whether one does."""
        return any(part.reads_names for part in self.rules)

    @property
    def symbolic_zeros(self) -> bool:
        """Whether all take `None` for a zero."""
        return all(part.symbolic_zeros for part in self.rules)

    @property
    def needs_variables(self) -> bool:
        """Whether one does."""
        return any(part.needs_variables for part in self.rules)

    @property
    def replaces_forward(self) -> bool:
        """Whether one does."""
        return any(part.replaces_forward for part in self.rules)

    def forward(self, call: Call) -> Any:
        """Runs the forward pass of the outermost rule that has one."""
        chain = _Chain(self.rules, call)
        return chain.forward(0), Residuals(levels=chain.levels)

    def backward(self, call: Call, y_bar: Any) -> Any:
        """Runs the outermost rule, which runs the others as its pullback."""
        chain = _Chain(self.rules, call, call.residuals.levels if self.replaces_forward else None)
        bar = chain.answer(0, y_bar)
        given = bar.fields[_INNER]
        fields = [{**dict.fromkeys(part.data_fields()), **own} for part, own in zip(self.rules, given, strict=True)]
        return bar.replace(fields={"rules": tuple(fields)})


class _Chain:
    """Rules on one call.

    Args:
        rules: the outermost first.
        call: the call of the module.
        levels: by place, the output and the residuals at each rule, after a forward pass.
    """

    def __init__(self, rules: Sequence[Rule], call: Call, levels: dict[int, Any] | None = None):
        self._rules = rules
        self._call = call
        self._replaced = levels is not None
        self.levels = dict(levels or {})

    def forward(self, index: int) -> Any:
        """Runs the forward pass as the rule at a place gives it, and notes what all below keep."""
        if index == len(self._rules):
            return self._call(self._call.variables, *self._call.inputs, **self._call.keywords)
        the_rule = self._rules[index]
        below = any(part.replaces_forward for part in self._rules[index + 1 :])
        y = self.forward(index + 1) if below or not the_rule.replaces_forward else None
        extra = Residuals()
        if the_rule.replaces_forward:
            y, extra = with_residuals(the_rule.forward(self._seen(index)))
        self.levels[index] = y, extra
        return y

    def answer(self, index: int, y_bar: Any) -> Cotangents:
        """Runs the backward pass of the rule at a place."""
        the_rule = self._rules[index]
        seen = self._seen(index)
        bar = self._call.as_cotangents(the_rule.own_backward(seen, y_bar), the_rule.described())
        own = {name: field for name, field in bar.fields.items() if name != _INNER}
        below = len(self._rules) - index - 1
        inner = bar.fields.get(_INNER, ({},) * below)
        if _INNER not in bar.fields and any(self._perturbed(place) for place in range(index + 1, len(self._rules))):
            raise ArgumentError(
                f"{the_rule.described()} stands around a rule whose fields are differentiated, but its answer has lost "
                "their cotangents. Make the answer of what call.pullback returned, by bar.replace(...)."
            )
        return bar.replace(fields={_INNER: (own, *inner)})

    def _perturbed(self, index: int) -> bool:
        return any(jax.tree.leaves(self._flags(index)))

    def _flags(self, index: int) -> dict[str, Any]:
        flags = self._call.perturbed.fields
        if "rules" not in flags:
            return {}
        return {name: getattr(flags["rules"][index], name) for name in self._rules[index].data_fields()}

    def _seen(self, index: int) -> Call:
        """Gives what the rule at a place sees."""
        base = self._call
        last = index == len(self._rules) - 1
        parts: dict[str, Part] = {
            **base.parts,
            "perturbed": lambda: base.perturbed.replace(fields=self._flags(index)),
            "key": lambda: None if base.parts["key"]() is None else jax.random.fold_in(base.parts["key"](), index),
        }
        if index in self.levels:
            parts["output"] = lambda: self.levels[index][0]
            parts["residuals"] = lambda: self.levels[index][1]
        elif self._replaced:  # what the module would have given, had a rule outside not replaced it
            parts["output"] = lambda: base(base.variables, *base.inputs, **base.keywords)
        if not last:
            parts["pullback"] = lambda: lambda y_bar: self.answer(index + 1, y_bar)
        return Call(base.site if last else _Below(self._rules[index + 1 :], base), parts)


class _Below:
    """The rules inside and the module, as a site for the rule outside of them."""

    def __init__(self, rules: Sequence[Rule], call: Call):
        self._rules = rules
        self._call = call

    def run(self, variables: Any, inputs: Sequence[Any], keywords: Mapping[str, Any]) -> Any:
        """Runs the function under the rules inside."""
        return _Chain(self._rules, self._call.at(variables, *inputs, **keywords)).forward(0)

    def conform_at(
        self, variables: Any, inputs: Sequence[Any], keywords: Mapping[str, Any]
    ) -> Callable[[Any, str], Cotangents]:
        """Gives the check of a rule's answer there."""
        return self._call.site.conform_at(variables, inputs, keywords)

    def linearize(
        self, variables: Any, inputs: Sequence[Any], keywords: Mapping[str, Any]
    ) -> tuple[Any, Callable[[Any], Cotangents], Any]:
        """Runs it, and gives the pullback of the rules inside."""
        at = self._call.at(variables, *inputs, **keywords)
        out, pullback, outcome = self._call.site.linearize(variables, inputs, keywords)
        own = {"output": lambda: out, "pullback": lambda: pullback}
        there = Call(at.site, {**at.parts, **own})
        chain = _Chain(self._rules, there)
        y = chain.forward(0) if any(part.replaces_forward for part in self._rules) else out
        chain = _Chain(self._rules, there, chain.levels or None)
        return y, lambda y_bar: chain.answer(0, y_bar).replace(fields={}), outcome
