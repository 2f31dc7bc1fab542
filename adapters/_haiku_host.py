"""Models of any framework as Haiku modules."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import haiku as hk
import jax

from crossvjp import HandleError
from crossvjp.adapters._haiku_guest import HaikuGuest
from crossvjp.adapters._haiku_transformed import BoundTransformed
from crossvjp.extend import Guest, Keys, Options, Path, Variables, hosted_at, is_array


class Hosted(hk.Module):
    """A guest as a Haiku module.

    Its parameters and state are Haiku's, made and read by `hk.get_parameter` and `hk.get_state`, so that creators and
    getters see them: parameters as if the guest's layers were modules inside this one, state the same below
    the name of its collection. Metadata has no place in Haiku: the guest gets bare arrays.
    """

    def __init__(self, guest: Guest, streams: tuple[str, ...], name: str | None = None):
        super().__init__(name)
        self.guest = guest
        self.streams = streams

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the guest."""
        return self._call_method("__call__", *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Gives the other methods of the guest."""
        guest = vars(self).get("guest")
        if guest is not None and name in guest.methods:
            return functools.partial(self._call_method, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @hk.name_like("__call__")
    def _call_method(self, method: str, *args: Any, **kwargs: Any) -> Any:
        # Haiku has one sequence of keys, and no streams with names.
        keys = Keys(lambda stream: hk.maybe_next_rng_key(), (), hk.maybe_next_rng_key)
        with hosted_at(tuple(self.module_name.split("/"))):
            if hk.running_init():
                self._make(self.guest.init(keys, method, args, kwargs))
            out, updates = self.guest.apply(self._read(), keys, method, args, kwargs)
        if not hk.running_init():  # Haiku keeps initial values
            for collection, leaves in updates.items():
                for path, value in leaves.items() if collection != "intermediates" else ():
                    self._place((collection, *path))._set_state(path[-1], _bare(value))
        return out

    def _make(self, variables: Variables) -> None:
        for path, value in variables.get("params", {}).items():
            array = _bare(value)
            if not is_array(array):
                raise HandleError(
                    f"The guest's parameter at {'/'.join(path)!r} is a {type(value).__name__}, but a parameter in "
                    "Haiku is one array."
                )
            self._place(path)._parameter(path[-1], array)
        for collection, leaves in variables.items():
            for path, value in leaves.items() if collection != "params" else ():
                self._place((collection, *path))._state(path[-1], _bare(value))

    def _read(self) -> Variables:
        variables: Variables = {}
        for path, array in _below(self.module_name, self.params_dict()).items():
            variables.setdefault("params", {})[path] = self._place(path)._parameter(path[-1], array)
        for path, value in _below(self.module_name, self.state_dict()).items():
            variables.setdefault(path[0], {})[path[1:]] = self._place(path)._state(path[-1], value)
        return variables

    def _place(self, path: Path) -> _Place:
        return _Place("/".join([self.module_name, *map(_escaped, path[:-1])]))


class _Place(hk.Module):
    """A module for its name alone. Haiku's own check of names would refuse the numbers that lists have in paths."""

    def __init__(self, module_name: str):
        super().__init__("place")
        self.module_name = module_name
        self.name = module_name.rpartition("/")[2]

    def _parameter(self, name: str, array: Any) -> Any:
        return hk.get_parameter(_escaped(name), array.shape, array.dtype, init=lambda *_: array)

    def _state(self, name: str, value: Any) -> Any:
        shape, dtype = getattr(value, "shape", ()), getattr(value, "dtype", jax.numpy.float32)
        return hk.get_state(_escaped(name), shape, dtype, init=lambda *_: value)

    def _set_state(self, name: str, value: Any) -> None:
        hk.set_state(_escaped(name), value)


def _below(module: str, arrays: Mapping[str, Any]) -> dict[Path, Any]:
    """Gives what stands below a module, by the guest's paths."""
    prefix = f"{module}/"
    return {
        tuple(part.replace("%2F", "/").replace("%25", "%") for part in name.removeprefix(prefix).split("/")): value
        for name, value in arrays.items()
        if name.startswith(prefix)
    }


def _escaped(part: str) -> str:
    """Keeps a slash in a name, as Linen's wrappers have it, from looking like a step of the path."""
    return part.replace("%", "%25").replace("/", "%2F")


def _bare(value: Any) -> Any:
    """Takes an array out of its box; what holds several stays as it is."""
    leaves = jax.tree.leaves(value)
    return leaves[0] if len(leaves) == 1 and not isinstance(value, tuple | list) else value


class HaikuHosting:
    """Transformed Haiku functions in other frameworks, and others in Haiku."""

    framework = "haiku"
    makes_hosts = True

    def guest(self, model: Any, options: Options) -> Guest | None:
        is_one = isinstance(model, hk.Transformed | hk.TransformedWithState | BoundTransformed)
        return HaikuGuest(model) if is_one else None

    def own(self, model: Any, options: Options) -> Any:
        return None

    def host(self, guest: Guest, options: Options) -> hk.Module:
        taken = options.taken("Haiku", ("name", "streams"), sample=False)
        try:
            return Hosted(guest, taken["streams"] or (), taken["name"])
        except ValueError as error:
            if "initialized inside" not in str(error):
                raise
            raise HandleError(
                "A Haiku host is a Haiku module, and is made inside of a transform: call crossvjp.host in the function "
                "that is given to hk.transform or hk.transform_with_state."
            ) from error
