"""What `migrate` refuses: the error names the layers of both sides, and nothing was changed."""

from __future__ import annotations

from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import crossvjp as cv
from crossvjp.migration import MigrationError
from crossvjp.testing import assert_same_bits

X = jax.random.normal(jax.random.key(1), (5, 4))


class Averages(NamedTuple):
    """The state of somebody's own optimiser."""

    slow: Any


def bound(*layers: Any, x: Any = X) -> nn.Module:
    """Makes a bound Linen module of a chain of layers."""
    net = nn.Sequential(layers)
    return net.bind(jax.jit(net.init)(jax.random.key(0), x))


def net(*layers: Any) -> Any:
    """Makes a Haiku function that is to be initialised."""
    return hk.transform(lambda x: hk.Sequential([make() for make in layers])(x))


def test_shapes_that_dont_match_are_named_on_both_sides():
    with pytest.raises(
        MigrationError,
        match=r"'layers_0' of the source and 'linear' of the target don't have the same "
        r"arrays: `kernel` \[4, 3\] and \[4, 2\], `bias` \[3\] and \[2\]",
    ):
        cv.migrate(bound(nn.Dense(3)), net(lambda: hk.Linear(2)), X)


def test_a_bias_on_one_side_alone_is_named():
    with pytest.raises(MigrationError, match=r"'linear' of the target don't have the same arrays: `bias` missing and"):
        cv.migrate(bound(nn.Dense(3, use_bias=False)), net(lambda: hk.Linear(3)), X)


def test_a_layer_left_over_in_the_source_is_named_and_stands_in_the_table():
    with pytest.raises(MigrationError) as caught:
        cv.migrate(bound(nn.Dense(3), nn.LayerNorm()), net(lambda: hk.Linear(3)), X)
    text = str(caught.value)
    assert "The source's 'layers_1' (LayerNorm scale[3] bias[3]) has no counterpart in the target." in text
    assert "layers_0  Dense kernel[4,3] bias[3]   linear  Linear kernel[4,3] bias[3]" in text
    assert "mapping={'source/path': None}" in text


def test_a_layer_left_over_in_the_target_is_named():
    with pytest.raises(
        MigrationError, match=r"The target's 'linear_1' \(Linear kernel\[3,3\] bias\[3\]\) gets nothing"
    ):
        cv.migrate(bound(nn.Dense(3)), net(lambda: hk.Linear(3), lambda: hk.Linear(3)), X)


def test_a_layer_that_the_sample_does_not_reach_is_told_to_be_so():
    class Net(nnx.Module):
        def __init__(self):
            self.used = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
            self.unused = nnx.Linear(3, 7, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.used(x)

    with pytest.raises(
        MigrationError, match=r"'unused/bias' \(own parameter \[7\] \(not called\)\) has no counterpart"
    ):
        cv.migrate(Net(), net(lambda: hk.Linear(3)), X)


def test_layers_of_different_kinds_are_named():
    with pytest.raises(MigrationError, match=r"'layers_0' of the source and 'layer_norm' of the target .*kind"):
        cv.migrate(bound(nn.Dense(4)), net(lambda: hk.LayerNorm(-1, True, True)), X)


def test_the_gru_of_haiku_is_refused_with_the_reason():
    cell = nn.GRUCell(3)
    carry = jnp.zeros((5, 3))
    trained = cell.bind(jax.jit(cell.init)(jax.random.key(0), carry, X))
    target = hk.transform(lambda carry, x: hk.GRU(3)(x, carry))
    with pytest.raises(MigrationError, match=r"'gru' of the target can't be converted .* Haiku's GRU resets the state"):
        cv.migrate(trained, target, carry, X)


def test_a_missing_collection_is_named():
    model = nn.BatchNorm(use_running_average=True)
    variables = jax.jit(model.init)(jax.random.key(0), X)
    target = nnx.BatchNorm(4, use_running_average=True, rngs=nnx.Rngs(0))
    trained = model.bind({"params": variables["params"]})
    with pytest.raises(
        MigrationError, match=r"target's BatchNorm .* has state \(mean, var\), and the source's BatchNorm"
    ):
        cv.migrate(trained, target, X)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Dense(3), r"The Linen module Dense has no values. Bind it to its variables"),
        (net(lambda: hk.Linear(3)), r"A Transformed has no values. Bind it to them"),
        (
            eqx.nn.BatchNorm(4, "batch", mode="batch"),
            r"The Equinox module BatchNorm has state at 'batch_counter'. Pass both, \(model, state\)",
        ),
        (
            {"w": X},
            "The source must be a model of Flax Linen, Flax NNX, Haiku or Equinox, or a Migration, but is a dict",
        ),
    ],
)
def test_a_source_without_values_is_refused(model, message):
    with pytest.raises(ValueError, match=message):
        cv.migrate(model, nn.Dense(3), X)


