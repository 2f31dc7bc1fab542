"""Mistakes with hosts and guests: the errors say what was expected, what came and how to mend it."""

from __future__ import annotations

import sys
from typing import Any, cast

import equinox as eqx
import flax.errors
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from hosting import EquinoxNet, LinenNet, NnxNet, an_input, haiku_guest, linen_guest, plain_apply, plain_init

import crossvjp as cv

KEY = jax.random.key(0)
X = an_input()


class LinenHost(nn.Module):
    """A Linen host of any model."""

    model: Any

    @nn.compact
    def __call__(self, x):
        return cv.host(self.model, "linen", name="guest")(x)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: cv.host(nn.Dense(3), "torch"), r"`framework` must be .* 'equinox', but is 'torch'"),
        (lambda: cv.host(nn.Dense(3), "plain"), "'equinox', but is 'plain'"),
        (lambda: cv.host(nn.Dense(3), "linen", X), "A host in Linen initialises its guest .* takes no sample"),
        (lambda: cv.host(NnxNet, "linen", key=KEY), "The Linen host takes `name`, `streams`, but got `key`"),
        (lambda: cv.host(nn.Dense(3), "nnx", X, key=KEY), "The NNX host takes `rngs`, `streams`, but got `key`"),
        (lambda: cv.host(nn.Dense(3), "equinox", X, rngs=nnx.Rngs(0)), "The Equinox host .* but got `rngs`"),
        (lambda: cv.host(nn.Dense(3), "nnx", X, streams=()), r"`streams` must be the names .* but is \(\)"),
        (
            lambda: cv.host(nn.Dense(3), "nnx", X, streams=cast(Any, (1,))),
            r"`streams` must be the names .* but is \(1,\)",
        ),
    ],
    ids=["framework", "plain", "sample", "key", "nnx key", "equinox rngs", "no streams", "no name"],
)
def test_wrong_arguments_are_refused(call, words):
    with pytest.raises(cv.ArgumentError, match=words):
        call()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: cv.host(3, "nnx"), r"A guest is a Linen module, .* but this is a int"),
        (lambda: cv.host(nn.Dense, "nnx"), "but this is the class Dense"),
        (lambda: cv.host(nn.Dense(3), "nnx", X), "the host has none. Initialise the host with a key"),
        (lambda: cv.host(nn.Dense(3), "equinox", X), "the host has none. Initialise the host with a key"),
        (lambda: cv.host(NnxNet, "nnx"), r"give `rngs=nnx.Rngs\(...\)`"),
        (lambda: cv.host(EquinoxNet, "equinox"), "give `key=`"),
        (lambda: cv.host(nn.Dense(3), "nnx", rngs=nnx.Rngs(0)), "the host needs what it is called with"),
        (lambda: cv.host(haiku_guest().recipe, "equinox", key=KEY), "the host needs what it is called with"),
        (lambda: cv.host(eqx.nn.make_with_state(EquinoxNet)(KEY)[0], "nnx"), r"give both, .*\(module, state\)"),
        (lambda: cv.host(nn.Dense(3), "haiku"), "is made inside of a transform"),
    ],
    ids=[
        "no model",
        "a class",
        "no rngs",
        "no key",
        "nnx in nnx",
        "equinox in equinox",
        "no sample",
        "no sample of haiku",
        "no state",
        "outside",
    ],
)
def test_what_a_host_lacks_is_named(call, words):
    with pytest.raises(cv.HandleError, match=words):
        call()


def test_a_framework_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "haiku", None)
    with pytest.raises(cv.ArgumentError, match="The framework 'haiku' of the host is not installed"):
        cv.host(nn.Dense(3), "haiku")


# A guest that draws while its host has no key.


def without_key(guest: str, host: str) -> None:
    """Calls a guest that draws a mask in a host that has no key."""
    case = {"linen": linen_guest, "haiku": haiku_guest}.get(guest)
    model = {
        "nnx": NnxNet(nnx.Rngs(0)),
        "equinox": eqx.nn.make_with_state(EquinoxNet)(KEY),
        "plain": jax.tree_util.Partial(plain_apply(), plain_init(KEY, X)),
    }.get(guest) or (case and case().model)
    if host == "linen":
        net = LinenHost(model)
        net.apply(net.init(KEY, X), X, mutable=True)
    elif host == "nnx":
        cv.host(model, "nnx")(X)
    elif host == "haiku":
        transformed = hk.transform_with_state(lambda x: cv.host(model, "haiku")(x))
        transformed.apply(*transformed.init(KEY, X), None, X)
    else:
        hosted, state = eqx.nn.make_with_state(cv.host)(model, "equinox")
        hosted(X, state)


DRAWS = {
    "linen": (flax.errors.InvalidRngError, 'needs PRNG for "dropout"'),
    "nnx": (cv.HandleError, "drew from its stream 'default', but its host has no PRNG key"),
    "haiku": (ValueError, "must pass a non-None PRNGKey"),
    "equinox": (RuntimeError, "Dropout requires a key"),
    "plain": (TypeError, "missing 1 required positional argument: 'key'"),
}


