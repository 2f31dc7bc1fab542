"""Conversions of a layer: wrong layouts are noticed, nothing is lost on a round trip, and what can't be says why."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from migration_cases import CASES, arguments, at_work, built
from migration_layers import BUILDERS, assert_near, called, check_converts, compiled, evaluated, random_arrays

import crossvjp
from crossvjp.migration import (
    AddConstant,
    Flip,
    Layer,
    Move,
    Negate,
    ReorderBlocks,
    compare_settings,
    convert,
    convert_cotangents,
    convert_names,
    convert_second_moments,
    layout,
    layout_of,
    register_layer,
)

CIRCLE = ("haiku", "linen", "nnx", "equinox")
LOSSY = [1e-30, 0.1, -1.0, -0.0, 0.0, 1e10, -3.3, np.nan, np.inf, 1e-45, -1 + 6e-8, 16777217.0]


def then(name, more):
    """Gives a layout with further pieces behind the canonical array of this name: a wrong one."""

    def wrong(right):
        def moves(layer):
            return [
                dataclasses.replace(move, pieces=[*move.pieces, *more]) if list(move.canonical) == [name] else move
                for move in right.moves(layer)
            ]

        return dataclasses.replace(right, moves=moves)

    return wrong


@pytest.mark.parametrize(
    ("name", "target", "wrong"),
    [
        ("lstm", "equinox", then("bias", [ReorderBlocks(0, (0, 2, 1, 3))])),
        ("lstm", "nnx", then("hidden_kernel", [ReorderBlocks(1, (0, 1, 3, 2))])),
        ("lstm", "haiku", then("bias", [AddConstant(0, (0.0, -1.0, 0.0, 0.0))])),
        ("conv_transpose, same", "equinox", then("kernel", [Flip((0,))])),
        ("attention", "haiku", then("query_kernel", [Flip((1,))])),
    ],
    ids=["gates of the bias", "gates of a kernel", "no forget bias", "flipped kernel", "heads"],
)
def test_a_wrong_layout_is_noticed(name, target, wrong):
    source, layer = at_work(name, "linen", "float32"), built(name, target, "float32")
    layout = wrong(layer.layout)
    moved = convert(source.built.layer, source.built.layout, source.params, {}, layer.layer, layout)
    converted = evaluated(layer, moved.params, moved.state, arguments(name, "float32"))
    with pytest.raises(AssertionError, match=r"output is .* off"):
        check_converts(source, converted, layout, 1e-5)


def round_trip(name, start, params, state, dtype, remainders=True):
    """Moves arrays round the circle of frameworks, back to where they started."""
    frameworks = [framework for framework in CIRCLE if framework in CASES[name].makes]
    place, remainder = frameworks.index(start), None
    for step in range(len(frameworks)):
        source, target = (built(name, frameworks[(place + step + next) % len(frameworks)], dtype) for next in (0, 1))
        moved = convert(source.layer, source.layout, params, state, target.layer, target.layout, remainder)
        params, state, remainder = moved.params, moved.state, moved.remainder if remainders else None
    return params, state


def assert_bits(arrays, others):
    assert arrays.keys() == others.keys()
    for path in arrays:
        one, other = np.asarray(arrays[path]), np.asarray(others[path])
        assert (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes()), path


STARTS = [
    (name, start)
    for name, case in CASES.items()
    for start in case.makes
    if "lacks" not in name or start == "nnx"  # the others have what it lacks
]


@pytest.mark.parametrize(("name", "start"), STARTS)
def test_a_layer_comes_back_round_the_circle_bit_for_bit(name, start):
    layer = built(name, start, "float32").layer
    params, state = random_arrays(layer.params, "float32"), random_arrays(layer.state, "float32", 1)
    state = {path: np.asarray(array, layer.state[path].dtype) for path, array in state.items()}
    params_back, state_back = round_trip(name, start, params, state, "float32")
    assert_bits(params_back, params)
    assert_bits(state_back, state)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("start", CIRCLE)
@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
def test_the_forget_gate_s_bias_comes_back_whatever_its_values(start, dtype):
    layer = built("lstm", start, "float32").layer
    params = random_arrays(layer.params, jnp.dtype(dtype))
    for path in params:
        if path[-1] in ("b", "bias"):
            params[path] = np.resize(np.asarray(LOSSY, jnp.dtype(dtype)), params[path].shape)
    assert_bits(round_trip("lstm", start, params, {}, "float32")[0], params)


def test_without_the_remainder_bits_are_lost_so_the_test_above_can_fail():
    params = random_arrays(built("lstm", "haiku", "float32").layer.params, "float32")
    back, _ = round_trip("lstm", "haiku", params, {}, "float32", remainders=False)
    assert back[("linear", "b")].tobytes() != params[("linear", "b")].tobytes()
    np.testing.assert_allclose(back[("linear", "b")], params[("linear", "b")], atol=1e-6)


def pair(name, first, second, dtype="float32"):
    one, other = built(name, first, dtype), built(name, second, dtype)
    there = functools.partial(convert, source=one.layer, source_layout=one.layout)
    there = functools.partial(there, target=other.layer, target_layout=other.layout)
    back = functools.partial(convert, source=other.layer, source_layout=other.layout)
    return there, functools.partial(back, target=one.layer, target_layout=one.layout), one


def test_only_what_was_trained_on_is_converted_anew():
    there, back, haiku = pair("lstm", "haiku", "linen")
    params = random_arrays(haiku.layer.params, "float32")
    moved = there(params=params, state={})
    trained = {path: array.copy() for path, array in moved.params.items()}
    trained[("hf", "bias")][1] += 0.25
    stale, fresh = (back(params=trained, state={}, remainder=kept) for kept in (moved.remainder, None))
    bias, plain = stale.params[("linear", "b")], fresh.params[("linear", "b")]
    changed = np.arange(12) == 2 * 3 + 1  # gates i, g, f, o
    assert_bits({"": bias[~changed]}, {"": params[("linear", "b")][~changed]})
    assert_bits({"": bias[changed]}, {"": plain[changed]})


def test_haiku_s_two_biases_are_added_and_come_apart_again():
    there, back, haiku = pair("rnn with two biases in Haiku", "haiku", "linen")
    params = random_arrays(haiku.layer.params, "float32")
    moved = there(params=params, state={})
    summed = params[("linear", "b")] + params[("linear_1", "b")]
    assert_bits({"": moved.params[("i", "bias")]}, {"": summed})
    trained = {path: array.copy() for path, array in moved.params.items()}
    trained[("i", "bias")][1] = 7.0
    returned = back(params=trained, state={}, remainder=moved.remainder).params
    one, other = params[("linear", "b")], params[("linear_1", "b")]
    assert returned[("linear", "b")].tolist() == [one[0], 7.0, one[2]]
    assert returned[("linear_1", "b")].tolist() == [other[0], 0.0, other[2]]


def test_a_conversion_can_be_traced():
    there, back, haiku = pair("lstm", "haiku", "linen")
    params = random_arrays(haiku.layer.params, "float32")

    @jax.jit
    def both(params):
        moved = there(params=params, state={})
        return back(params=moved.params, state={}, remainder=moved.remainder).params

    assert_bits(both(params), params)


def test_the_remainder_outlives_the_arrays_that_it_belongs_to():
    there, back, haiku = pair("batch_norm", "haiku", "nnx")
    params = jax.tree.map(jnp.asarray, random_arrays(haiku.layer.params, "float32"))
    state = {path: jnp.full(kind.shape, 3, kind.dtype) for path, kind in haiku.layer.state.items()}
    moved = there(params=params, state=state)
    copies = jax.tree.map(np.array, (moved.params, moved.state, state))
    for array in jax.tree.leaves((moved.state, state)):
        array.delete()  # as a training step does that donates them
    assert_bits(back(params=copies[0], state=copies[1], remainder=moved.remainder).state, copies[2])


def trained(layer, params, state, steps=5):
    """Trains batch norm's statistics: other inputs at each step."""
    run, outs = compiled(layer.run), []
    for step in range(steps):
        x = np.random.default_rng(step).normal(size=(2, 5, 4, 6)).astype(np.float32) * (1 + step) + step
        out, state = run(params, state, x)
        outs.append(out)
    return outs, state


