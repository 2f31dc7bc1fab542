"""`attach` and `detach`: rules on models that nobody edits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from ._attachment import Attachment, Choice, Chosen, Group
from ._errors import ArgumentError
from ._models import models_of
from ._rule import Rule

M = TypeVar("M")


def attach(
    model: M,
    rule: Chosen = None,
    *,
    where: Any,
    methods: str | Sequence[str] | None = None,
    key: Any = None,
    must_match: bool = True,
) -> M:
    """Puts a rule on the chosen modules of a model, wherever they are called, without an edit of the model.

    Every call of a chosen module runs under the rule: of a shared module, twice of the same, in loops and
    under transforms of the framework. A module's calls of its own methods belong to the call that came from
    outside. A chosen module inside of a chosen module has both rules: the outer one sees a module whose
    pullback has the inner one in it. A part of the model that is an attached model itself keeps its rules.

    Args:
        model: a Linen module that is not bound, an NNX module, an Equinox module, `hk.Transformed`,
            `hk.TransformedWithState`, or a function. In a function, and in every other model, modules of Linen
            and Haiku that run inside are found too; the function is itself a module, with the path "", whose
            variables are its first argument.
        rule: the rule; or a function `(path, module) -> rule` that gives each chosen module its own, or
            `None` for no rule. It is asked at each call, with the module as it is then: a step that follows
            the weights follows them through training. In Equinox and NNX `attach` asks it too, and what has
            no rule there gets none later.
        where: what is chosen:

            - a class: the modules of that class and its subclasses;
            - a string: a path or glob, on the path joined by `/`; a `*` also matches `/`, and "" is the model itself;
            - a compiled regex, searched in the same path;
            - a predicate `(path, module) -> bool`, with the path as a tuple;
            - a tuple of these, of which any may match; `True` for every module;
            - `crossvjp.function("relu")`: functions by name;
            - a list of pairs (where, rule), of which the first that matches wins; then `rule` is not given.
        methods: the methods that count as calls; all public ones if `None`.
        key: a PRNG key for rules that draw random numbers; each path gets its own, and each call of a function
            that is chosen by name.
        must_match: whether a choice that matches nothing is an error. Linen and Haiku make their modules
            while they run, so there it is raised when the model is initialised or called.

    Returns:
        A model of the same kind, whose variables have the same paths, names, shapes and metadata, so that
        checkpoints of one load into the other. The model that was given stays as it is. In NNX the returned
        one has variables of its own. In Linen and Haiku the rules are the model's: a submodule that is taken out,
        `model.bind(variables).head`, has none. In Equinox and NNX they are the modules'.

    Raises:
        ArgumentError: a choice means nothing, matches nothing, can't be wrapped, or a call would have rules
            of two attachments.
        HandleError: the model is none, or belongs to a trace where it can't be exchanged.

    Example:
        >>> import jax, jax.numpy as jnp, crossvjp
        >>> @crossvjp.rule
        ... def guided(call, y_bar):
        ...     x, = call.inputs
        ...     return crossvjp.Cotangents((y_bar * (y_bar > 0) * (x > 0),), {})
        >>> net = lambda w, x: jnp.sum(jax.nn.relu(x) * w)
        >>> shown = attach(net, guided, where=crossvjp.function("relu"))
        >>> jax.grad(net, 1)(-1.0, 2.0).item(), jax.grad(shown, 1)(-1.0, 2.0).item()
        (-1.0, 0.0)
    """
    group = Group(_choices(rule, where), _method_names(methods), key, must_match)
    models = models_of(model)
    before = models.attachment_of(model)
    groups = (*before.groups, group) if before else (group,)
    return models.attach(model, Attachment(groups))


def detach(model: M) -> M:
    """Gives the plain model back.

    Args:
        model: what `attach` returned, or a copy of it with other variables.

    Returns:
        The model without rules, with the variables that it has now; in Equinox and NNX its parts have none either.
        A model without rules comes back as it is.

    Raises:
        HandleError: it is no model.
    """
    return models_of(model).detach(model)


def _choices(rule: Any, where: Any) -> tuple[Choice, ...]:
    if isinstance(where, list):
        if rule is not None:
            raise ArgumentError(
                f"`where` is a list of pairs (where, rule), which name the rules, but `rule` is given too: {rule!r}."
            )
        if not where:
            raise ArgumentError("`where` is an empty list: it must have at least one pair (where, rule).")
        for pair in where:
            if not isinstance(pair, tuple) or len(pair) != 2 or not _is_chosen(pair[1]):
                raise ArgumentError(
                    "A list as `where` must hold pairs (where, rule), with a rule, a function (path, module) -> rule "
                    f"or None, but holds {pair!r}. Choices of which any may match are a tuple."
                )
        return tuple(_choice(one, its_rule) for one, its_rule in where)
    if rule is None or not _is_chosen(rule):
        raise ArgumentError(f"`rule` must be a crossvjp.Rule or a function (path, module) -> rule, but is {rule!r}.")
    return (_choice(where, rule),)


def _choice(where: Any, rule: Chosen) -> Choice:
    choice = Choice(where, rule)
    _ = choice.matches  # what means nothing is refused now
    return choice


def _is_chosen(rule: Any) -> bool:
    is_function: Callable[[Any], bool] = callable
    return rule is None or isinstance(rule, Rule) or (is_function(rule) and not isinstance(rule, type))


def _method_names(methods: Any) -> frozenset[str] | None:
    if methods is None:
        return None
    names = (methods,) if isinstance(methods, str) else tuple(methods) if isinstance(methods, Iterable) else ()
    if not names or not all(isinstance(name, str) for name in names):
        raise ArgumentError(f"`methods` must be names of methods, but is {methods!r}.")
    return frozenset(names)
