"""Models of any framework as Equinox modules."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx

from crossvjp import HandleError
from crossvjp.adapters._equinox_guest import EquinoxGuest, with_state_inside
from crossvjp.extend import (
    Guest,
    Keys,
    Options,
    Variables,
    flat,
    makes_models,
    merged,
    nested,
    without_initialisation,
)


class Hosted(eqx.Module):
    """A guest as an Equinox module.

    Attributes:
        params: the guest's parameters, in nested dicts. Boxes of metadata are pytrees and stay.
        state: the index of the guest's state, nested dicts by collection; `None` if it has none.
        guest: the guest.
    """

    params: dict[str, Any]
    state: eqx.nn.StateIndex[Any] | None
    guest: Any = eqx.field(static=True)

    def __call__(self, *args: Any, key: Any = None, **kwargs: Any) -> Any:
        """Calls the guest; with state it takes a State and returns `(out, new_state)`."""
        return self.call_method("__call__", *args, key=key, **kwargs)

    def call_method(self, method: str, *args: Any, key: Any = None, **kwargs: Any) -> Any:
        """Calls a method of the guest."""
        keys = Keys(lambda stream: key)
        params: Variables = {"params": flat(self.params)}
        if self.state is None:
            return self.guest.apply(params, keys, method, args, kwargs)[0]
        state, args, kwargs = _given_state(args, kwargs)
        held = {collection: flat(values) for collection, values in state.get(self.state).items()}
        out, updates = self.guest.apply({**params, **held}, keys, method, args, kwargs)
        kept = {collection: leaves for collection, leaves in updates.items() if collection != "intermediates"}
        _check_known(kept, held)
        after = {collection: nested(leaves) for collection, leaves in merged(held, kept).items()}
        return out, state.set(self.state, after)

    def __getattr__(self, name: str) -> Any:
        """Gives the other methods of the guest."""
        guest = vars(self).get("guest")
        if guest is not None and name in guest.methods:
            return functools.partial(self.call_method, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


def _given_state(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[eqx.nn.State, tuple[Any, ...], dict[str, Any]]:
    """Takes the State out of the arguments of a call."""
    found = [value for value in (*args, *kwargs.values()) if isinstance(value, eqx.nn.State)]
    if len(found) != 1:
        raise HandleError(
            "The guest has state, so it is called with one eqx.nn.State, `hosted(x, state, key=key)`, and returns "
            f"`(out, new_state)`, but the call has {len(found)}. `eqx.nn.make_with_state` gives the first."
        )
    rest = tuple(value for value in args if not isinstance(value, eqx.nn.State))
    return found[0], rest, {name: value for name, value in kwargs.items() if not isinstance(value, eqx.nn.State)}


def _check_known(updates: Variables, held: Variables) -> None:
    for collection, leaves in updates.items():
        for path in leaves:
            if path not in held.get(collection, {}):
                raise HandleError(
                    f"The guest made a new variable at {'/'.join((collection, *path))!r} when it was called, but an "
                    "eqx.nn.State keeps its structure. Let the guest make it when it is initialised."
                )


class EquinoxHosting:
    """Equinox modules in other frameworks, and others in Equinox."""

    framework = "equinox"
    makes_hosts = True

    def guest(self, model: Any, options: Options) -> Guest | None:
        whole, make = _as_module(model)
        return None if whole is None and make is None else EquinoxGuest(whole, make)

    def own(self, model: Any, options: Options) -> Any:
        whole, make = _as_module(model)
        if whole is None and make is None:
            return None
        key = options.taken("Equinox", ("key",), sample=True)["key"]
        return whole if make is None else make(key=_needed(key))

    def host(self, guest: Guest, options: Options) -> eqx.Module:
        key = options.taken("Equinox", ("key", "streams"), sample=True)["key"]
        keys = Keys(lambda stream: key, (), lambda: key)
        variables = without_initialisation(guest, keys, "__call__", options.sample, options.keywords)
        state = {collection: nested(leaves) for collection, leaves in variables.items() if collection != "params"}
        return Hosted(nested(variables.get("params", {})), eqx.nn.StateIndex(state) if state else None, guest)


def _as_module(model: Any) -> tuple[Any, Callable[..., Any] | None]:
    """Gives a module with its state in it, or what makes one; `None` twice if the model is neither."""
    if isinstance(model, eqx.Module):
        return with_state_inside(model, None), None
    if isinstance(model, tuple) and len(model) == 2 and isinstance(model[1], eqx.nn.State):
        return with_state_inside(*model), None
    if makes_models(model, "key"):
        maker: Any = model
        return None, maker
    return None, None


def _needed(key: Any) -> Any:
    if key is None:
        raise HandleError("The guest makes its parameters with the host's key: give `key=`.")
    return key
