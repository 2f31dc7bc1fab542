"""Rules where the modules stand in the model: a chosen one becomes an instance of a subclass of its class.

Serves Equinox and NNX. A subclass keeps fields, names and leaves as they are, and a model of another class would not:
a wrapper would show in every path. Two modules of one class with one rule share their subclass, so that a stack of
them is still one tree.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from crossvjp import ArgumentError, Rule
from crossvjp.extend import Attachment, Path, Running, Visit, ambient, named_like, public_methods, subclass

MARK = "__crossvjp__"

AsPlain: TypeAlias = Callable[[Any, type], Any]


class Exchange:
    """What the subclass of a module does.

    Args:
        base: the module's own class.
        attachment: what is attached to the model.
        rules: the rules and keys of those methods that have one.
        is_root: whether the module is the model itself.
        methods: those that are exchanged.
        as_plain: gives a module as an instance of its own class, for a run.
        path: the module's path, if a function gives the rules and is asked at each call.
        paths: where the modules of this class stand in the model.
    """

    def __init__(
        self,
        base: type | Exchange,
        attachment: Attachment,
        rules: Mapping[str, tuple[Rule, Any]],
        is_root: bool,
        methods: Sequence[str],
        as_plain: AsPlain,
        path: Path | None,
        paths: set[Path],
    ):
        self._given = attachment, rules, is_root, methods, as_plain, path, paths
        self.attachment, self.rules, self.is_root, self.methods, self.as_plain, self.path, self.paths = self._given
        self.base: type = base.made if isinstance(base, Exchange) else base

    def rule_of(self, module: Any, method: str) -> tuple[Rule, Any] | None:
        """Gives the rule and the key of a call."""
        found = self.rules.get(method)
        if found is None or self.path is None:
            return found
        return self.attachment.rule_at(self.path, module, method)

    @functools.cached_property
    def made(self) -> type:
        """The subclass."""
        members = {name: _method(self, name) for name in self.methods}
        return subclass(self.base, {**members, MARK: self, "__reduce__": _reduced})

    def __reduce__(self) -> Any:
        return Exchange, (getattr(self.base, MARK, self.base), *self._given)


class Exchanges:
    """Decides for the modules of one model, and makes their subclasses.

    Args:
        attachment: what is attached.
        ends: the framework's base class, whose own methods are no calls.
        as_plain: gives a module as an instance of its own class, for a run.
    """

    def __init__(self, attachment: Attachment, ends: type, as_plain: AsPlain):
        self._attachment = attachment
        self._ends = ends
        self._as_plain = as_plain
        self._classes: dict[Any, type] = {}
        self._sites: list[tuple[Path, str]] = []
        self._without_methods: list[tuple[Path, Any]] = []

    def class_for(self, paths: Sequence[Path], module: Any) -> type | None:
        """Gives the subclass for a module that stands at some paths; `None` if it stays as it is."""
        base = type(module)
        methods = public_methods(base, self._ends)
        if not methods:
            self._without_methods += [(path, module) for path in paths]
            return None
        self._sites += [(path, base.__name__) for path in paths]
        first = ((path, found) for path in paths if (found := self._rules(path, module, methods)))
        chosen, rules = next(first, (None, {}))
        path = chosen if self._attachment.makes_rules else None
        rewrites = () in paths and bool(self._attachment.functions)
        if not rules and not rewrites:
            return None
        known = base, tuple((name, id(rule), id(key)) for name, (rule, key) in rules.items()), rewrites, path
        if known not in self._classes:
            changed = methods if rewrites else list(rules)
            exchange = Exchange(base, self._attachment, rules, () in paths, changed, self._as_plain, path, set())
            self._classes[known] = exchange.made
        getattr(self._classes[known], MARK).paths.update(paths)
        return self._classes[known]

    def check(self) -> None:
        """Refuses choices that matched no module that can be called."""
        matched = self._attachment.matched
        for one in (one for group in self._attachment.groups for one in group.choices):
            if one.matches and id(one) not in matched:
                for path, module in self._without_methods:
                    if one.matches(path, module):
                        raise ArgumentError(
                            f"`where` {one.where!r} chooses {'/'.join(path)!r} of class {type(module).__name__}, which "
                            "has no method that could run under a rule. Choose the module that uses it."
                        )
        self._attachment.check_matched(self._sites, None)

    def _rules(self, path: Path, module: Any, methods: Sequence[str]) -> dict[str, tuple[Rule, Any]]:
        found = {method: self._attachment.rule_at(path, module, method) for method in methods}
        return {method: one for method, one in found.items() if one}


def attachment_among(modules: Iterable[tuple[Sequence[Path], Any]]) -> Attachment | None:
    """Gives what is attached to a model, of all modules below it with their paths.

    What is attached to a part of it has its modules at other paths, for it counts from there.
    """
    of_model: dict[Attachment, bool] = {}
    for paths, module in modules:
        for mark in marks(type(module)):
            is_here = any(path in mark.paths for path in paths)
            of_model[mark.attachment] = of_model.get(mark.attachment, True) and is_here
    return next((attachment for attachment, is_here in of_model.items() if is_here), None)


def marks(cls: type) -> list[Exchange]:
    """Lists what the subclasses of a class do, the last that was made first."""
    found: list[Exchange] = []
    while (mark := getattr(cls, MARK, None)) is not None:
        found.append(mark)
        cls = mark.base
    return found


def class_without(cls: type, attachment: Attachment | None) -> type:
    """Gives the class as it was before an attachment; before all of them, if it is `None`."""
    found = marks(cls)
    if attachment is None:
        return found[-1].base if found else cls
    return found[0].base if found and found[0].attachment is attachment else cls


def _reduced(self: Any) -> Any:
    """Takes an instance apart for pickles and copies: its class has no name of its own to be found by."""
    return _empty, (getattr(type(self), MARK),), dict(vars(self))


def _empty(exchange: Exchange) -> Any:
    return object.__new__(exchange.made)


def recording_class(
    base: type,
    ends: type,
    as_plain: AsPlain,
    running: Running,
    parameters: Callable[[Any], Mapping[str, Any]],
    members: Mapping[str, Any],
) -> type | None:
    """Makes a subclass that only tells of its calls; its instances know their path, as `crossvjp_path`."""

    def recorded(name: str) -> Callable[..., Any]:
        own: Callable[..., Any] = getattr(base, name)

        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            plain = _plain(own, base, as_plain)
            call = functools.partial(plain, self)
            visit = Visit(self.crossvjp_path.names, self, name, object(), call, plain, lambda: parameters(self))
            return running.call(visit, args, kwargs)

        return named_like(method, own)

    methods = public_methods(base, ends)
    return subclass(base, {**{name: recorded(name) for name in methods}, **members}) if methods else None


@dataclasses.dataclass(frozen=True)
class Place:
    """A path that makes no difference to a tree: modules of several places may be stacked."""

    names: Path = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Place)

    def __hash__(self) -> int:
        return 0


def _plain(own: Callable[..., Any], base: type, as_plain: AsPlain) -> Callable[..., Any]:
    def plain(mdl: Any, *args: Any, **kwargs: Any) -> Any:
        return own(as_plain(mdl, base), *args, **kwargs)

    return plain


def _method(exchange: Exchange, name: str) -> Callable[..., Any]:
    own: Callable[..., Any] = getattr(exchange.base, name)
    plain = _plain(own, exchange.base, exchange.as_plain)

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        around = ambient()
        if around.rules_off:
            return plain(self, *args, **kwargs)
        running = Running(exchange.attachment)
        found = exchange.rule_of(self, name)
        if found is not None:
            visit = Visit((), self, name, None, functools.partial(plain, self), plain)
            out = running.under(found, around, visit, args, kwargs)
        elif exchange.is_root and exchange.attachment.functions:
            out = running.rewritten(plain, self, args, kwargs)
        else:
            out = plain(self, *args, **kwargs)
        if exchange.is_root and name == "__call__":
            running.check()
        return out

    return named_like(method, own)
