"""Which calls of an attached model run under which rule."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import zlib
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax

from ._errors import ArgumentError
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
        return rule, None if key is None else _at(key, "/".join(path))

    def function_rule(self, name: str, count: int = 0) -> tuple[Rule, Any] | None:
        """Gives the rule for a function by its name, and the key of its call with that number.

        Raises:
            ArgumentError: two groups have a rule for it.
        """
        found: dict[Group, Rule | None] = {}
        for group, one in self.functions:
            if one.where.has(name):
                self.matched.add(id(one))
                found.setdefault(group, one.rule_at((name,), None))
        rules = [(rule, group.key) for group, rule in found.items() if rule]
        if len(rules) > 1:
            refuse_two(f"The function {name!r}", [rule for rule, _ in rules])
        if not rules:
            return None
        rule, key = rules[0]
        if key is None:
            return rule, None
        with jax.ensure_compile_time_eval():  # it goes into a program, where nothing may be traced
            return rule, jax.random.fold_in(_at(key, name), count)

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


def _at(key: Any, place: str) -> Any:
    return jax.random.fold_in(key, zlib.crc32(place.encode()))


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
