"""Rules on published models that nobody edits, in every framework. Their weights are random: nothing is downloaded.

They run operation by operation, where equal operations give equal bits whatever the compiler does with the rest.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import esm2quinox
import flax.linen as nn
import flax.serialization
import haiku as hk
import jax
import jax.numpy as jnp
import jax_resnet
import numpy as np
import orbax.checkpoint as ocp
import pytest
import vitax
from flax import nnx

import crossvjp
from crossvjp.extend import path_of
from crossvjp.rules import ScaleGradient
from crossvjp.testing import assert_close, assert_same_bits, numbers, one_by_one

IMAGES = jax.random.normal(jax.random.key(1), (2, 64, 64, 3))


@crossvjp.rule
def identity(call, y_bar):
    """The module's own backward pass."""
    return call.pullback(y_bar)


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, and how it is used.

    Args:
        model: as its authors wrote it.
        variables: `variables(model) -> (params, rest)`, as that model, which may have rules, makes them.
        run: `run(model, params, rest) -> (y, rest)`, in training mode.
        layer: a path glob that chooses one layer.
        of_layer: the parameters that this layer has.
        rtol: how far gradients under the identity rule on every module may be from the unattached model's.
    """

    model: Any
    variables: Callable[[Any], tuple[Any, Any]]
    run: Callable[[Any, Any, Any], tuple[Any, Any]]
    layer: str
    of_layer: set[str]
    rtol: float = 0

    @functools.cached_property
    def start(self) -> tuple[Any, Any]:
        """The plain model's variables."""
        return self.variables(self.model)

    @functools.cached_property
    def own_call(self) -> tuple[Any, Any]:
        """The plain model's `(y, rest)`."""
        return self.called(self.model)

    @functools.cached_property
    def own_gradients(self) -> Any:
        """The plain model's."""
        return self.gradients(self.model)

    def called(self, model: Any, start: tuple[Any, Any] | None = None) -> tuple[Any, Any]:
        """Calls a model once."""
        return one_by_one(functools.partial(self.run, model))(*(start or self.start))

    def gradients(self, model: Any) -> tuple[Any, Any]:
        """Gives a model's gradients, and `(y, rest)` of the same run."""
        return one_by_one(functools.partial(self.with_gradients, model))(*self.start)

    def with_gradients(self, model: Any, params: Any, rest: Any) -> tuple[Any, Any]:
        """Gives the same in a trace."""

        def loss(params: Any) -> Any:
            y, after = self.run(model, params, rest)
            return jnp.mean(jnp.sin(y)), (y, after)

        return jax.grad(loss, has_aux=True)(params)


def drawn(types: Any) -> Any:
    """Draws variables. First values of their own have zeros, under which gradients vanish and any rule looks right."""
    draw = np.random.default_rng(0)

    def one(of: Any) -> Any:
        if not isinstance(of, jax.ShapeDtypeStruct) or not jnp.issubdtype(of.dtype, jnp.floating):
            return jnp.zeros(of.shape, of.dtype) if isinstance(of, jax.ShapeDtypeStruct) else of
        fan_in = math.prod(of.shape[:-1])
        values = draw.uniform(0.5, 1.5, of.shape) if fan_in == 1 else draw.normal(size=of.shape) / fan_in**0.5
        return jnp.asarray(values, of.dtype)

    return jax.tree.map(one, types)


def linen_resnet() -> Case:
    norm = lambda use_running_average, scale_init: nn.BatchNorm(use_running_average, momentum=0.9)
    model = jax_resnet.ResNet18(n_classes=1000, norm_cls=norm)

    def variables(model):
        rest = drawn(jax.eval_shape(model.init, jax.random.key(0), IMAGES))
        return rest.pop("params"), rest

    def run(model, params, rest):
        return model.apply({"params": params, **rest}, IMAGES, mutable=["batch_stats"])

    layer = "layers_4/ConvBlock_1/Conv_0"
    return Case(model, variables, run, "*_4/ConvBlock_1/Conv_0", {f"{layer}/kernel"})


def nnx_vit() -> Case:
    model = vitax.VisionTransformer(  # ViT-Ti/16
        img_size=64, patch_size=16, num_layers=12, num_heads=3, mlp_dim=768, hidden_size=192, rngs=nnx.Rngs(0)
    )

    def run(model, params, rest):
        model = nnx.merge(nnx.split(model)[0], params, rest, copy=True)
        y = model(IMAGES)
        return y, nnx.split(model, nnx.Param, ...)[2]

    layer = "encoder/layers/3/mlp/layers/0"
    of_layer = {f"{layer}/kernel/value", f"{layer}/bias/value"}

    # The stream between the blocks is used inside of a block's norm and beside it. Without rules JAX adds up all of its
    # cotangents in one row, under a rule on the norm those of the norm first.
    def variables(model):
        _, params, rest = nnx.split(model, nnx.Param, ...)
        return params, rest

    return Case(model, variables, run, "*/3/mlp/layers/0", of_layer, rtol=1e-6)