def test_a_target_that_is_no_model_is_refused():
    with pytest.raises(ValueError, match=r"The target must be a model of Flax Linen, .*, but is a function"):
        cv.migrate(bound(nn.Dense(3)), lambda x: x, X)


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"layer_0": "linear"}, "`mapping` names 'layer_0', but the source has no such layer. It has 'layers_0'"),
        ({"layers_0": "linaer"}, "`mapping` names 'linaer', but the target has no such layer. It has 'linear'"),
        ({"layers_0": "linear", "layers_1": "linear"}, "`mapping` sends both 'layers_0' and 'layers_1' to 'linear'"),
        ({"layers_1": "linear"}, r"don't have the same arrays: `kernel` \[3, 2\] and \[4, 3\].* `mapping` pairs them"),
    ],
)
def test_a_mapping_that_names_what_there_is_not_is_refused(mapping, message):
    source = bound(nn.Dense(3), nn.Dense(2))
    with pytest.raises(MigrationError, match=message):
        cv.migrate(source, net(lambda: hk.Linear(3), lambda: hk.Linear(2)), X, mapping=mapping, prove=False)


def test_settings_that_differ_are_told_as_the_cause_of_a_mismatch():
    small = 1e-3 * X
    with pytest.raises(MigrationError, match=r"epsilon is 1e-06 in .*'layers_0' and 1e-05 in ") as caught:
        cv.migrate(bound(nn.LayerNorm()), net(lambda: hk.LayerNorm(-1, True, True)), small, steps=0)
    assert "Settings that differ, the likely cause:" in str(caught.value)
    report: Any = caught.value.report
    assert not report.proved
    assert ("epsilon", 1e-6, 1e-5) in [(one.name, one.source, one.target) for one in report.settings]
    made = cv.migrate(bound(nn.LayerNorm()), net(lambda: hk.LayerNorm(-1, True, True)), small, steps=0, check=False)
    assert not made.report.proved


def test_an_activation_that_the_rewrite_forgot_is_found_by_the_proof():
    forgot = net(lambda: hk.Linear(3), lambda: hk.Linear(2))
    with pytest.raises(MigrationError, match=r"outputs +\d\.\de[-+]\d+ +\d\.\de[-+]\d+ +FAILS \(1e-04\) +output 0\["):
        cv.migrate(bound(nn.Dense(3), nn.relu, nn.Dense(2)), forgot, X, steps=0)


def test_outputs_of_other_shapes_are_told_with_what_to_do():
    linear = eqx.nn.Linear(4, 3, key=jax.random.key(0))
    swapped = lambda mdl, x: jax.vmap(mdl, out_axes=1)(x)
    with pytest.raises(MigrationError, match=r"outputs of shapes \[5, 3\], the target \[3, 5\]. `source_call` and"):
        cv.migrate(bound(nn.Dense(3)), linear, X, target_call=swapped, steps=0)


def test_a_dtype_that_does_not_hold_the_sources_values_is_refused():
    target = nn.Dense(3, param_dtype=jnp.bfloat16)
    with pytest.raises(MigrationError, match="'layers_0/bias' is bfloat16, which does not hold the source's float32"):
        cv.migrate(bound(nn.Dense(3)), nn.Sequential([target]), X, prove=False)


