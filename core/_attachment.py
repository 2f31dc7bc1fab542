"""Which calls of an attached model run under which rule."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import itertools
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax

from ._ambient import Ambient, ambient, entered
from ._arrays import is_array
from ._closures import name_of
from ._errors import ArgumentError
from ._models import interceptors
from ._paths import Path
from ._rule import Rule
from ._where import Function, Matches, is_by_class, matcher

Chosen: TypeAlias = Rule | Callable[[Path, Any], Rule | None] | None


@dataclasses.dataclass(frozen=True, eq=False)
class Choice:
    """One pair of `where` and a rule."""

    where: Any
    rule: Chosen

    @functools.cached_property
    def matches(self) -> Matches | None:
        """The predicate on modules; `None` for functions by name."""
        return None if isinstance(self.where, Function) else matcher(self.where)

    def __reduce__(self) -> Any:
        return Choice, (self.where, self.rule)

    def rule_at(self, path: Path, module: Any) -> Rule | None:
        """Gives the rule for a module that is chosen."""
        if self.rule is None or isinstance(self.rule, Rule):
            return self.rule
        made = self.rule(path, module)
        if made is not None and not isinstance(made, Rule):
            raise ArgumentError(
                f"A function in the place of a rule must return a rule or None, but for {shown(path)} it returned "
                f"{made!r}."
            )
        return made


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """What one call of `attach` asked for: the first of its choices that matches wins."""

    choices: tuple[Choice, ...]
    methods: frozenset[str] | None
    key: Any
    must_match: bool

    def choice(self, path: Path, module: Any, method: str) -> Choice | None:
        """Finds the choice for a call of a module."""
        if self.methods is not None and method not in self.methods:
            return None
        return next((one for one in self.choices if one.matches and one.matches(path, module)), None)


@dataclasses.dataclass(frozen=True)
class Row:
    """One call that a model makes, as `crossvjp.sites` shows it.

    Attributes:
        path: where the module stands in the model, joined by `/`; the name, for a function.
        kind: the module's class, or "function".
        method: the method that is called.
        parameters: the module's own parameters by name, `(shape, dtype)` each, without those of modules inside.
        rule: the rule that the call runs under, or `None`.
        calls: how often it is made, as traced: once in a loop.
    """

    path: str
    kind: str
    method: str
    parameters: Mapping[str, tuple[tuple[int, ...], str]]
    rule: Rule | None
    calls: int = 1


_tokens = itertools.count()


class Attachment:
    """The choices that are attached to one model, in groups; what several groups choose is an error."""

    def __init__(self, groups: Sequence[Group] = ()):
        self.groups = tuple(groups)
        self.token = next(_tokens)  # stands for it in the caches of traced programs
        self.matched: set[int] = set()  # the choices, by id, that met a module or function in any run so far

    @property
    def functions(self) -> list[tuple[Group, Choice]]:
        """The choices of functions by name."""
        return [(group, one) for group in self.groups for one in group.choices if isinstance(one.where, Function)]

    @property
    def chooses_modules(self) -> bool:
        """Whether any choice is of modules."""
        return any(one.matches for group in self.groups for one in group.choices)

    @property
    def depends_on_paths(self) -> bool:
        """Whether two modules that are alike may have different rules or keys."""
        modules = [(group, one) for group in self.groups for one in group.choices if one.matches]
        return self.makes_rules or any(group.key is not None or not is_by_class(one.where) for group, one in modules)

    @property
    def makes_rules(self) -> bool:
        """Whether a function gives rules to modules, each its own."""
        return any(
            not isinstance(one.rule, Rule | None) for group in self.groups for one in group.choices if one.matches
        )

    def rule_at(self, path: Path, module: Any, method: str) -> tuple[Rule, Any] | None:
        """Gives the rule of a call, and its key.

        Raises:
            ArgumentError: two groups have a rule for it.
        """
        for group in self.groups:
            self.matched.update(id(one) for one in group.choices if one.matches and one.matches(path, module))
        chosen = [(group, one) for group in self.groups if (one := group.choice(path, module, method))]
        found = [(rule, group.key) for group, one in chosen if (rule := one.rule_at(path, module))]
        if len(found) > 1:
            refuse_two(f"{shown(path)} of class {type(module).__name__}", [rule for rule, _ in found])
        if not found:
            return None
        rule, key = found[0]
        return rule, None if key is None else jax.random.fold_in(key, zlib.crc32("/".join(path).encode()))

    def function_rule(self, name: str) -> Rule | None:
        """Gives the rule for a function by its name.

        Raises:
            ArgumentError: two groups have a rule for it.
        """
        found: dict[int, Rule | None] = {}
        for group, one in self.functions:
            if one.where.has(name):
                self.matched.add(id(one))
                found.setdefault(id(group), one.rule_at((name,), None))
        rules = [rule for rule in found.values() if rule]
        if len(rules) > 1:
            refuse_two(f"The function {name!r}", rules)
        return rules[0] if rules else None

    def __reduce__(self) -> Any:
        return Attachment, (self.groups,)

    def check_matched(self, sites: Sequence[tuple[Path, str]], functions: Sequence[str] | None) -> None:
        """Refuses choices that have met nothing.

        Args:
            sites: the modules that there are, with their classes.
            functions: the functions that there are; `None` if nobody has looked.
        """
        for group in self.groups:
            for one in group.choices if group.must_match else ():
                if id(one) not in self.matched and (one.matches or functions is not None):
                    raise ArgumentError(_nothing(one, sites, functions or ()))


def refuse_two(what: str, rules: Sequence[Rule]) -> None:
    """Raises the error for a call that two attachments choose."""
    first, second = (rule.described() for rule in rules[:2])
    raise ArgumentError(
        f"{what} has two rules, {first} and {second}, attached one after the other. Attach one of them, or "
        "crossvjp.compose(outer, inner); crossvjp.detach(model) takes the first away."
    )


def shown(path: Path) -> str:
    """Prints a module's path."""
    return repr("/".join(path)) if path else "the model itself"