def equinox_esm2() -> Case:
    make = lambda: esm2quinox.ESM2(6, embed_size=320, num_heads=20, token_dropout=True, key=jax.random.key(0))
    # As JAX's: in a batch of NumPy's int64, its custom_vjp fails under jit.
    tokens = jnp.asarray(esm2quinox.tokenise(["SP#DERMAN", "FOO"]))

    def run(model, params, rest):
        arrays, static = eqx.partition(model, eqx.is_inexact_array)
        arrays = jax.tree.unflatten(jax.tree.structure(arrays), jax.tree.leaves(params))  # its classes may be attached
        return jax.vmap(eqx.combine(arrays, static))(tokens).logits, rest

    of_layer = {"layers/linear1/weight", "layers/linear1/bias"}
    variables = lambda model: (eqx.filter(model, eqx.is_inexact_array), ())
    # The stream between the layers, as above. And these are under `vmap`: a rule gives the cotangent of each lane's
    # weights, which are added up after, where the layer's own backward pass is one product.
    return Case(drawn(eqx.filter_eval_shape(make)), variables, run, "layers/lin*1", of_layer, rtol=1e-6)


def haiku_net(net: Callable[..., Any], layer: str) -> Case:
    model = hk.transform_with_state(lambda x: net(num_classes=1000)(x, is_training=True))
    variables = lambda model: drawn(jax.eval_shape(model.init, jax.random.key(0), IMAGES))
    run = lambda model, params, rest: model.apply(params, rest, None, IMAGES)
    return Case(model, variables, run, f"*{layer}", {f"{layer}/w"})


CASES = {
    "linen resnet": linen_resnet,
    "nnx vit": nnx_vit,
    "equinox esm2": equinox_esm2,
    "haiku resnet": lambda: haiku_net(hk.nets.ResNet18, "res_net18/~/block_group_1/~/block_0/~/conv_1"),
    "haiku mobilenet": lambda: haiku_net(hk.nets.MobileNetV1, "mobile_net_v1/mobile_net_v1_block_3/pointwise_conv"),
}


@functools.cache
def case_of(name: str) -> Case:
    """Makes a model once."""
    return CASES[name]()


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    """Each model in turn."""
    return case_of(request.param)


def named(tree: Any) -> dict[str, np.ndarray]:
    """Lists arrays by their paths."""
    paths = ["/".join(path_of(path)) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    return dict(zip(paths, numbers(tree), strict=True))


def test_with_the_identity_rule_on_every_module_outputs_state_and_masks_stay(case):
    attached = crossvjp.attach(case.model, identity, where=True)
    y, rest = case.own_call
    attached_y, attached_rest = case.called(attached)
    assert_same_bits((attached_y, attached_rest), (y, rest))
    again = case.called(case.model, (case.start[0], rest))
    assert_same_bits(case.called(attached, (case.start[0], attached_rest)), again)
    if rest:  # of batch statistics and of keys there is a second use
        assert any(not np.array_equal(one, two) for one, two in zip(numbers(again), numbers((y, rest)), strict=True))


def test_with_the_identity_rule_on_every_module_gradients_stay(case):
    grads, out = case.gradients(crossvjp.attach(case.model, identity, where=True))
    own_grads, own_out = case.own_gradients
    assert_same_bits(out, own_out)
    assert all(bar.any() for bar in numbers(own_grads))
    assert_close(grads, own_grads, rtol=case.rtol)


def test_a_rule_on_one_layer_doubles_its_gradient_and_leaves_the_others(case):
    by = lambda factor: case.gradients(crossvjp.attach(case.model, ScaleGradient(factor), where=case.layer))
    (grads, out), (ones, _) = by(2.0), by(1.0)
    own_grads, own_out = case.own_gradients
    assert_same_bits(out, own_out)
    assert_close(ones, own_grads, rtol=case.rtol)
    grads, ones, own_grads = named(grads), named(ones), named(own_grads)
    assert {path for path in own_grads if not np.array_equal(grads[path], own_grads[path])} == case.of_layer
    for path in case.of_layer:
        np.testing.assert_array_equal(grads[path], 2 * ones[path])


def refilled(tree: Any, like: Any) -> Any:
    """Puts numbers from anywhere, keys as their data, into a tree like another."""
    is_key = lambda leaf: jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    places = zip(map(jnp.asarray, numbers(tree)), jax.tree.leaves(like), strict=True)
    leaves = [jax.random.wrap_key_data(array) if is_key(leaf) else array for array, leaf in places]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def by_flax(path: Path, saved: Any, like: Any) -> Any:
    """Saves and loads. It takes dicts of arrays, and of keys their data."""
    pure = lambda part: nnx.to_pure_dict(part) if isinstance(part, nnx.State) else part
    data = lambda tree: jax.tree.unflatten(jax.tree.structure(tree), numbers(tree))
    path.write_bytes(flax.serialization.to_bytes(data(tuple(map(pure, saved)))))
    return refilled(flax.serialization.from_bytes(data(tuple(map(pure, like))), path.read_bytes()), like)


def by_orbax(path: Path, saved: Any, like: Any) -> Any:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, saved)
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, like)


