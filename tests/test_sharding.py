"""Wrapped modules on eight devices: `shard_map` with `check_vma` on and off, and `jit` of sharded arrays.

The devices are those that conftest.py asks for. A sum over shards adds in another order than the
unsharded program, so what is compared with that has the tolerance of `assert_close`. The unwrapped
program on the same shards runs the same operations, and is compared bit for bit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_world
from flax import nnx
from helpers import is_coming
from hosts import HOSTS
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from rules import WRAPS, f, identity, plain, sign_gradient, unchanged
from worlds import FEATURES, World

import crossvjp as cv
from crossvjp.testing import assert_close, assert_same_bits

DEVICES = 8
UNITS = 16
X = jax.random.normal(jax.random.key(7), (16, 2))
WORLD_X = jax.random.normal(jax.random.key(7), (16, FEATURES))

both_checks = pytest.mark.parametrize("check_vma", [True, False], ids=["vma", "no_vma"])
each_host = pytest.mark.parametrize("host", ["linen compact", "nnx graph", "haiku module", "equinox", "plain"])


@functools.cache
def mesh_of(kind: AxisType) -> jax.sharding.Mesh:
    devices = jax.devices("cpu")
    assert len(devices) >= DEVICES, f"these tests need {DEVICES} CPU devices, but there are {len(devices)}"
    return jax.make_mesh((DEVICES,), ("i",), axis_types=(kind,), devices=devices[:DEVICES])


@pytest.fixture
def mesh():
    return mesh_of(AxisType.Auto)


class Scale(cv.Rule):
    """Scales the parameters' gradient."""

    factor: float = 1.0

    def backward(self, call, y_bar):
        bar = call.pullback(y_bar)
        return bar.replace(variables=jax.tree.map(lambda leaf: self.factor * leaf, bar.variables))


def bare(fn: Any) -> Any:
    """Leaves a function of a module unwrapped."""
    return fn


def lift_by_custom_vjp(fn: Any) -> Any:
    """Wraps a function of a module by `custom_vjp` with its own gradient."""
    return cv.custom_vjp(fn, lambda mdl, *args: cv.vjp(fn, mdl, *args), unchanged)


# What a wrapping does to the parameters' gradient: a factor. Powers of two are exact.
LIFTS: dict[str, tuple[Any, float]] = {
    "identity": (identity.lift, 1.0),
    "scale": (lambda fn: Scale(4.0).lift(fn), 4.0),
    "custom_vjp": (lift_by_custom_vjp, 1.0),
}


def rows(mdl: Any, x: Any) -> Any:
    """Calls a module row by row, since some take vectors only."""
    return jnp.stack([mdl(row) for row in x])


def loss_of(host: str, lift: Any) -> Callable[[Any, Any], Any]:
    """The sum over the rows that it is given."""
    return lambda params, x: jnp.sum(jnp.sin(HOSTS[host].run(params, lift(rows), x)))


def on_shards(fn: Any, mesh: Any, check_vma: bool, out_specs: Any) -> Any:
    """Runs a function of replicated parameters and of its part of the batch on every device."""
    return jax.shard_map(fn, mesh=mesh, in_specs=(P(), P("i")), out_specs=out_specs, check_vma=check_vma)


def summed(loss: Any) -> Any:
    return lambda *args: jax.lax.psum(loss(*args), "i")


def sharded(loss: Any, mesh: Any, check_vma: bool) -> Any:
    """The sum of the devices' losses."""
    return on_shards(summed(loss), mesh, check_vma, P())


def gradient(loss: Any, params: Any, x: Any = X) -> Any:
    return jax.jit(jax.grad(loss, argnums=(0, 1)))(params, x)


def scaled(bars: tuple[Any, Any], factor: float) -> tuple[Any, Any]:
    """What a rule that scales the parameters' gradient makes of it."""
    return jax.tree.map(lambda leaf: factor * leaf, bars[0]), bars[1]


@functools.cache
def unsharded(host: str) -> Any:
    """The gradient of the unwrapped program on the whole batch."""
    return gradient(loss_of(host, bare), HOSTS[host].params)


