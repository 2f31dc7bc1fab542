"""Guests of every framework, and a host of each around them, as pure functions of variables."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
from flax import nnx

import crossvjp as cv
from crossvjp.adapters.haiku import bind
from crossvjp.extend import flat

Flat = dict[tuple[str, ...], Any]
Same = lambda layer: layer


def an_input() -> Any:
    """Makes a batch."""
    return jax.random.normal(jax.random.key(7), (4, 5))


class LinenNet(nn.Module):
    """Dense, BatchNorm and Dropout."""

    inside: Callable[[Any], Any] = Same

    def setup(self):
        self.first = nn.Dense(6)
        self.norm = nn.BatchNorm(use_running_average=False)
        self.drop = nn.Dropout(0.5, deterministic=False)

    def __call__(self, x):
        return self.drop(self.norm(self.inside(self.first)(x)))

    def first_only(self, x):
        return self.first(x)


class NnxNet(nnx.Module):
    """The same in NNX."""

    def __init__(self, rngs, inside=Same):
        self.first = nnx.Linear(5, 6, rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.inside = inside

    def __call__(self, x):
        return self.drop(self.norm(self.inside(self.first)(x)))

    def first_only(self, x):
        return self.first(x)


def haiku_net(inside=Same):
    """Makes the same as a transformed function."""

    def net(x):
        x = inside(hk.Linear(6, name="first"))(x)
        x = hk.BatchNorm(True, True, 0.9, name="norm")(x, True)
        return hk.dropout(hk.next_rng_key(), 0.5, x)

    return net


class EquinoxNet(eqx.Module):
    """The same in Equinox, for a batch."""

    first: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    drop: eqx.nn.Dropout
    inside: Callable[[Any], Any] = eqx.field(static=True)

    def __init__(self, key, inside=Same):
        self.first = eqx.nn.Linear(5, 6, key=key)
        self.norm = eqx.nn.BatchNorm(6, axis_name="batch", mode="batch")
        self.drop = eqx.nn.Dropout(0.5)
        self.inside = inside

    def __call__(self, x, state, key=None):
        x = jax.vmap(self.inside(self.first))(x)
        x, state = jax.vmap(self.norm, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, state)
        return self.drop(x, key=key), state

    def first_only(self, x, state):
        return jax.vmap(self.first)(x), state


def plain_init(key, x):
    """Makes the variables of a plain network with a running mean."""
    return {"params": {"w": jax.random.normal(key, (x.shape[-1], 6))}, "state": {"mean": jnp.zeros(6)}}


def plain_apply(inside=Same):
    """Makes the plain network's function."""

    def apply(variables, x, key):
        y = inside(jax.tree_util.Partial(lambda w, x: x @ w, variables["params"]["w"]))(x)
        mean = 0.9 * variables["state"]["mean"] + 0.1 * y.mean(0)
        keep = jax.random.bernoulli(key, 0.5, y.shape)
        return jnp.where(keep, 2 * (y - mean), 0), {"state": {"mean": mean}}

    return apply


@dataclasses.dataclass(frozen=True)
class GuestCase:
    """A guest with its values, and what it does alone.

    Args:
        model: as `host` takes it, with its values.
        recipe: the same without values, made new with the host's keys.
        params: its parameters by path.
        state: its state by collection and path.
        alone: `(params, state, key, x) -> (y, state after it)` as the framework itself runs it.
    """

    model: Any
    recipe: Any
    params: Flat
    state: dict[str, Flat]
    alone: Callable[..., tuple[Any, dict[str, Flat]]]


def unflat(leaves: Flat) -> dict[str, Any]:
    """Makes nested dicts."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        inner = tree
        for name in path[:-1]:
            inner = inner.setdefault(name, {})
        inner[path[-1]] = leaf
    return tree


def linen_guest(inside: Any = Same, around: Any = None) -> GuestCase:
    """Makes the Linen guest, with a rule on its first layer or on the whole of it."""
    net, x = LinenNet(inside), an_input()
    held = net.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, x)
    net = cv.attach(net, around, where="") if around else net

    def alone(params, state, key, x):
        variables = {"params": unflat(params), "batch_stats": unflat(state["batch_stats"])}
        y, after = net.apply(variables, x, rngs={"dropout": key}, mutable=["batch_stats"])
        return y, {"batch_stats": flat(after["batch_stats"])}

    return GuestCase(net.bind(held), net, flat(held["params"]), {"batch_stats": flat(held["batch_stats"])}, alone)


def nnx_guest(inside: Any = Same, around: Any = None) -> GuestCase:
    """Makes the NNX guest."""
    make = lambda rngs: cv.attach(NnxNet(rngs, inside), around, where="") if around else NnxNet(rngs, inside)
    net = make(nnx.Rngs(0))
    params, stats = (flat(nnx.to_pure_dict(nnx.state(net, kind))) for kind in (nnx.Param, nnx.BatchStat))

    def alone(params, state, key, x):
        module = nnx.clone(net)
        nnx.update(module, unflat({**params, **state["batch_stats"]}))
        nnx.reseed(module, default=key)
        y = module(x)
        return y, {"batch_stats": flat(nnx.to_pure_dict(nnx.state(module, nnx.BatchStat)))}

    return GuestCase(net, make, params, {"batch_stats": stats}, alone)


def haiku_guest(inside: Any = Same, around: Any = None) -> GuestCase:
    """Makes the Haiku guest. A rule around it is one on the transformed function's own."""
    function = haiku_net(inside)
    net = hk.transform_with_state((lambda x: around(function)(x)) if around else function)
    params, state = net.init(jax.random.key(0), an_input())
    split = lambda tree: {(*module.split("/"), n): v for module, held in tree.items() for n, v in held.items()}

    def joined(leaves):
        found: dict[str, dict[str, Any]] = {}
        for path, leaf in leaves.items():
            found.setdefault("/".join(path[:-1]), {})[path[-1]] = leaf
        return found

    def alone(params, state, key, x):
        y, after = net.apply(joined(params), joined(state["state"]), key, x)
        return y, {"state": split(after)}

    return GuestCase(bind(net, params, state), net, split(params), {"state": split(state)}, alone)


