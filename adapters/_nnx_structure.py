"""What of an NNX module is no array: which attributes it has, and the Python values among them."""

from __future__ import annotations

from typing import Any

from flax import nnx

from crossvjp import HandleError
from crossvjp.extend import Path, Static


def check_structure(before: Any, after: Any, place: str = "a rule") -> None:
    """Refuses what a call did to a module that can't be carried over to the live one.

    New Variables can, and so can other values of old ones. Python values, modules, shared Variables and
    deletions can't: a call may run several times, and late, so that a counter would count its runs.

    Args:
        before: the module as it was when the run began.
        after: the module that the run left behind.
        place: what the call is under, in words.

    Raises:
        HandleError: the call changed something else; the error has its path.
    """
    old, new = _structure(before), _structure(after)
    for path in sorted({*old, *new}):
        if old.get(path) == new.get(path):
            continue
        if path not in old and isinstance(new[path], _Variable) and new[path].shared is None and path[:-1] in old:
            continue
        raise HandleError(
            f"The call changed the NNX module at {'.'.join(path)}, from {_told(old, path)} to {_told(new, path)}. "
            f"Under {place} a call may write Variables and add new ones, and nothing else: keep the value in a "
            f"Variable, or change the module outside of {place.replace('a ', 'the ', 1)}."
        )


class _Variable:
    """A Variable as part of a structure: its type and metadata, and whether it stood somewhere before."""

    def __init__(self, variable: nnx.Variable[Any], shared: Path | None):
        self.kind = type(variable)
        self.shared = shared
        self._metadata = Static(variable.get_metadata())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Variable) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self.kind)

    def _key(self) -> tuple[Any, ...]:
        return self.kind, self.shared, self._metadata

    def __repr__(self) -> str:
        same = "" if self.shared is None else f" shared with {'.'.join(self.shared)}"
        return f"a {self.kind.__name__}{same} with the metadata {self._metadata.value}"


def _structure(node: Any) -> dict[Path, Any]:
    """Lists nodes by their types, Variables, and Python values, each at its path."""
    found: dict[Path, Any] = {}
    seen: dict[int, Path] = {}

    def visit(part: Any, path: Path) -> None:
        if isinstance(part, nnx.Variable):
            found[path] = _Variable(part, seen.get(id(part)))
            seen.setdefault(id(part), path)
            return
        children = _children(part)
        if children is None:
            found[path] = Static(part)
        elif id(part) in seen:
            found[path] = Static((type(part), seen[id(part)]))
        else:
            seen[id(part)] = path
            found[path] = Static(type(part))
            for name, child in children.items():
                visit(child, (*path, name))

    visit(node, ())
    return found


def _children(part: Any) -> dict[str, Any] | None:
    if isinstance(part, nnx.Pytree):
        return {name: value for name, value in vars(part).items() if not name.startswith("_pytree__")}
    if isinstance(part, dict):
        return {str(name): value for name, value in part.items()}
    if isinstance(part, list | tuple):
        return {str(index): value for index, value in enumerate(part)}
    return None


def _told(structure: dict[Path, Any], path: Path) -> str:
    if path not in structure:
        return "nothing"
    part = structure[path]
    if not isinstance(part, Static):
        return repr(part)
    return f"a {part.value.__name__}" if isinstance(part.value, type) else repr(part.value)