@functools.cache
def unwrapped(host: str, mesh: Any, check_vma: bool) -> Any:
    """The gradient of the unwrapped program on shards."""
    return gradient(sharded(loss_of(host, bare), mesh, check_vma), HOSTS[host].params)


@both_checks
@pytest.mark.parametrize("wrap", LIFTS)
@each_host
def test_the_gradient_of_a_sharded_loss_is_the_unsharded_gradient(host, wrap, check_vma, mesh):
    lift, factor = LIFTS[wrap]
    bars = gradient(sharded(loss_of(host, lift), mesh, check_vma), HOSTS[host].params)
    assert_same_bits(bars, scaled(unwrapped(host, mesh, check_vma), factor))
    assert_close(bars, scaled(unsharded(host), factor))


def mean_inside(loss, mesh, check_vma):
    return on_shards(lambda *args: jax.lax.pmean(loss(*args), "i"), mesh, check_vma, P()), 1 / DEVICES


def sum_outside(loss, mesh, check_vma):
    losses = on_shards(lambda *args: loss(*args)[None], mesh, check_vma, P("i"))
    return lambda *args: losses(*args).sum(), 1


@both_checks
@pytest.mark.parametrize("reduce", [mean_inside, sum_outside], ids=lambda reduce: reduce.__name__)
@pytest.mark.parametrize("wrap", LIFTS)
def test_it_does_not_matter_where_the_loss_is_reduced(wrap, reduce, check_vma, mesh):
    lift, factor = LIFTS[wrap]
    loss, share = reduce(loss_of("plain", lift), mesh, check_vma)
    expected = jax.tree.map(lambda leaf: share * leaf, scaled(unsharded("plain"), factor))
    assert_close(gradient(loss, HOSTS["plain"].params), expected)


@each_host
def test_with_check_vma_a_rule_sees_the_gradient_of_the_whole_batch(host, mesh):
    bars = gradient(sharded(loss_of(host, sign_gradient.lift), mesh, True), HOSTS[host].params)
    own = unsharded(host)
    assert_same_bits(bars[0], jax.tree.map(jnp.sign, own[0]))
    assert_close(bars[1], own[1])


@each_host
def test_without_check_vma_a_rule_sees_the_gradient_of_its_shard(host, mesh):
    bars = gradient(sharded(loss_of(host, sign_gradient.lift), mesh, False), HOSTS[host].params)
    of_shard = jax.jit(jax.grad(loss_of(host, bare)))
    shards = [of_shard(HOSTS[host].params, x) for x in jnp.split(X, DEVICES)]
    assert_same_bits(bars[0], jax.tree.map(lambda *leaves: sum(map(jnp.sign, leaves)), *shards))
    assert_close(bars[1], unsharded(host)[1])


def grad_inside(host: str, lift: Any, mesh: Any, check_vma: bool) -> Any:
    """The gradient taken on each device, of its own loss.

    With `check_vma` JAX adds the devices up, since parameters that are the same everywhere have one gradient.
    Without it, that is left to the user.
    """

    def inside(params: Any, x: Any) -> Any:
        params_bar, x_bar = jax.grad(loss_of(host, lift), argnums=(0, 1))(params, x)
        return params_bar if check_vma else jax.lax.psum(params_bar, "i"), x_bar

    return jax.jit(on_shards(inside, mesh, check_vma, (P(), P("i"))))(HOSTS[host].params, X)


@both_checks
@each_host
def test_a_gradient_taken_inside_is_the_unsharded_gradient(host, check_vma, mesh):
    lift, factor = LIFTS["scale"]
    bars = grad_inside(host, lift, mesh, check_vma)
    assert_same_bits(bars, scaled(grad_inside(host, bare, mesh, check_vma), factor))
    assert_close(bars, scaled(unsharded(host), factor))