def equinox_guest(inside: Any = Same, around: Any = None) -> GuestCase:
    """Makes the Equinox guest."""

    def make(key):
        net = EquinoxNet(key, inside)
        return cv.attach(net, around, where="") if around else net

    net, state = eqx.nn.make_with_state(make)(jax.random.key(0))
    leaves, treedef = jax.tree.flatten(state)
    fresh = lambda leaves=leaves: jax.tree.unflatten(treedef, leaves)  # a State may be used once
    places = [("norm", "batch_counter"), ("norm", "batch_state_index", "0"), ("norm", "batch_state_index", "1")]
    paths = [("first", "weight"), ("first", "bias"), ("norm", "weight"), ("norm", "bias")]
    read = lambda net: [net.first.weight, net.first.bias, net.norm.weight, net.norm.bias]

    def alone(params, state, key, x):
        module = eqx.tree_at(read, net, [params[path] for path in held])
        y, after = module(x, fresh([state["state"][place] for place in places]), key)
        return y, {"state": dict(zip(places, jax.tree.leaves(after), strict=True))}

    held = dict(zip(paths, read(net), strict=True))
    return GuestCase((net, fresh()), make, held, {"state": dict(zip(places, leaves, strict=True))}, alone)


def plain_guest(inside: Any = Same, around: Any = None) -> GuestCase:
    """Makes the plain guest."""
    apply = plain_apply(inside)
    apply = around.lift(apply) if around else apply
    held = plain_init(jax.random.key(0), an_input())

    def run(variables, x, key):
        return apply(variables, x, key)

    def alone(params, state, key, x):
        y, after = run({"params": unflat(params), "state": unflat(state["state"])}, x, key)
        return y, {"state": flat(after["state"])}

    model = jax.tree_util.Partial(run, held)
    return GuestCase(model, (plain_init, run), flat(held["params"]), {"state": flat(held["state"])}, alone)


GUESTS: dict[str, Callable[..., GuestCase]] = {
    "linen": linen_guest,
    "nnx": nnx_guest,
    "haiku": haiku_guest,
    "equinox": equinox_guest,
    "plain": plain_guest,
}


@dataclasses.dataclass(frozen=True)
class HostCase:
    """A host around a guest, as a pure function.

    Args:
        params: the guest's parameters in the host, by their paths in the guest.
        state: its state by collection and path.
        key: the key that the guest gets in a run with the host's key.
        run: `(params, state, host_key, x) -> (y, state after it)`.
    """

    params: Flat
    state: dict[str, Flat]
    key: Callable[[Any], Any]
    run: Callable[..., tuple[Any, dict[str, Flat]]]


def below(leaves: Flat) -> Flat:
    """Takes the name of the host's submodule off the paths."""
    assert all(path[0] == "guest" for path in leaves)
    return {path[1:]: leaf for path, leaf in leaves.items()}


def above(leaves: Flat) -> dict[str, Any]:
    """Makes nested dicts below the submodule's name."""
    return unflat({("guest", *path): leaf for path, leaf in leaves.items()})


def in_linen(model: Any, around: Any = Same) -> HostCase:
    """Makes a Linen host."""

    class Host(nn.Module):
        @nn.compact
        def __call__(self, x):
            return around(cv.host(model, "linen", name="guest"))(x)

    class Probe(nn.Module):
        @nn.compact
        def __call__(self):
            return self.make_rng("dropout")

    class ProbeHost(nn.Module):
        @nn.compact
        def __call__(self):
            return Probe(name="guest")()

    held = Host().init(jax.random.key(0), an_input())
    read = lambda variables: {name: below(flat(tree)) for name, tree in variables.items() if name != "params"}

    def run(params, state, key, x):
        variables = {"params": above(params), **{name: above(leaves) for name, leaves in state.items()}}
        y, after = Host().apply(variables, x, rngs={"dropout": key}, mutable=list(state))
        return y, read(after)

    key = lambda key: ProbeHost().apply({}, rngs={"dropout": key})
    return HostCase(below(flat(held["params"])), read(held), key, run)


