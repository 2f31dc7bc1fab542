"""Names, initial values, metadata, checkpoints, methods and paths of hosted models; and what stays as it was."""

from __future__ import annotations

import io
from typing import Any

import equinox as eqx
import flax.linen as nn
import flax.serialization
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hosting import EquinoxNet, LinenNet, NnxNet, an_input, equinox_guest, haiku_net, nnx_guest, plain_apply, plain_init

import crossvjp as cv
from crossvjp import rules
from crossvjp.adapters.nnx import ChannelVariable
from crossvjp.testing import assert_same_bits

KEY = jax.random.key(0)
X = an_input()
SHARDED = nn.Dense(6, kernel_init=nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out")))


class LinenHost(nn.Module):
    """A Linen host of any model."""

    model: Any
    use: Any = staticmethod(lambda hosted, x: hosted(x))

    @nn.compact
    def __call__(self, x):
        return self.use(cv.host(self.model, "linen", name="guest"), x)


def shapes(tree: Any) -> Any:
    """Gives the shapes of a tree's arrays."""
    return jax.tree.map(jnp.shape, tree)


# New variables are made with the host's keys.


def test_a_linen_guest_is_initialised_as_linen_initialises_it_with_the_hosts_key():
    expected = nn.Dense(3).init(KEY, X)["params"]
    assert_same_bits(cv.host(nn.Dense(3), "equinox", X, key=KEY).params, expected)
    hosted = cv.host(nn.Dense(3), "nnx", X, rngs=nnx.Rngs(params=1, dropout=2))
    keys = {"params": nnx.Rngs(1)(), "dropout": nnx.Rngs(2)()}
    assert_same_bits(hosted.kernel[...], nn.Dense(3).init(keys, X)["params"]["kernel"])


def test_an_nnx_guest_is_made_with_the_hosts_key():
    hosted, state = eqx.nn.make_with_state(cv.host)(NnxNet, "equinox", key=KEY)
    module = NnxNet(nnx.Rngs(KEY))
    assert_same_bits(hosted.params["first"]["kernel"], module.first.kernel[...])
    assert_same_bits(state.get(hosted.state)["batch_stats"]["norm"]["var"], module.norm.var[...])


def test_haiku_equinox_and_plain_guests_are_made_with_the_hosts_key():
    net = hk.transform_with_state(haiku_net())
    params, _ = net.init(KEY, X)
    hosted: Any = eqx.nn.make_with_state(cv.host)(net, "equinox", X, key=KEY)[0]
    assert_same_bits(hosted.params["first"], params["first"])
    hosted = cv.host((plain_init, plain_apply()), "equinox", X, key=KEY)
    assert_same_bits(hosted.params["w"], plain_init(KEY, X)["params"]["w"])
    hosted = cv.host(EquinoxNet, "nnx", rngs=nnx.Rngs(params=1))
    assert_same_bits(hosted.first["weight"][...], EquinoxNet(nnx.Rngs(1)()).first.weight)
    assert_same_bits(cv.host(EquinoxNet, "equinox", key=KEY).first.weight, EquinoxNet(KEY).first.weight)


@pytest.mark.parametrize(
    "model",
    [NnxNet, EquinoxNet, hk.transform_with_state(haiku_net()), (plain_init, plain_apply())],
    ids=["nnx", "equinox", "haiku", "plain"],
)
def test_lazy_hosts_make_a_guests_variables_when_they_are_initialised_and_run_in_another_process(model):
    net = hk.transform_with_state(lambda x: cv.host(model, "haiku", name="guest")(x))
    params, state = net.init(KEY, X)
    kernels = [leaf for leaf in jax.tree.leaves((params, net.init(jax.random.key(1), X)[0])) if leaf.ndim == 2]
    assert not np.array_equal(kernels[0], kernels[len(kernels) // 2])
    again = hk.transform_with_state(lambda x: cv.host(model, "haiku", name="guest")(x))  # has run no `init`
    assert_same_bits(again.apply(params, state, KEY, X), net.apply(params, state, KEY, X))


def test_plain_parameters_may_be_any_pytree_and_their_integers_are_buffers():
    init = lambda key: [jax.random.normal(key, (5, 3)), {"shift": jnp.arange(3), "name": "dense"}]
    apply = lambda params, x: x @ params[0] + params[1]["shift"] * (params[1]["name"] == "dense")
    host = LinenHost((init, apply))
    variables = host.init(KEY, X)
    assert shapes(variables) == {"params": {"guest": {"0": (5, 3)}}, "buffers": {"guest": {"1": {"shift": (3,)}}}}
    y = host.apply(variables, X)
    assert_same_bits(y, X @ variables["params"]["guest"]["0"] + jnp.arange(3))


# Names.


def test_names_that_would_mean_something_else_in_the_host_find_their_way_back():
    """A slash in Linen's names, one path in two collections, a name of NNX's host itself, and a list of NNX."""

    class Odd(nn.Module):
        @nn.compact
        def __call__(self, x):
            w = self.param("dense/kernel", nn.initializers.ones, (5,))
            w = w * self.variable("scales", "dense/kernel", jnp.ones, (5,)).value
            return x * w * self.param("rngs", nn.initializers.ones, ())

    variables = Odd().init(KEY, X)
    y = Odd().apply(variables, X)
    hosted = cv.host(Odd(), "nnx", X, rngs=nnx.Rngs(0))
    assert_same_bits(hosted(X), y)
    assert set(nnx.to_pure_dict(nnx.state(hosted, nnx.Param))) == {"dense/kernel", "params"}
    net = hk.transform_with_state(lambda x: cv.host(Odd(), "haiku", name="guest")(x))
    params, state = net.init(KEY, X)
    assert (list(params), list(state)) == (["guest"], ["guest/scales"])
    assert_same_bits(net.apply(params, state, None, X)[0], y)

    class Listed(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(5, 5, rngs=rngs) for _ in range(2)])

        def __call__(self, x):
            return self.layers[1](self.layers[0](x))

    net = hk.transform(lambda x: cv.host(Listed, "haiku", name="guest")(x))
    params = net.init(KEY, X)
    assert list(params) == ["guest/layers/0", "guest/layers/1"]
    assert net.apply(params, None, X).shape == X.shape


def test_a_guests_other_methods_are_methods_of_the_host():
    params = nnx_guest().params
    expected = X @ params["first", "kernel"] + params["first", "bias"]
    model = nnx_guest().model
    assert_same_bits(LinenHost(model, lambda hosted, x: hosted.first_only(x)).init_with_output(KEY, X)[0], expected)
    net = hk.transform_with_state(lambda x: cv.host(model, "haiku").first_only(x))
    assert_same_bits(net.apply(*net.init(KEY, X), None, X)[0], expected)
    hosted, state = eqx.nn.make_with_state(cv.host)(model, "equinox")
    assert_same_bits(hosted.first_only(X, state)[0], expected)
    equinox = equinox_guest()
    weight, bias = equinox.params["first", "weight"], equinox.params["first", "bias"]
    np.testing.assert_allclose(cv.host(equinox.model, "nnx").first_only(X), X @ weight.T + bias, atol=1e-6)
    with pytest.raises(AttributeError, match="no attribute 'second_only'"):
        hosted.second_only(X)


def test_a_method_of_a_hosted_module_runs_under_a_rule():
    hosted = cv.host(LinenNet(), "nnx", X, rngs=nnx.Rngs(0))
    rule = rules.SignGradient().lift(lambda mdl, x: mdl.first_only(x))
    bars = nnx.grad(lambda module: jnp.sum(rule(module, X) ** 2))(hosted)
    assert set(np.unique(bars.first["kernel"][...])) <= {-1.0, 0.0, 1.0}


def test_one_hosted_module_called_twice_has_its_variables_once():
    net = LinenHost(hk.transform(lambda x: hk.Linear(5)(x)), lambda hosted, x: hosted(hosted(x)))
    variables = net.init(KEY, X)
    assert shapes(variables) == {"params": {"guest": {"linear": {"b": (5,), "w": (5, 5)}}}}
    transformed = hk.transform(lambda x: (lambda hosted: hosted(hosted(x)))(cv.host(nn.Dense(5), "haiku")))
    assert shapes(transformed.init(KEY, X)) == {"hosted": {"bias": (5,), "kernel": (5, 5)}}


def test_a_model_of_the_hosts_own_framework_is_a_submodule_as_the_framework_has_it():
    net = LinenHost((plain_init, plain_apply()), lambda _, x: cv.host(LinenNet(), "linen", name="own").first_only(x))
    assert shapes(net.init(KEY, X)) == {"params": {"own": {"first": {"bias": (6,), "kernel": (5, 6)}}}}
    assert shapes(LinenHost(nn.Dense(3)).init(KEY, X)) == {"params": {"guest": {"bias": (3,), "kernel": (5, 3)}}}
    module = cv.host(nnx_guest().model, "nnx", rngs=nnx.Rngs(5))
    assert type(module) is NnxNet
    assert module.first.kernel is not nnx_guest().model.first.kernel
    again = nnx.clone(nnx_guest().model)
    nnx.reseed(again, default=nnx.Rngs(5)())
    assert_same_bits(module(X), again(X))
    linear = eqx.nn.Linear(5, 3, key=KEY)
    assert jax.tree.leaves(cv.host(linear, "equinox"))[0] is linear.weight


def test_what_an_nnx_guest_leaves_as_intermediates_is_kept_where_linen_is_asked_for_it():
    class Leaves(nnx.Module):
        def __init__(self, rngs):
            self.scale = nnx.BatchStat(jnp.ones(()))

        def __call__(self, x):
            self.seen = nnx.Intermediate(2 * x)
            return x

    net = LinenHost(Leaves)
    variables = net.init(KEY, X)
    assert_same_bits(net.apply(variables, X), X)
    _, after = net.apply(variables, X, mutable=["intermediates"])
    assert_same_bits(after["intermediates"]["guest"]["seen"], 2 * X)
    hosted, state = eqx.nn.make_with_state(cv.host)(Leaves(nnx.Rngs(0)), "equinox")
    assert_same_bits(hosted(X, state)[0], X)
    transformed = hk.transform_with_state(lambda x: cv.host(Leaves, "haiku")(x))
    params, first = transformed.init(KEY, X)
    assert jax.tree.structure(transformed.apply(params, first, None, X)[1]) == jax.tree.structure(first)


def test_tied_variables_of_an_nnx_guest_are_one_variable_of_the_host():
    class Tied(nnx.Module):
        def __init__(self, rngs):
            self.up = nnx.Linear(5, 5, use_bias=False, rngs=rngs)
            self.down = nnx.Linear(5, 5, use_bias=False, rngs=rngs)
            self.down.kernel = self.up.kernel

        def __call__(self, x):
            return self.down(self.up(x))

    hosted = cv.host(Tied, "equinox", key=KEY)
    (kernel,) = jax.tree.leaves(hosted.params)
    (bar,) = jax.tree.leaves(eqx.filter_grad(lambda hosted: hosted(X).sum())(hosted))
    np.testing.assert_allclose(bar, jax.grad(lambda kernel: (X @ kernel @ kernel).sum())(kernel), rtol=1e-5)


# Metadata, filters and checkpoints.


def test_metadata_goes_with_the_variables_where_the_host_has_a_place_for_it():
    hosted = cv.host(SHARDED, "nnx", X, rngs=nnx.Rngs(0))
    assert hosted.kernel.get_metadata()["out_sharding"] == ("in", "out")
    assert hosted(X).shape == (4, 6)
    bars: Any = eqx.filter_grad(lambda hosted: hosted(X).sum())(cv.host(SHARDED, "equinox", X, key=KEY))
    assert bars.params["kernel"].names == ("in", "out")

    def make(rngs):
        init = nnx.with_partitioning(nnx.initializers.ones, ("in", "out"), eager_sharding=False)
        module = nnx.Linear(5, 6, kernel_init=init, rngs=rngs)
        module.bias = nnx.Param(jnp.zeros(6), unit="m")
        return module

    params: Any = LinenHost(make).init(KEY, X)["params"]["guest"]
    assert params["kernel"].names == ("in", "out")
    assert nn.get_partition_spec(params)["kernel"] == jax.sharding.PartitionSpec("in", "out")
    assert params["bias"].metadata["unit"] == "m"
    y: Any = LinenHost(make).apply({"params": {"guest": params}}, X)
    assert y.shape == (4, 6)


def test_haiku_has_bare_arrays_in_the_place_of_boxes():
    net = hk.transform(lambda x: cv.host(SHARDED, "haiku", name="guest")(x))
    params = net.init(KEY, X)
    assert isinstance(params["guest"]["kernel"], jax.Array)
    assert net.apply(params, None, X).shape == (4, 6)


def test_the_hosts_filters_and_serialisation_know_a_guests_variables():
    model = LinenNet()
    hosted = cv.host(model, "nnx", X, rngs=nnx.Rngs(0, dropout=1))
    graphdef, params, stats, rest = nnx.split(hosted, nnx.Param, nnx.BatchStat, ...)
    assert shapes(nnx.to_pure_dict(stats)) == {"norm": {"mean": (6,), "var": (6,)}}
    assert_same_bits(nnx.merge(graphdef, params, stats, rest, copy=True)(X), hosted(X))

    pair = eqx.nn.make_with_state(cv.host)(model, "equinox", X, key=KEY)
    stream = io.BytesIO()
    eqx.tree_serialise_leaves(stream, pair)
    stream.seek(0)
    like = eqx.nn.make_with_state(cv.host)(model, "equinox", X, key=jax.random.key(9))
    assert eqx.tree_equal(eqx.tree_deserialise_leaves(stream, like), pair)

    variables: Any = LinenHost(hk.transform(lambda x: hk.Linear(3)(x))).init(KEY, X)
    again = flax.serialization.from_bytes(variables, flax.serialization.to_bytes(variables))
    assert_same_bits(again, variables)

    net = hk.transform_with_state(lambda x: cv.host(model, "haiku", name="guest")(x))
    haiku_params, _ = net.init(KEY, X)
    decayed, _ = hk.data_structures.partition(lambda module, name, value: name == "kernel", haiku_params)
    assert list(decayed) == ["guest/first"]


def test_a_guests_channels_are_channels_of_an_nnx_host():
    class Probed(nn.Module):
        @nn.compact
        def __call__(self, x):
            return rules.Probe(cv.channel(self, "seen", cv.Sum()))(nn.Dense(3))(x)

    hosted = cv.host(Probed(), "nnx", X, rngs=nnx.Rngs(0))
    wanted = nnx.Any(nnx.Param, ChannelVariable)
    bars = nnx.grad(lambda module: module(X).sum(), argnums=nnx.DiffState(0, wanted))(hosted)
    (sent,) = cv.channels(bars).values()
    assert float(sent.count) == 1.0


# What is given stays as it is.


def test_an_nnx_guest_and_an_equinox_state_stay_as_they_were():
    model, state = equinox_guest().model
    hosted = cv.host((model, state), "nnx", rngs=nnx.Rngs(0))
    hosted(X)
    assert jax.tree.leaves(state)  # not used up
    module = nnx_guest().model
    before = nnx.to_pure_dict(nnx.clone(nnx.state(module, nnx.Not(nnx.RngKey))))
    net = LinenHost(module)
    net.apply(net.init(KEY, X), X, rngs={"dropout": KEY}, mutable=True)
    cv.host(module, "nnx", rngs=nnx.Rngs(5))(X)
    assert_same_bits(nnx.to_pure_dict(nnx.state(module, nnx.Not(nnx.RngKey))), before)
    module.first.kernel[...] += 1.0  # nor does a guest change with it
    hosted = cv.host(nnx_guest().model, "nnx")
    module.first.kernel[...] -= 1.0
    assert not np.array_equal(hosted.first.kernel[...], module.first.kernel[...])


# Other parts of the library.


def test_attach_reaches_the_hosted_module_and_linens_and_haikus_modules_inside_it():
    net = hk.transform(lambda x: cv.host(nn.Sequential([nn.Dense(4), nn.Dense(3)]), "haiku", name="guest")(x))
    paths = [(row.path, row.kind) for row in cv.sites(net, X)]
    assert paths == [
        ("guest", "Hosted"),
        ("guest/~", "Sequential"),
        ("guest/layers_0", "Dense"),
        ("guest/layers_1", "Dense"),
    ]
    params = net.init(KEY, X)

    def signed(where):
        attached = cv.attach(net, rules.SignGradient(), where=where)
        bars = jax.grad(lambda params: jnp.sum(attached.apply(params, None, X) ** 2))(params)
        return {module for module, held in bars.items() if np.all(np.isin(held["kernel"], [-1.0, 0.0, 1.0]))}

    assert signed("guest") == {"guest/layers_0", "guest/layers_1"}
    assert signed("guest/layers_1") == signed("*_1") == {"guest/layers_1"}
    assert signed(nn.Dense) == {"guest/layers_0", "guest/layers_1"}


def test_attach_to_nnx_and_equinox_hosts_reaches_the_hosted_module():
    hosted = cv.attach(cv.host(nn.Dense(3), "equinox", X, key=KEY), rules.SignGradient(), where="")
    bars = eqx.filter_grad(lambda hosted: jnp.sum(hosted(X) ** 2))(hosted)
    assert set(np.unique(bars.params["kernel"])) <= {-1.0, 0.0, 1.0}
    hosted = cv.host(nn.Dense(3), "nnx", X, rngs=nnx.Rngs(0))
    module = cv.attach(nnx.Sequential(hosted), rules.SignGradient(), where="*0")
    bars = nnx.grad(lambda module: jnp.sum(module(X) ** 2))(module)
    assert all(set(np.unique(leaf)) <= {-1.0, 0.0, 1.0} for leaf in jax.tree.leaves(bars))


def test_a_hosted_module_may_be_hosted_again():
    inner = cv.host(hk.transform(lambda x: hk.Linear(3)(x)), "equinox", X, key=KEY)
    outer = cv.host(inner, "nnx")
    assert_same_bits(outer(X), inner(X))
    assert shapes(nnx.to_pure_dict(nnx.state(outer))) == {"params": {"linear": {"b": (3,), "w": (5, 3)}}}


def test_a_linen_module_that_a_guest_makes_while_linen_runs_is_the_guests_own():
    class Mixed(nnx.Module):
        def __init__(self, rngs):
            self.dense = cv.host(nn.Dense(3), "nnx", X, rngs=rngs)

        def __call__(self, x):
            return rules.SignGradient()(self.dense)(x)  # draws nothing, and needs no key

    net = LinenHost(Mixed)
    variables = net.init(KEY, X)
    assert shapes(variables) == {"params": {"guest": {"dense": {"bias": (3,), "kernel": (5, 3)}}}}
    kernel: Any = variables["params"]["guest"]["dense"]["kernel"]
    y: Any = net.apply(variables, X)
    np.testing.assert_allclose(y, X @ kernel, atol=1e-6)