def _nothing(choice: Choice, sites: Sequence[tuple[Path, str]], functions: Sequence[str]) -> str:
    if isinstance(choice.where, Function):
        listed, what = [repr(name) for name in dict.fromkeys(functions)], "functions with a name"
    else:
        listed = [f"{shown(path)} ({kind})" for path, kind in dict.fromkeys(sites)]
        what = "modules"
    there = ", ".join(listed[:30]) + (f" and {len(listed) - 30} more" if len(listed) > 30 else "")
    return (
        f"`where` {choice.where!r} matches nothing in this call of the model"
        + (f", whose {what} are {there}. " if listed else f", which has no {what}. ")
        + "If other calls reach what it names, say must_match=False."
    )


class Running:
    """An attached model while it runs: what its interceptors ask, and what the run met."""

    def __init__(self, attachment: Attachment, prefix: Path = (), rows: list[Any] | None = None):
        self.attachment = attachment
        self.token = attachment.token
        self.prefix = prefix
        self.rows = rows
        self.sites: list[tuple[Path, str]] = []
        self.functions: list[str] | None = None
        self.at: Path = ()  # where the guest that runs now is hosted; it knows paths within itself alone

    def check(self) -> None:
        """Refuses choices that nothing has matched so far.

        Raises:
            ArgumentError: there is one.
        """
        self.attachment.check_matched(self.sites, self.functions)

    def rewritten(self, fn: Callable[..., Any], mdl: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls `fn(mdl, *args, **kwargs)`, with rules on the functions that are chosen by name."""
        from ._rewrite import call_rewritten

        names: list[str] = []

        def choose(name: str) -> Rule | None:
            names.append(name)
            return self.attachment.function_rule(name)

        out, asked = call_rewritten(choose, fn, mdl, args, kwargs)
        if asked:
            self.functions = [*(self.functions or ()), *names]
        return out

    def intercepting(self) -> contextlib.AbstractContextManager[None]:
        """A context in which the frameworks tell of every call of a module."""
        return interceptors(self)

    def relative(self, path: Path) -> Path:
        """Gives a path as seen from the model."""
        if self.at:
            return (*self.at, *(path or ("~",)))
        length = len(self.prefix)
        return path[length:] if path[:length] == self.prefix else path

    def call(self, visit: Visit, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Makes one call of a module, under its rule if it has one."""
        around = ambient()
        key = (self.attachment.token, visit.site)
        if key in around.inside or not _is_public(visit.method):
            return visit.plain(*args, **kwargs)
        name = type(visit.module).__name__
        self.sites.append((visit.path, name))
        found = self.attachment.rule_at(visit.path, visit.module, visit.method)
        if self.rows is not None:
            index = len(self.rows)
            self.rows.append(None)
            with entered(around.within(key)):
                out = visit.plain(*args, **kwargs)
            parameters = described_parameters(visit.parameters())
            self.rows[index] = Row("/".join(visit.path), name, visit.method, parameters, found and found[0])
            return out
        if found is None or around.rules_off:
            return visit.plain(*args, **kwargs)
        return self.under(found, around.within(key), visit, args, kwargs)

    def under(
        self,
        found: tuple[Rule, Any],
        inside: Ambient,
        visit: Visit,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Makes a call under a rule, in surroundings that are set for each run of it."""

        def run(mdl: Any, *args: Any, **kwargs: Any) -> Any:
            with entered(inside):
                if self.attachment.functions:
                    return self.rewritten(visit.rebuilt, mdl, args, kwargs)
                return visit.rebuilt(mdl, *args, **kwargs)

        module = visit.module
        like = module if visit.is_function else getattr(type(module), visit.method, None)
        run.__name__ = name_of(module) if visit.is_function else f"{type(module).__name__}.{visit.method}"
        if kwargs and like is not None:  # resolves keywords to positions
            run.__signature__ = inspect.signature(like)  # pyright: ignore[reportFunctionMemberAccess]
        rule, key = found
        handle = () if visit.is_function else (module,)
        return rule.lift(run, key=key)(*handle, *args, **kwargs)


@dataclasses.dataclass(frozen=True)
class Visit:
    """A call of a module, as an interceptor meets it.

    Args:
        path: the module's path in the model.
        module: the live module.
        method: the method's name.
        site: names the module among those that are being called.
        plain: `plain(*args, **kwargs)` makes the call as it is.
        rebuilt: `rebuilt(mdl, *args, **kwargs)` calls the method on a module that an adapter rebuilt, and does not
            come here again for the same call.
        parameters: lists the module's own parameters by name, after the call.
        is_function: whether the module is a function, whose variables are its first argument.
    """

    path: Path
    module: Any
    method: str
    site: Any
    plain: Callable[..., Any]
    rebuilt: Callable[..., Any]
    parameters: Callable[[], Mapping[str, Any]] = dict
    is_function: bool = False


def _is_public(method: str) -> bool:
    return method == "__call__" or not method.startswith("_")


def described_parameters(arrays: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Gives shapes and dtypes of arrays by name."""
    return {name: (tuple(array.shape), str(array.dtype)) for name, array in arrays.items() if is_array(array)}