def test_an_error_while_a_model_runs_says_which_of_the_two_it_was():
    with pytest.raises(TypeError) as caught:
        cv.migrate(bound(nn.Dense(3)), net(lambda: hk.Linear(3)), X, source_call=lambda mdl: mdl)
    assert "This came up while the source ran on types, as `source_call` calls it." in caught.value.__notes__
    with pytest.raises(TypeError) as caught:
        cv.migrate(bound(nn.Dense(3)), net(lambda: hk.Linear(3)), X, target_call=lambda mdl: mdl)
    note = "This came up while the target was initialised on types, as `target_train` calls it."
    assert note in caught.value.__notes__


def test_an_equinox_call_that_forgets_the_state_is_told():
    pair = eqx.nn.make_with_state(eqx.nn.BatchNorm)(4, "batch", mode="batch")
    model = nn.BatchNorm(use_running_average=True)
    trained = model.bind(jax.jit(model.init)(jax.random.key(0), X))
    call = lambda mdl, state, x: jax.vmap(mdl, in_axes=(0, None), out_axes=(0, None), axis_name="batch")(x, state)[0]
    with pytest.raises(MigrationError, match=r"Equinox model with state must return \(output, state\)"):
        cv.migrate(trained, pair, X, target_call=call)


def test_optimiser_states_of_which_nothing_is_known_are_refused_until_somebody_says_it():
    source = bound(nn.Dense(3))
    made = cv.migrate(source, nn.Sequential([nn.Dense(3)]), X, prove=False)
    params = source.variables["params"]
    state = optax.adafactor(1e-3).init(params)
    with pytest.raises(MigrationError, match=r"The optimiser's state has .* at .*FactoredState.*nothing says how"):
        made.optimizer_state(state)

    with pytest.raises(MigrationError, match=r"shaped like the parameters at \['Averages.slow'\]"):
        made.optimizer_state(Averages(params))
    carried = made.optimizer_state(Averages(params), {"Averages": {"slow": "parameters"}})
    assert_same_bits(carried.slow, params)


def test_masked_optimisers_move_with_their_masks_unless_an_array_is_half_masked():
    optimiser = optax.multi_transform(
        {"a": optax.adam(0.1), "b": optax.sgd(0.1)}, lambda _: {"kernel": "a", "bias": "b"}
    )
    layer = nn.Dense(3)
    source = layer.bind(jax.jit(layer.init)(jax.random.key(0), X))
    made = cv.migrate(source, nnx.Linear(4, 3, rngs=nnx.Rngs(0)), X, prove=False)
    carried = made.optimizer_state(optimiser.init(source.variables["params"]))
    mu = carried.inner_states["a"].inner_state[0].mu
    assert mu["kernel"].get_value().shape == (4, 3)
    assert jax.tree.leaves(mu["bias"]) == []
    cell = nn.LSTMCell(3)
    carry = (jnp.zeros((5, 3)), jnp.zeros((5, 3)))
    source = cell.bind(jax.jit(cell.init)(jax.random.key(0), carry, X))
    made = cv.migrate(source, nnx.OptimizedLSTMCell(4, 3, rngs=nnx.Rngs(0)), carry, X, prove=False)
    mask: Any = lambda params: {name: dict.fromkeys(own, name != "ii") for name, own in params.items()}
    half = optax.masked(optax.adam(0.1), mask)
    with pytest.raises(MigrationError, match="has only some of the parameters that become 'dense_i/kernel'"):
        made.optimizer_state(half.init(source.variables["params"]))


def test_a_tree_that_is_no_gradient_of_the_source_is_refused():
    made = cv.migrate(bound(nn.Dense(3)), net(lambda: hk.Linear(3)), X, prove=False)
    with pytest.raises(
        MigrationError, match=r"must have the structure of the parameters of the Linen model.*only one of"
    ):
        made.cotangents({"layers_0": {"kernel": X}})