@pytest.mark.parametrize(("check_vma", "times"), [(True, 1), (False, DEVICES)], ids=["vma", "no_vma"])
@pytest.mark.parametrize("wrap", LIFTS)
def test_a_gradient_of_a_psum_taken_inside_is_that_of_jax_wrapped_or_not(wrap, check_vma, times, mesh):
    """Without `check_vma` the transpose of psum is psum, so every device counts the loss of all: jax-ml/jax#21855."""

    def run(lift: Any) -> Any:
        def inside(params: Any, x: Any) -> Any:
            bars = jax.grad(summed(loss_of("plain", lift)), argnums=(0, 1))(params, x)
            return bars if check_vma else (jax.lax.psum(bars[0], "i"), bars[1])

        return jax.jit(on_shards(inside, mesh, check_vma, (P(), P("i"))))(HOSTS["plain"].params, X)

    lift, factor = LIFTS[wrap]
    bars = run(lift)
    assert_same_bits(bars, scaled(run(bare), factor))
    assert_close(bars, jax.tree.map(lambda leaf: times * leaf, scaled(unsharded("plain"), factor)))


def matmul(w: Any, x: Any) -> Any:
    return x @ w


def by_hand(reduce: Callable[[Any], Any]) -> Any:
    """A rule for `x @ w` without the pullback; `reduce` is what it does about the other shards."""

    def forward(w: Any, x: Any) -> Any:
        return x @ w, (w, x)

    def backward(residuals: Any, y_bar: Any) -> Any:
        w, x = residuals
        return y_bar @ w.T, reduce(x.T @ y_bar)

    return cv.custom_vjp(matmul, forward, backward)


def hand_written(reduce: Any, mesh: Any, check_vma: bool) -> tuple[Any, Any]:
    """Gradients of the same loss, under a rule written by hand on shards and of the unsharded program."""
    w = jax.random.normal(jax.random.key(0), (2, 3))
    loss = lambda mul: lambda w, x: jnp.sum(jnp.sin(mul(w, x)))
    bars = gradient(sharded(loss(by_hand(reduce)), mesh, check_vma), w)
    return bars, gradient(loss(matmul), w)


def test_with_check_vma_a_hand_written_rule_must_sum_over_shards(mesh):
    bars, own = hand_written(lambda w_bar: jax.lax.psum(w_bar, "i"), mesh, True)
    assert_close(bars, own)
    words = (
        r"\{V:i\} which doesn't match expected type"
        if is_coming()
        else "manual axis types do not match|statically inferred"
    )
    with pytest.raises(ValueError, match=words):
        hand_written(lambda w_bar: w_bar, mesh, True)


def test_without_check_vma_a_hand_written_rule_must_not_sum_over_shards(mesh):
    """With the sum its weight gradient is eight times too large, in silence; see jax-ml/jax#21855."""
    bars, own = hand_written(lambda w_bar: w_bar, mesh, False)
    assert_close(bars, own)
    bars, own = hand_written(lambda w_bar: jax.lax.psum(w_bar, "i"), mesh, False)
    assert_close(bars, scaled(own, DEVICES))


def test_the_comparison_catches_a_rule_that_sums_twice(mesh):
    bars, own = hand_written(lambda w_bar: jax.lax.psum(w_bar, "i"), mesh, False)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_close(bars, own)


def two_outputs(params: Any, x: Any) -> tuple[Any, Any]:
    y = jnp.tanh(x @ params["kernel"])
    return y, jnp.sum(y**2)


@cv.rule
def of_the_first(call, y_bar):
    """Pulls the first output's cotangent back alone."""
    return call.pullback((y_bar[0], None))


# The part of the outputs that the loss uses, and the wrapping.
PARTS = {
    "first": (lambda y, total: jnp.sum(jnp.sin(y)), identity.lift),
    "second": (lambda y, total: total, identity.lift),
    "first_custom_vjp": (lambda y, total: jnp.sum(jnp.sin(y)), lift_by_custom_vjp),
    "first_of_both": (lambda y, total: jnp.sum(jnp.sin(y)) + 0 * total, of_the_first.lift),
}


