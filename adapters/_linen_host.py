"""Models of any framework as Linen submodules."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn

from crossvjp.adapters._linen_guest import LinenGuest
from crossvjp.extend import Guest, Keys, Leaves, Options, Variables, flat, hosted_at, merged, nested


class Hosted(nn.Module):
    """A guest as a Linen module: its variables are this module's, in collections of their own names."""

    guest: Any
    streams: tuple[str, ...] = ("dropout",)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the guest."""
        return self.call_method("__call__", *args, **kwargs)

    @nn.compact  # for guests that make Linen modules while they run
    def call_method(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Calls a method of the guest."""
        keys = Keys(self._key, self.streams, lambda: self.make_rng("params") if self.has_rng("params") else None)
        variables = _read(self)
        with hosted_at(self.path):
            if self.is_initializing():
                made = self.guest.init(keys, method, args, kwargs)
                variables = merged(made, variables)  # what another call has made stays
                self._write(variables, made)
            out, updates = self.guest.apply(variables, keys, method, args, kwargs)
        if not self.is_initializing():  # Flax keeps initial values
            self._write(merged(variables, updates), updates)
        return out

    def __getattr__(self, name: str) -> Any:
        """Gives the other methods of the guest."""
        guest = vars(self).get("guest")
        if guest is not None and name in guest.methods:
            return functools.partial(self.call_method, name)
        return super().__getattr__(name)

    def _key(self, stream: str) -> Any:
        # Flax takes "params" for a stream that has no key of its own.
        return self.make_rng(stream) if self.has_rng(stream) or self.has_rng("params") else None

    def _write(self, variables: Variables, updates: Variables) -> None:
        for collection, leaves in updates.items():
            # Flax leaves out what is sown where nobody asks for it; other writes have to be allowed.
            if collection == "intermediates" and not self.is_mutable_collection(collection):
                continue
            tops = {path[0] for path in leaves}
            for name, value in nested(_below(variables[collection], tops)).items():
                self.put_variable(collection, name, value)


def _read(module: nn.Module) -> Variables:
    return {collection: flat(held) for collection, held in module.variables.items()}


def _below(leaves: Leaves, tops: set[str]) -> Leaves:
    return {path: value for path, value in leaves.items() if path[0] in tops}


class LinenHosting:
    """Linen modules in other frameworks, and others in Linen."""

    framework = "linen"
    makes_hosts = True

    def guest(self, model: Any, options: Options) -> Guest | None:
        return LinenGuest(model, options.given.get("streams")) if isinstance(model, nn.Module) else None

    def own(self, model: Any, options: Options) -> Any:
        if not isinstance(model, nn.Module):
            return None
        name = options.taken("Linen", ("name", "streams"), sample=False)["name"]
        if isinstance(model.parent, nn.Module):  # made here, or a field of the module that is running
            if name is None:
                return model
        elif model.scope is not None:
            return None
        fields = [field.name for field in dataclasses.fields(model) if field.init]
        values = {field: getattr(model, field) for field in fields if field not in ("parent", "name")}
        return type(model)(**values, name=name or model.name)  # it belongs to the module that is running

    def host(self, guest: Guest, options: Options) -> nn.Module:
        taken = options.taken("Linen", ("name", "streams"), sample=False)
        return Hosted(guest, taken["streams"] or ("dropout",), name=taken["name"])