def by_pickle(path: Path, saved: Any, like: Any) -> Any:
    path.write_bytes(pickle.dumps(jax.device_get(saved)))
    return pickle.loads(path.read_bytes())


def by_equinox(path: Path, saved: Any, like: Any) -> Any:
    eqx.tree_serialise_leaves(path, saved)
    return eqx.tree_deserialise_leaves(path, like)


FORMATS = [
    ("linen resnet", by_flax),
    ("linen resnet", by_orbax),
    ("nnx vit", by_flax),
    ("nnx vit", by_orbax),
    ("equinox esm2", by_equinox),
    ("haiku resnet", by_pickle),
    ("haiku mobilenet", by_pickle),
]


@pytest.mark.parametrize("attached_first", [False, True], ids=["into an attached model", "out of one"])
@pytest.mark.parametrize(("name", "keep"), FORMATS)
def test_checkpoints_go_between_a_model_and_the_attached_one(name, keep, attached_first, tmp_path):
    case = case_of(name)
    attached = crossvjp.attach(case.model, identity, where=True)
    one, other = (attached, case.model) if attached_first else (case.model, attached)
    saved = case.variables(one)
    like = jax.tree.map(jnp.zeros_like, case.variables(other))
    loaded = keep(tmp_path / "checkpoint", saved, like)
    assert jax.tree.structure(loaded) == jax.tree.structure(like)
    assert_same_bits(loaded, saved)
    on_no_device = refilled(loaded, like)  # orbax puts them on one, for which every operation were compiled again
    assert_same_bits(case.called(attached, on_no_device), case.own_call)


class PartitionedLinen(nn.Module):
    """A layer whose kernel has a box with the names of its axes."""

    @nn.compact
    def __call__(self, x):
        names = nn.with_partitioning(nn.initializers.lecun_normal(), ("rows", None))
        return nn.Dense(3, kernel_init=names)(x).sum()


class PartitionedNnx(nnx.Module):
    """The same."""

    def __init__(self):
        names = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("rows", None))
        self.dense = nnx.Linear(2, 3, kernel_init=names, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.dense(x).sum()


KERNEL_SPEC = jax.sharding.PartitionSpec("rows", None)


def test_linen_variables_of_an_attached_model_have_the_same_boxes():
    model, x = PartitionedLinen(), jnp.ones((1, 2))
    attached = crossvjp.attach(model, identity, where=True)
    own, made = (one.init(jax.random.key(0), x) for one in (model, attached))
    assert isinstance(made["params"]["Dense_0"]["kernel"], nn.Partitioned)
    assert nn.get_partition_spec(made)["params"]["Dense_0"]["kernel"] == KERNEL_SPEC
    grads = jax.grad(attached.apply)(made, x)
    assert jax.tree.structure(made) == jax.tree.structure(grads) == jax.tree.structure(own)  # a box's names are in it
    assert_same_bits((made, grads), (own, jax.grad(model.apply)(own, x)))


def test_nnx_variables_of_an_attached_model_have_the_same_metadata():
    x = jnp.ones((1, 2))
    with jax.set_mesh(jax.make_mesh((1,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))):
        model = PartitionedNnx()
        attached = crossvjp.attach(model, identity, where=True)
        grads, own_grads = (nnx.grad(lambda model: model(x))(one) for one in (attached, model))
    specs: Any = nnx.get_partition_spec(nnx.state(attached))
    assert specs.dense.kernel.get_value() == KERNEL_SPEC
    for state, own in ((nnx.state(attached), nnx.state(model)), (grads, own_grads)):
        assert jax.tree.structure(state) == jax.tree.structure(own)  # a variable's metadata is in it
        assert_same_bits(state, own)


def test_tracing_with_a_rule_at_every_convolution_makes_little_more_function_calls():
    case = case_of("haiku resnet")

    def calls(model: Any) -> int:
        trace = jax.jit(functools.partial(case.with_gradients, model)).trace
        trace(*case.start)  # the first trace imports modules, too
        jax.clear_caches()
        trace = jax.jit(functools.partial(case.with_gradients, model)).trace
        count = itertools.count()
        sys.setprofile(lambda frame, event, argument: next(count) if event.endswith("call") else None)
        try:
            trace(*case.start)
        finally:
            sys.setprofile(None)
        return next(count)

    # By the clock it is at most 1.6 times the plain model's time; the clock of a busy machine tells little.
    own = calls(case.model)
    assert own < calls(crossvjp.attach(case.model, identity, where=hk.Conv2D)) < 1.4 * own


def test_the_identity_rule_on_every_convolution_costs_no_flops():
    case = case_of("haiku resnet")

    def flops(model: Any) -> float:
        run = jax.jit(functools.partial(case.with_gradients, model))
        analysis: Any = run.lower(*case.start).compile().cost_analysis()
        return analysis["flops"]

    assert flops(crossvjp.attach(case.model, identity, where=hk.Conv2D)) == flops(case.model) > 1e8