@both_checks
@pytest.mark.parametrize("name", PARTS)
def test_an_output_that_gets_no_cotangent_counts_as_zero(name, check_vma, mesh):
    used, lift = PARTS[name]
    params = HOSTS["plain"].params
    loss = lambda lift: lambda params, x: used(*lift(two_outputs)(params, x))
    bars, own = (gradient(sharded(loss(lift), mesh, check_vma), params) for lift in (lift, bare))
    assert_same_bits(bars, own)
    assert_close(bars, gradient(loss(bare), params))


@cv.rule
def bias_only(call, y_bar):
    """Leaves out all cotangents but the bias's."""
    bar = call.pullback(y_bar)
    return bar.replace(inputs=(None,), variables={"kernel": None, "bias": bar.variables["bias"]})


@both_checks
def test_a_cotangent_that_a_rule_leaves_out_is_zero(check_vma, mesh):
    params = HOSTS["plain"].params
    loss = lambda lift: lambda params, x: jnp.sum(jnp.sin(lift(lambda p, x: x @ p["kernel"] + p["bias"])(params, x)))
    bars = gradient(sharded(loss(bias_only.lift), mesh, check_vma), params)
    params_bar, _ = gradient(loss(bare), params)
    assert_close(bars, ({"kernel": 0 * params["kernel"], "bias": params_bar["bias"]}, 0 * X))


# A layer of 16 units, as `(params, run)`. `run(params, x, lift, units)` gets the parameters of so many units.


def linen_units() -> tuple[Any, Any]:
    class Net(nn.Module):
        lift: Any
        units: int

        @nn.compact
        def __call__(self, x):
            return self.lift(f)(nn.Dense(self.units), x)

    run = lambda params, x, lift, units: Net(lift, units).apply(params, x)
    return Net(bare, UNITS).init(jax.random.key(0), X), run


def nnx_units() -> tuple[Any, Any]:
    graphdef, params = nnx.split(nnx.Linear(2, UNITS, rngs=nnx.Rngs(0)))
    return params, lambda params, x, lift, units: lift(f)(nnx.merge(graphdef, params, copy=True), x)


def haiku_units() -> tuple[Any, Any]:
    net = hk.transform(lambda x, lift, units: lift(f)(hk.Linear(units), x))
    run = lambda params, x, lift, units: net.apply(params, None, x, lift, units)
    return net.init(jax.random.PRNGKey(0), X, bare, UNITS), run


def equinox_units() -> tuple[Any, Any]:
    params, static = eqx.partition(eqx.nn.Linear(2, UNITS, key=jax.random.key(0)), eqx.is_array)
    return params, lambda params, x, lift, units: lift(rows)(eqx.combine(params, static), x)


def plain_units() -> tuple[Any, Any]:
    params = {"kernel": jax.random.normal(jax.random.key(0), (2, UNITS)), "bias": jnp.zeros(UNITS)}
    return params, lambda params, x, lift, units: lift(lambda p, x: x @ p["kernel"] + p["bias"])(params, x)


LAYERS = {
    "linen": linen_units,
    "nnx": nnx_units,
    "haiku": haiku_units,
    "equinox": equinox_units,
    "plain": plain_units,
}


def by_units(params: Any) -> Any:
    """The specs that share the units out; kernels have them first or last."""
    return jax.tree.map(lambda leaf: P(*("i" if size == UNITS else None for size in leaf.shape)), params)


@functools.cache
def layer_of(name: str) -> Any:
    return LAYERS[name]()


UNIT_LIFTS = {"sign": sign_gradient.lift, "custom_vjp": lift_by_custom_vjp}


def expected_of(wrap: str, bars: tuple[Any, Any]) -> tuple[Any, Any]:
    return (jax.tree.map(jnp.sign, bars[0]), bars[1]) if wrap == "sign" else bars