@functools.cache
def five_steps(first, state_of, target):
    """Trains in `target` from what `first` had."""
    source, layer = built("batch_norm, training", first, "float32"), built("batch_norm, training", target, "float32")
    params = random_arrays(source.layer.params, "float32")
    moved = convert(source.layer, source.layout, params, dict(state_of), layer.layer, layer.layout)
    outs, state = trained(layer, moved.params, moved.state)
    evaluate = built("batch_norm", target, "float32")
    out, _ = compiled(evaluate.run)(moved.params, state, arguments("batch_norm", "float32")[0])
    assert layer.layout.state is not None
    return outs, layer.layout.state.to_canonical(layer.layer, state), out


STATISTICS = (("mean",), np.arange(6.0, dtype=np.float32)), (("var",), np.arange(1.0, 7.0, dtype=np.float32))


class Frozen(tuple):
    """Pairs that a cache can hold: equal if they are the same."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__


FLAX = Frozen(STATISTICS)


@pytest.mark.parametrize("target", ["nnx", "haiku", "equinox"])
def test_batch_norm_trains_on_as_flax_does(target):
    assert_same_training(five_steps("linen", FLAX, "linen"), five_steps("linen", FLAX, target))


def live(count):
    """Makes Haiku's statistics after a few updates, or Equinox's; the average is the sum without its bias."""
    scale = np.float32(1 - 0.9**count)
    haiku: dict[Any, Any] = {}
    equinox: dict[Any, Any] = {("batch_counter",): np.int32(count)}
    for place, (path, array) in enumerate(STATISTICS):
        ema = ("~", f"{path[0]}_ema")
        haiku[(*ema, "counter")] = np.int32(count)
        haiku[(*ema, "hidden")] = (array * scale).reshape(1, 1, 1, 6)
        haiku[(*ema, "average")] = array.reshape(1, 1, 1, 6)
        equinox[("batch_state_index", str(place))] = array * scale
    return {"haiku": Frozen(haiku.items()), "equinox": Frozen(equinox.items())}


LIVE = live(3)


@pytest.mark.parametrize(("source", "target"), [("haiku", "equinox"), ("equinox", "haiku")])
def test_batch_norm_s_live_counters_go_on_counting(source, target):
    assert_same_training(five_steps(source, LIVE[source], source), five_steps(source, LIVE[source], target))


@pytest.mark.parametrize("source", ["haiku", "equinox"])
@pytest.mark.parametrize("target", ["linen", "nnx"])
def test_batch_norm_s_averages_are_exact_where_there_are_no_counters(source, target):
    (layer, its), (other, theirs) = (
        (case.layer, case.layout)
        for case in (built("batch_norm", framework, "float32") for framework in (source, target))
    )
    params = random_arrays(layer.params, "float32")
    moved = convert(layer, its, params, dict(LIVE[source]), other, theirs)
    for path, array in STATISTICS:
        np.testing.assert_allclose(moved.state[path], array, rtol=1e-6)


def assert_same_training(one, other):
    (outs, statistics, out), (other_outs, other_statistics, other_out) = one, other
    for mine, theirs in zip(outs, other_outs, strict=True):
        assert_near(mine, theirs, 1e-5, "output while training")
    assert_near(out, other_out, 1e-5, "output after training")
    for name in ("mean", "var"):
        assert_near(statistics[name], other_statistics[name], 1e-5, name)


def test_counters_that_start_anew_are_noticed():
    mine = dict(LIVE["haiku"]) | {("~", f"{name}_ema", "counter"): np.int32(10**6) for name in ("mean", "var")}
    with pytest.raises(AssertionError, match=r"output after training is .* off"):
        assert_same_training(
            five_steps("haiku", LIVE["haiku"], "haiku"), five_steps("haiku", Frozen(mine.items()), "equinox")
        )


def test_an_average_without_updates_goes_to_equinox_as_a_long_one():
    there, _, haiku = pair("batch_norm", "haiku", "equinox")
    state = dict(LIVE["haiku"])
    for path in state:
        state[path] = state[path] if path[-1] == "average" else np.zeros_like(state[path])
    moved = there(params=random_arrays(haiku.layer.params, "float32"), state=state)
    np.testing.assert_array_equal(moved.state[("batch_state_index", "0")], STATISTICS[0][1])
    assert int(moved.state[("batch_counter",)]) == 10**6


def test_statistics_that_were_trained_on_ignore_the_remainder():
    there, back, haiku = pair("batch_norm", "haiku", "linen")
    params, state = random_arrays(haiku.layer.params, "float32"), dict(LIVE["haiku"])
    moved = there(params=params, state=state)
    on = {path: array + np.float32(1) for path, array in moved.state.items()}
    returned = back(params=moved.params, state=on, remainder=moved.remainder).state
    np.testing.assert_array_equal(returned[("~", "mean_ema", "average")].reshape(-1), STATISTICS[0][1] + 1)
    np.testing.assert_array_equal(returned[("~", "mean_ema", "hidden")].reshape(-1), STATISTICS[0][1] + 1)
    assert int(returned[("~", "mean_ema", "counter")]) == 10**6


def layer_of(framework, make, *args, call=None):
    call = call or (equinox_call if framework == "equinox" else called)
    layer = BUILDERS[framework](make() if framework == "linen" else make, call, args)
    return layer.layer, layer.layout


def equinox_call(module, *args):
    return module(*args)


X, H = jnp.ones((2, 5)), jnp.ones((2, 3))
SEQUENCE = jnp.ones((2, 4, 8))


def haiku_gru():
    return layer_of("haiku", lambda: hk.GRU(3), X, H)


def linen_gru():
    return layer_of("linen", lambda: nn.GRUCell(3), H, X)


def nnx_gru():
    return layer_of("nnx", lambda: nnx.GRUCell(5, 3, rngs=nnx.Rngs(0)))


def equinox_gru():
    return layer_of("equinox", lambda: eqx.nn.GRUCell(5, 3, key=jax.random.key(0)))


def wide_values():
    make = lambda: hk.MultiHeadAttention(2, 4, w_init=hk.initializers.RandomNormal(), value_size=5)
    return layer_of("haiku", make, SEQUENCE, SEQUENCE, SEQUENCE)


def linen_attention():
    return layer_of("linen", lambda: nn.MultiHeadAttention(2), SEQUENCE)


def linen_batch_norm():
    return layer_of("linen", lambda: nn.BatchNorm(True), X)


def equinox_ema():
    return layer_of("equinox", lambda: eqx.nn.BatchNorm(5, "batch", mode="ema"))


def linen_dense(*, features=3, **options):
    return layer_of("linen", lambda: nn.Dense(features, **options), X)


def equinox_linear(**options):
    return layer_of("equinox", lambda: eqx.nn.Linear(5, 3, key=jax.random.key(0), **options))


def equinox_rms():
    return layer_of("equinox", lambda: eqx.nn.RMSNorm(5))


def linen_rms():
    return layer_of("linen", lambda: nn.RMSNorm(), X)


REFUSED = {
    "Haiku's GRU to Linen": (haiku_gru, linen_gru, r"Haiku's GRU resets the state before the product"),
    "Equinox's GRU to Haiku": (equinox_gru, haiku_gru, r"no parameters make the two equal"),
    "a bias that NNX's GRU lacks": (linen_gru, nnx_gru, r"has no 'hidden_bias', which is as if it was 0"),
    "values wider than keys": (wide_values, linen_attention, r"`value_size` is not its `key_size`"),
    "batch norm by running averages": (linen_batch_norm, equinox_ema, r"mode='batch'"),
    "batch norm from running averages": (equinox_ema, linen_batch_norm, r"mode='batch'"),
    "another kind": (linen_dense, linen_rms, r"of kind 'linear' and the other of kind 'rms_norm'"),
    "a bias too many": (linen_dense, lambda: equinox_linear(use_bias=False), r"has 'bias', for which .* has no array"),
    "a bias too few": (lambda: linen_dense(use_bias=False), equinox_linear, r"equinox Linear .* has 'bias', for which"),
    "another size": (lambda: linen_dense(features=4), equinox_linear, r"'kernel' .* must have shape \(5, 3\), but has"),
    "an RMS norm's bias": (equinox_rms, linen_rms, r"the source's 'bias' is not 0 throughout"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_be_converted_is_refused_with_the_reason(name):
    make_source, make_target, reason = REFUSED[name]
    (source, its), (target, theirs) = make_source(), make_target()
    params, state = random_arrays(source.params, "float32"), random_arrays(source.state, "float32")
    with pytest.raises(crossvjp.ArgumentError, match=reason):
        convert(source, its, params, state, target, theirs)


def test_values_that_decide_can_not_be_traced():
    (source, its), (target, theirs) = equinox_rms(), linen_rms()
    with pytest.raises(
        crossvjp.ArgumentError, match=r"depends on its values, which are traced .* outside of `jax.jit`"
    ):
        jax.jit(lambda params: convert(source, its, params, {}, target, theirs).params)(
            random_arrays(source.params, "f4")
        )


def test_what_counts_as_absent_is_dropped_and_made():
    (source, its), (target, theirs) = equinox_rms(), linen_rms()
    params = {("weight",): np.arange(5.0), ("bias",): np.zeros(5)}
    moved = convert(source, its, params, {}, target, theirs).params
    assert_bits(moved, {("scale",): np.arange(5.0)})
    assert_bits(convert(target, theirs, moved, {}, source, its).params, params)
    assert_bits(convert_cotangents(target, theirs, moved, source, its), params)


def test_haiku_s_wide_values_do_convert_into_equinox():
    source, its = wide_values()
    make = lambda: eqx.nn.MultiheadAttention(2, 8, 8, 8, 8, 4, 5, True, True, True, True, key=jax.random.key(0))
    target, theirs = layer_of("equinox", make)
    moved = convert(source, its, random_arrays(source.params, "float32"), {}, target, theirs)
    assert moved.params[("value_proj", "weight")].shape == (10, 8)


def test_a_layout_that_leaves_a_parameter_out_is_refused():
    source, its = linen_dense()
    short = dataclasses.replace(its, moves=lambda layer: [Move([("kernel",)], ["kernel"])])
    with pytest.raises(crossvjp.ArgumentError, match=r"leaves out its parameter \['bias'\]; it has"):
        convert(source, short, random_arrays(source.params, "float32"), {}, source, its)
    long = dataclasses.replace(its, moves=lambda layer: [*its.moves(layer), Move([("gain",)], ["gain"])])
    with pytest.raises(crossvjp.ArgumentError, match=r"names a parameter that it does not have, \['gain'\]"):
        convert(source, long, random_arrays(source.params, "float32"), {}, source, its)


def test_names_of_axes_go_with_their_axes():
    linen, haiku, equinox = (built("attention", framework, "float32") for framework in ("linen", "haiku", "equinox"))
    names = {("query", "kernel"): ("embed", "heads", "size"), ("out", "kernel"): ("heads", None, "embed")}
    to_haiku = convert_names(linen.layer, linen.layout, names, haiku.layer, haiku.layout)
    assert to_haiku[("query", "w")] == ("embed", ("heads", "size"))
    assert to_haiku[("linear", "w")] == ("heads", "embed")
    assert to_haiku[("key", "w")] is None
    to_equinox = convert_names(haiku.layer, haiku.layout, to_haiku, equinox.layer, equinox.layout)
    assert to_equinox[("query_proj", "weight")] == (("heads", "size"), "embed")
    back = convert_names(equinox.layer, equinox.layout, to_equinox, linen.layer, linen.layout)
    assert back[("query", "kernel")] == ("embed", "heads", "size")


def test_second_moments_lose_signs_and_constants():
    class Source:
        """Keeps its array with the other sign, and 1 too small."""

    class Target:
        """Keeps it as it is."""

    type_ = {("w",): jax.ShapeDtypeStruct((2,), jnp.float32)}
    pieces = [Negate(0, (True,)), AddConstant(0, (1.0,))]
    ours = layout(Source, "kind", lambda layer: [Move([("w",)], ["w"], pieces)])
    theirs = layout(Target, "kind", {"w": "w"})
    source, target = Layer((), "here", Source(), type_, {}), Layer((), "there", Target(), type_, {})
    array = {("w",): np.array([2.0, 3.0], np.float32)}
    assert convert(source, ours, array, {}, target, theirs).params[("w",)].tolist() == [-1.0, -2.0]
    assert convert_cotangents(source, ours, array, target, theirs)[("w",)].tolist() == [-2.0, -3.0]
    assert convert_second_moments(source, ours, array, target, theirs)[("w",)].tolist() == [2.0, 3.0]


def test_adam_goes_on_in_the_other_framework_where_it_stood():
    source, target = (built("lstm", framework, "float32") for framework in ("haiku", "equinox"))
    args, adam = arguments("lstm", "float32"), optax.adam(0.1)
    pairs = source.layer, source.layout, target.layer, target.layout

    def step(layer, params, opt):
        bar = jax.grad(lambda params: jnp.sum(jnp.sin(layer.run(params, {}, *args)[0])))(params)
        updates, opt = adam.update(bar, opt)
        return optax.apply_updates(params, updates), opt

    def moved(convert_part, arrays):
        return convert_part(pairs[0], pairs[1], arrays, pairs[2], pairs[3])

    def to_target(params):
        return convert(pairs[0], pairs[1], params, {}, pairs[2], pairs[3]).params

    params = jax.tree.map(jnp.asarray, random_arrays(source.layer.params, "float32"))
    here, there = (compiled(functools.partial(step, layer)) for layer in (source, target))
    params, (moments, rest) = here(params, adam.init(params))
    mu, nu = moved(convert_cotangents, moments.mu), moved(convert_second_moments, moments.nu)
    after, _ = here(params, (moments, rest))
    converted, _ = there(to_target(params), (moments._replace(mu=mu, nu=nu), rest))
    for path, array in to_target(after).items():
        assert_near(converted[path], array, 1e-5, f"parameter {path}")


def settings_between(source, target):
    return compare_settings(*source, *target)


def test_defaults_that_differ_are_told():
    linen = layer_of("linen", lambda: nn.LayerNorm(), X)
    haiku = layer_of("haiku", lambda: hk.LayerNorm(-1, True, True), X)
    differences = {difference.name: difference for difference in settings_between(haiku, linen)}
    assert differences.keys() == {"epsilon", "use_fast_variance"}
    assert differences["epsilon"].text == (
        "epsilon is 1e-05 in haiku LayerNorm 'layer' and 1e-06 in linen LayerNorm 'layer', which changes the outputs."
    )
    assert differences["epsilon"].changes_function
    assert differences["use_fast_variance"].effect == "rounding"
    assert not differences["use_fast_variance"].changes_function


def test_a_dtype_to_compute_in_is_told():
    plain, named, same = (
        layer_of("linen", lambda dtype=dtype: nn.Dense(3, dtype=dtype), X) for dtype in (None, "bfloat16", "float32")
    )
    (difference,) = settings_between(named, equinox_linear())
    assert (difference.name, difference.source, difference.target) == ("dtype", "bfloat16", "inferred")
    assert not settings_between(plain, same)


CONV = jnp.ones((2, 7, 3))


@pytest.mark.parametrize(
    ("linen", "equinox", "differ"),
    [
        ({"padding": "SAME"}, {"padding": 1}, set()),
        ({"padding": "SAME"}, {}, {"padding"}),
        ({"padding": "VALID"}, {}, set()),
        ({"padding": "SAME", "strides": 2}, {"padding": 1, "stride": 2}, {"padding"}),
        ({"padding": "SAME", "strides": 2}, {"padding": "SAME", "stride": 2}, set()),
        ({"padding": "CIRCULAR"}, {"padding": "SAME", "padding_mode": "CIRCULAR"}, {"padding"}),
        ({"padding": 1, "kernel_dilation": 2}, {"padding": 1}, {"dilation"}),
        ({"padding": 1, "feature_group_count": 3}, {"padding": 1}, {"groups"}),
    ],
)
def test_paddings_are_compared_by_what_they_pad(linen, equinox, differ):
    ours = layer_of("linen", lambda: nn.Conv(3, (3,), **linen), CONV)
    theirs = layer_of("equinox", lambda: eqx.nn.Conv1d(3, 3, 3, key=jax.random.key(0), **equinox))
    assert {difference.name for difference in settings_between(ours, theirs)} == differ


def test_the_layers_of_the_cases_differ_in_rounding_at_most():
    for name, case in CASES.items():
        first, *others = (built(name, framework, "float32") for framework in case.makes)
        for other in others:
            differences = compare_settings(first.layer, first.layout, other.layer, other.layout)
            effects = {difference.effect for difference in differences}
            assert effects <= {"rounding"}, (name, differences)


class LinenScale(nn.Module):
    """A layer of somebody's own: a gain and an offset, the gain near 1."""

    floor: float = 0.5

    @nn.compact
    def __call__(self, x):
        gain = self.param("gain", nn.initializers.zeros, x.shape[-1:])
        return jnp.maximum(x * (1 + gain) + self.param("shift", nn.initializers.zeros, ()), self.floor)