@pytest.mark.parametrize(
    ("guest", "host"),
    [
        ("nnx", "linen"),
        ("linen", "nnx"),
        ("equinox", "nnx"),
        ("nnx", "haiku"),
        ("haiku", "equinox"),
        ("plain", "haiku"),
    ],
)
def test_a_guest_that_draws_without_a_key_of_its_host_is_an_error_that_says_whose_the_key_is(guest, host):
    kind, words = DRAWS[guest]
    with pytest.raises(kind, match=words) as caught:
        without_key(guest, host)
    assert "host has no PRNG key for it: give the host one" in "".join(
        [str(caught.value), *getattr(caught.value, "__notes__", [])]
    )


def test_a_linen_guest_that_draws_from_another_stream_is_told_how_to_name_it():
    class Noisy(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x + jax.random.normal(self.make_rng("noise"), x.shape)

    with pytest.raises(flax.errors.InvalidRngError, match='PRNG for "noise"') as caught:
        cv.host(Noisy(), "nnx", X, rngs=nnx.Rngs(0))(X)
    assert any("by `streams`" in note for note in caught.value.__notes__)
    y = cv.host(Noisy(), "nnx", X, rngs=nnx.Rngs(0), streams="noise")(X)
    assert y.shape == X.shape
    assert cv.host(Noisy(), "equinox", X, key=KEY)(X, key=KEY).shape == X.shape  # one key serves every stream


# State.


def test_state_that_the_host_may_not_write_is_the_hosts_own_error():
    net = LinenHost(NnxNet)
    with pytest.raises(
        flax.errors.ModifyScopeVariableError, match='"norm" in "/guest" because collection "batch_stats"'
    ):
        net.apply(net.init(KEY, X), X, rngs={"dropout": KEY})
    with pytest.raises(Exception, match=r"use `hk.transform_with_state`"):
        hk.transform(lambda x: cv.host(NnxNet, "haiku")(x)).init(KEY, X)
    hosted, state = eqx.nn.make_with_state(cv.host)(LinenNet(), "equinox", X, key=KEY)
    with pytest.raises(cv.HandleError, match=r"called with one eqx.nn.State, .* but the call has 0"):
        hosted(X, key=KEY)
    del state


def test_a_guest_whose_variables_do_not_fit_the_hosts_form_is_refused_with_its_path():
    def init(key):
        return {"a": [jnp.ones(3)], "params": {"w": jnp.ones(())}, "state": {"w/b": jnp.ones(())}}

    def clash(x):
        hk.get_parameter("w", (), init=jnp.ones)
        with hk.name_scope("w"):
            return x * hk.get_parameter("b", (), init=jnp.ones)

    nested = hk.transform(lambda x: hk.to_module(clash)("outer")(x))
    with pytest.raises(cv.HandleError, match="an array at 'outer/w' and another below it, at 'outer/w/b'"):
        LinenHost(nested).init(KEY, X)
    with pytest.raises(cv.HandleError, match=r"must return \(out, collections\), .* but returned a ArrayImpl"):
        cv.host((init, lambda variables, x: x), "nnx", rngs=nnx.Rngs(0))(X)
    wrong = lambda variables, x: (x, {"params": {}})
    hosted, state = eqx.nn.make_with_state(cv.host)((init, wrong), "equinox", key=KEY)
    with pytest.raises(cv.HandleError, match=r"may change \['a', 'state'\], but gave back \['params'\]"):
        hosted(X, state)


def test_an_equinox_guest_that_loses_its_state_and_an_nnx_guest_that_counts_in_python_are_refused():
    class Loses(eqx.Module):
        index: eqx.nn.StateIndex

        def __init__(self):
            self.index = eqx.nn.StateIndex(jnp.zeros(()))

        def __call__(self, x, state):
            return x

    with pytest.raises(cv.HandleError, match=r"tuple with one eqx.nn.State in it, .* but returned a ArrayImpl with 0"):
        cv.host(Loses(), "nnx")(X)

    class Counts(nnx.Module):
        def __init__(self, rngs):
            self.calls = 0

        def __call__(self, x):
            self.calls += 1
            return x

    with pytest.raises(cv.HandleError, match=r"at calls, from 0 to 1\. Under a host a call may write Variables"):
        cv.host(Counts(nnx.Rngs(0)), "equinox")(X)


def test_a_guest_that_makes_new_state_when_it_is_called_is_refused_where_state_keeps_its_structure():
    class Grows(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.BatchStat(jnp.zeros(()))

        def __call__(self, x):
            self.fresh = nnx.BatchStat(jnp.zeros(()))
            return x

    hosted, state = eqx.nn.make_with_state(cv.host)(Grows(nnx.Rngs(0)), "equinox")
    with pytest.raises(cv.HandleError, match="a new variable at 'batch_stats/fresh' when it was called"):
        hosted(X, state)


def test_variables_that_the_host_lacks_are_named():
    net = LinenHost(NnxNet)
    variables: Any = net.init(KEY, X)
    del variables["params"]["guest"]["first"]["kernel"]
    with pytest.raises(cv.HandleError, match="no value for the guest's variable at 'first/kernel'"):
        net.apply(variables, X, mutable=True)
    net = LinenHost(EquinoxNet)
    variables: Any = net.init(KEY, X)
    del variables["state"]
    with pytest.raises(cv.HandleError, match="no value for the guest's array at 'norm/batch_counter'"):
        net.apply(variables, X, mutable=True)