@functools.cache
def units_on_shards(layer: str, lift: Any, mesh: Any, check_vma: bool) -> Any:
    params, run = layer_of(layer)
    loss = summed(lambda params, x: jnp.sum(jnp.sin(run(params, x, lift, UNITS // DEVICES))))
    specs = (by_units(params), P())
    return gradient(jax.shard_map(loss, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=check_vma), params)


@functools.cache
def units_under_jit(layer: str, lift: Any, mesh: Any) -> Any:
    """Value, output and gradients; `mesh` shares the units out, or is `None`."""
    params, run = layer_of(layer)
    args = params, X
    if mesh is not None:
        specs = by_units(params), P()
        args = jax.tree.map(lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), args, specs)

    def loss(params: Any, x: Any) -> Any:
        out = run(params, x, lift, UNITS)
        return jnp.sum(jnp.sin(out)), out

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(*args)


@both_checks
@pytest.mark.parametrize("wrap", UNIT_LIFTS)
@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_whose_units_are_sharded_has_the_unsharded_gradient(layer, wrap, check_vma, mesh):
    bars = units_on_shards(layer, UNIT_LIFTS[wrap], mesh, check_vma)
    assert_same_bits(bars, expected_of(wrap, units_on_shards(layer, bare, mesh, check_vma)))
    assert_close(bars, expected_of(wrap, units_under_jit(layer, bare, None)[1]))


def assert_same_shardings(one: Any, other: Any) -> None:
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim), (a.sharding, b.sharding)


@pytest.mark.parametrize("wrap", UNIT_LIFTS)
@pytest.mark.parametrize("layer", LAYERS)
def test_under_jit_the_gradient_of_sharded_units_is_sharded_as_the_unwrapped_one(layer, wrap, mesh):
    results, bars = units_under_jit(layer, UNIT_LIFTS[wrap], mesh)
    own_results, own_bars = units_under_jit(layer, bare, mesh)
    assert_same_shardings((results, bars), (own_results, own_bars))
    assert not any(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves((results[1], bars[0])))
    unsharded_results, unsharded_bars = units_under_jit(layer, bare, None)
    assert_close(results, unsharded_results)
    assert_close(bars, expected_of(wrap, unsharded_bars))


def test_the_comparison_catches_another_sharding(mesh):
    one, other = (jax.device_put(X, NamedSharding(mesh, spec)) for spec in (P("i"), P()))
    assert_same_shardings(one, one)
    with pytest.raises(AssertionError, match="spec=P"):
        assert_same_shardings(one, other)


def world_gradient(world: World, wrap: Any, mesh: Any) -> Any:
    """Value, output, state and gradients of a whole model with state and keys; `mesh` shares the batch out."""

    def loss(params: Any, x: Any, rest: Any) -> Any:
        out, after = world.run({"params": params, "rest": rest}, x, wrap)
        return jnp.sum(jnp.sin(out) * jnp.arange(out.size).reshape(out.shape)), (out, after)

    params, x, rest = world.variables["params"], WORLD_X, world.variables["rest"]
    if mesh is not None:
        params, rest = jax.device_put((params, rest), NamedSharding(mesh, P()))
        x = jax.device_put(x, NamedSharding(mesh, P("i")))
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, x, rest)


def has_dropped(results: Any) -> np.ndarray:
    return np.asarray(results[0][1][0]) == 0


@functools.cache
def unsharded_world(name: str) -> Any:
    return world_gradient(make_world(name), plain, None)


def test_under_jit_a_sharded_batch_gives_the_unsharded_gradient(world, mesh):
    results, own = (world_gradient(world, wrap, mesh) for wrap in (WRAPS["rule"], plain))
    assert not results[0][1][0].sharding.is_fully_replicated
    assert_same_shardings(results, own)
    assert_close(results, own)
    assert_close(results, unsharded_world(world.name))
    np.testing.assert_array_equal(has_dropped(results), has_dropped(unsharded_world(world.name)))


# Linen's and Equinox's layers of this world do not run, unwrapped, on arrays with explicit sharding.
@pytest.mark.parametrize("world", ["nnx", "haiku", "plain"], indirect=True)
def test_explicit_sharding_gives_the_unsharded_gradient(world):
    mesh = mesh_of(AxisType.Explicit)
    with jax.set_mesh(mesh):
        results, own = (world_gradient(world, wrap, mesh) for wrap in (WRAPS["custom_vjp"], plain))
    assert results[1][1].sharding.spec == P("i", None)
    assert_same_shardings(results, own)
    assert_close(results, own)
    assert_close(results, unsharded_world(world.name))


@pytest.mark.parametrize("name", PARTS)
def test_explicit_sharding_an_output_that_gets_no_cotangent_counts_as_zero(name):
    used, lift = PARTS[name]
    mesh, params = mesh_of(AxisType.Explicit), HOSTS["plain"].params
    placed = jax.device_put(params, NamedSharding(mesh, P())), jax.device_put(X, NamedSharding(mesh, P("i")))
    loss = lambda lift: lambda params, x: used(*lift(two_outputs)(params, x))
    with jax.set_mesh(mesh):
        bars = gradient(loss(lift), *placed)
    assert_close(bars, gradient(loss(bare), params))


# A batch norm as `(params, state, run)`. `run(params, state, x, lift, axis)` gives the output and the state after it,
# with statistics over the devices of a mesh axis too, unless that is `None`.


def linen_norm() -> tuple[Any, Any, Any]:
    class Net(nn.Module):
        lift: Any
        axis: Any

        @nn.compact
        def __call__(self, x):
            return self.lift(f)(nn.BatchNorm(use_running_average=False, momentum=0.9, axis_name=self.axis), x)

    variables = Net(bare, None).init(jax.random.key(0), X)

    def run(params: Any, state: Any, x: Any, lift: Any, axis: Any) -> Any:
        return Net(lift, axis).apply({"params": params, "batch_stats": state}, x, mutable=["batch_stats"])

    return variables["params"], variables["batch_stats"], run


def nnx_norm() -> tuple[Any, Any, Any]:
    make = lambda axis: nnx.split(nnx.BatchNorm(2, momentum=0.9, axis_name=axis, rngs=nnx.Rngs(0)), nnx.Param, ...)
    graphdefs = {axis: make(axis)[0] for axis in (None, "i")}

    def run(params: Any, state: Any, x: Any, lift: Any, axis: Any) -> Any:
        norm = nnx.merge(graphdefs[axis], params, state, copy=True)
        return lift(f)(norm, x), nnx.state(norm, nnx.BatchStat)

    _, params, state = make(None)
    return params, state, run


def haiku_norm() -> tuple[Any, Any, Any]:
    def net(x: Any, lift: Any, axis: Any) -> Any:
        norm = hk.BatchNorm(create_scale=True, create_offset=True, decay_rate=0.9, cross_replica_axis=axis)
        return lift(f)(norm, x, is_training=True)

    transformed = hk.transform_with_state(net)
    run = lambda params, state, x, lift, axis: transformed.apply(params, state, None, x, lift, axis)
    return *transformed.init(jax.random.PRNGKey(0), X, bare, None), run


# Equinox's takes no mesh axis beside the axis of its rows, unwrapped neither.
NORMS = {"linen": linen_norm, "nnx": nnx_norm, "haiku": haiku_norm}


@both_checks
@pytest.mark.parametrize("through_state", [False, True], ids=["output", "output_and_state"])
@pytest.mark.parametrize("name", NORMS)
def test_batch_statistics_over_all_devices_are_those_of_the_whole_batch(name, through_state, check_vma, mesh):
    params, state, run = NORMS[name]()

    def gradients(lift: Any, axis: Any) -> Any:
        def loss(params: Any, x: Any) -> Any:
            out, after = run(params, state, x, lift, axis)
            of_output = jnp.sum(jnp.sin(out) * x)
            of_state = sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(after) if leaf.dtype == jnp.float32)
            total = of_output if axis is None else jax.lax.psum(of_output, axis)
            return total + (of_state if through_state else 0), after

        fn = loss if axis is None else on_shards(loss, mesh, check_vma, (P(), P()))
        return jax.jit(jax.value_and_grad(fn, argnums=(0, 1), has_aux=True))(params, X)

    results = gradients(identity.lift, "i")
    assert_close(results, gradients(bare, "i"))
    assert_close(results, gradients(bare, None))
    assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (results[0][1], state)), strict=True))