class EquinoxScale(eqx.Module):
    """The same layer for Equinox, which keeps the gain itself."""

    gain: Any
    shift: Any
    minimum: Any = eqx.field(static=True, default=0.5)

    def __call__(self, x):
        return jnp.maximum(x * self.gain + self.shift, self.minimum)


def test_a_layer_of_ones_own_is_registered_in_a_few_lines():
    register_layer(
        LinenScale,
        "scale with floor",
        lambda layer: [Move([("gain",)], ["gain"], [AddConstant(0, (1.0,))]), Move([("shift",)], ["shift"])],
        settings={"floor": "floor"},
    )
    register_layer(EquinoxScale, "scale with floor", {"gain": "gain", "shift": "shift"}, settings={"floor": "minimum"})
    linen = BUILDERS["linen"](LinenScale(), called, (X,))
    equinox = BUILDERS["equinox"](lambda: EquinoxScale(jnp.ones(5), jnp.zeros(())), jax.vmap, (X,))
    equinox = dataclasses.replace(equinox, run=lambda params, state, x: (EquinoxScale(**named(params))(x), {}))
    params = random_arrays(linen.layer.params, "float32")
    moved = convert(linen.layer, linen.layout, params, {}, equinox.layer, equinox.layout)
    check_converts(evaluated(linen, params, {}, (X,)), evaluated(equinox, moved.params, {}, (X,)), None, 1e-6)
    assert not compare_settings(linen.layer, linen.layout, equinox.layer, equinox.layout)
    back = convert(equinox.layer, equinox.layout, moved.params, {}, linen.layer, linen.layout, moved.remainder)
    assert_bits(back.params, params)


def named(arrays):
    return {path[-1]: jnp.asarray(array) for path, array in arrays.items()}


def test_a_layout_of_ones_own_is_asked_before_ours_and_only_for_its_class():
    class Special(nn.Dense):
        """Has another layout than its base."""

    assert layout_of(Special(3)) is layout_of(nn.Dense(3))
    own = register_layer(
        Special, "special", {"kernel": "kernel", "bias": "bias"}, when=lambda module: module.features == 3
    )
    assert layout_of(Special(3)) is own
    assert layout_of(Special(4)) is layout_of(nn.Dense(4))
    assert layout_of(object()) is None