def in_haiku(model: Any, around: Any = Same) -> HostCase:
    """Makes a Haiku host."""
    net = hk.transform_with_state(lambda x: around(cv.host(model, "haiku", name="guest"))(x))
    split = lambda tree: below({(*m.split("/"), n): v for m, held in tree.items() for n, v in held.items()})

    def joined(leaves):
        found: dict[str, dict[str, Any]] = {}
        for path, leaf in leaves.items():
            found.setdefault("/".join(("guest", *path[:-1])), {})[path[-1]] = leaf
        return found

    def read(state):
        found: dict[str, Flat] = {}
        for path, leaf in split(state).items():
            found.setdefault(path[0], {})[path[1:]] = leaf
        return found

    params, state = net.init(jax.random.key(0), an_input())

    def run(params, state, key, x):
        together = {(name, *path): leaf for name, leaves in state.items() for path, leaf in leaves.items()}
        y, after = net.apply(joined(params), joined(together), key, x)
        return y, read(after)

    key = lambda key: hk.transform(hk.next_rng_key).apply({}, key)
    return HostCase(split(params), read(state), key, run)


class NnxHost(nnx.Module):
    """A module with a guest."""

    def __init__(self, guest, around):
        self.guest, self.around = guest, around

    def __call__(self, x):
        return self.around(self.guest)(x)


def in_nnx(model: Any, around: Any = Same) -> HostCase:
    """Makes an NNX host."""
    host = NnxHost(cv.host(model, "nnx", an_input(), rngs=nnx.Rngs(0, dropout=1)), around)
    tag = "dropout" if hasattr(host.guest, "call_method") else "default"  # an NNX guest is a submodule as it is

    def read(module, state):
        held = below(flat(nnx.to_pure_dict(nnx.state(module, nnx.Not(nnx.RngState)))))
        return {name: {path: held[path] for path in leaves} for name, leaves in state.items()}

    others = nnx.state(host, nnx.Not(nnx.Any(nnx.Param, nnx.RngState)))
    state = {}
    for name in {nnx.variable_name_from_type(type(leaf)) for _, leaf in nnx.to_flat_state(others)}:
        state[name] = below(flat(nnx.to_pure_dict(nnx.state(host, nnx.variable_type_from_name(name)))))

    def run(params, state, key, x):
        module = nnx.clone(host)
        together = dict(params)
        for leaves in state.values():
            together.update(leaves)
        nnx.update(module, above(together))
        nnx.reseed(module, **{tag: key})
        y = module(x)
        return y, read(module, state)

    def key(key):
        if tag == "default":  # reseeded in the same way when it is alone
            return key
        stream = nnx.Rngs(dropout=0)
        nnx.reseed(stream, dropout=key)
        return stream.dropout()

    return HostCase(below(flat(nnx.to_pure_dict(nnx.state(host, nnx.Param)))), state, key, run)


class EquinoxHost(eqx.Module):
    """A module with a guest."""

    guest: Any
    around: Any = eqx.field(static=True)

    def __call__(self, x, state, key):
        return self.around(self.guest)(x, state, key=key)


def in_equinox(model: Any, around: Any = Same) -> HostCase:
    """Makes an Equinox host."""
    make = lambda: EquinoxHost(cv.host(model, "equinox"), around)
    host: Any
    host, first = eqx.nn.make_with_state(make)()
    leaves, treedef = jax.tree.flatten(first)
    arrays = lambda tree: jax.tree_util.tree_leaves_with_path(eqx.filter(tree, eqx.is_inexact_array))
    names = lambda path: tuple(str(getattr(part, "key", getattr(part, "name", None))) for part in path)
    own = not hasattr(host.guest, "call_method")  # an Equinox guest is a submodule as it is
    inner = host.guest if own else host.guest.params
    params = {names(path): leaf for path, leaf in arrays(inner)}
    if own:
        places = [("norm", "batch_counter"), ("norm", "batch_state_index", "0"), ("norm", "batch_state_index", "1")]
        read = lambda state: {"state": dict(zip(places, jax.tree.leaves(state), strict=True))}
        write = lambda state: [state["state"][place] for place in places]
    else:
        read = lambda state: {name: flat(tree) for name, tree in state.get(host.guest.state).items()}
        write = lambda state: jax.tree.leaves({name: unflat(held) for name, held in state.items()})

    def run(given, state, key, x):
        treedef_of = jax.tree.structure(eqx.filter(inner, eqx.is_inexact_array))
        values = jax.tree.unflatten(treedef_of, [given[path] for path in params])
        static = eqx.filter(inner, eqx.is_inexact_array, inverse=True)
        where = (lambda host: host.guest) if own else (lambda host: host.guest.params)
        module = eqx.tree_at(where, host, eqx.combine(values, static))
        y, after = module(x, jax.tree.unflatten(treedef, write(state)), key)
        return y, read(after)

    return HostCase(params, read(jax.tree.unflatten(treedef, leaves)), lambda key: key, run)


HOSTS: dict[str, Callable[..., HostCase]] = {
    "linen": in_linen,
    "nnx": in_nnx,
    "haiku": in_haiku,
    "equinox": in_equinox,
}
