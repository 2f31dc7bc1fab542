"""Layers of all frameworks in one form: arrays by path in, batch first and channels last, outputs out."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util

from crossvjp.migration import Layer, Layout, convert, convert_cotangents, layout_of

KEY = jax.random.key(0)


@dataclasses.dataclass(frozen=True)
class Built:
    """A layer that runs on arrays by path: `run(params, state, *args) -> (output, new state)`."""

    layer: Layer
    run: Callable[..., Any]

    @functools.cached_property
    def layout(self) -> Layout:
        found = layout_of(self.layer.module)
        assert found is not None
        return found


def called(module: Any, *args: Any) -> Any:
    return module(*args)


def build_linen(module: Any, call: Any, args: Any) -> Built:
    shapes = jax.eval_shape(lambda: module.init(KEY, *args, method=call))
    params, state = _flat(shapes.get("params", {})), _flat(shapes.get("batch_stats", {}))

    def run(params, state, *args):
        variables = {"params": _nested(params), "batch_stats": _nested(state)}
        out, updates = module.apply(variables, *args, method=call, mutable=["batch_stats"])
        return out, _flat(updates.get("batch_stats", {}))

    return Built(Layer(("layer",), "linen", module, params, state), run)


def build_nnx(make: Any, call: Any, args: Any) -> Built:
    module = nnx.eval_shape(make)
    graph, params, state, rest = nnx.split(module, nnx.Param, nnx.BatchStat, ...)
    empty = jax.tree.map(lambda kind: jnp.zeros(kind.shape, kind.dtype), rest)

    def filled(types, arrays):
        return nnx.from_flat_state(
            [(path, kind.replace(jnp.asarray(arrays[path]))) for path, kind in nnx.to_flat_state(types)]
        )

    def run(new_params, new_state, *args):
        live = nnx.merge(graph, filled(params, new_params), filled(state, new_state), empty, copy=True)
        out = call(live, *args)
        return out, {path: leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(live, nnx.BatchStat))}

    types: Any = [{path: _type(leaf) for path, leaf in nnx.to_flat_state(part)} for part in (params, state)]
    return Built(Layer(("layer",), "nnx", module, *types), run)


def build_haiku(make: Any, call: Any, args: Any) -> Built:
    made = []

    def net(*args):
        made.append(make())
        return call(made[-1], *args)

    transformed = hk.transform_with_state(net)
    params, state = jax.eval_shape(lambda: transformed.init(KEY, *args))
    name = made[-1].module_name

    def below(tree):
        parts = [(tuple(module.split("/")), arrays) for module, arrays in tree.items()]
        return {
            (*module[len(name.split("/")) :], leaf): value for module, arrays in parts for leaf, value in arrays.items()
        }

    def whole(arrays):
        tree: Any = {}
        for (*module, leaf), value in arrays.items():
            tree.setdefault("/".join([name, *module]), {})[leaf] = value
        return tree

    def run(params, state, *args):
        out, new_state = transformed.apply(whole(params), whole(state), None, *args)
        return out, below(new_state)

    return Built(Layer(("layer",), "haiku", made[-1], below(params), below(state)), run)


def build_equinox(make: Any, call: Any, args: Any) -> Built:
    module = eqx.filter_eval_shape(make)
    held = ("batch_counter", "batch_state_index", "ema_first_time_index", "ema_state_index")
    indices = {name: getattr(module, name, None) for name in held}
    indices = {name: index for name, index in indices.items() if index is not None}
    state = {}
    for name, index in indices.items():
        values = index.init if isinstance(index.init, tuple) else [index.init]
        many = isinstance(index.init, tuple)
        state |= {(name, str(place)) if many else (name,): _type(value) for place, value in enumerate(values)}
    leaves, tree = jax.tree_util.tree_flatten_with_path(module)
    paths = [tuple(part.name for part in path if hasattr(part, "name")) for path, _ in leaves]
    params = {
        path: _type(leaf)
        for path, (_, leaf) in zip(paths, leaves, strict=True)
        if path[0] not in indices and isinstance(leaf, jax.ShapeDtypeStruct) and jnp.issubdtype(leaf.dtype, jnp.inexact)
    }

    def run(new_params, new_state, *args):
        filled = [
            new_params.get(path, leaf if path[0] not in indices else jnp.zeros(leaf.shape, leaf.dtype))
            for path, (_, leaf) in zip(paths, leaves, strict=True)
        ]
        live = jax.tree.unflatten(tree, filled)
        if not indices:
            return call(live, *args), {}
        stored = eqx.nn.State(live)
        for name in indices:
            parts = [new_state[path] for path in sorted(state) if path[0] == name]
            stored = stored.set(getattr(live, name), tuple(parts) if (name, "0") in state else parts[0])
        out, stored = call(live, stored, *args)
        after = {}
        for path in state:
            value = stored.get(getattr(live, path[0]))
            after[path] = value[int(path[1])] if len(path) == 2 else value
        return out, after

    return Built(Layer(("layer",), "equinox", module, params, state), run)


def by_example(module: Any, *args: Any) -> Any:
    """Runs an Equinox module for each example."""
    return jax.vmap(module)(*args)


def channels_first(module: Any, x: Any) -> Any:
    """Runs an Equinox module for each example, channels first."""
    return jnp.moveaxis(jax.vmap(module)(jnp.moveaxis(x, -1, 1)), 1, -1)


BUILDERS = {"linen": build_linen, "nnx": build_nnx, "haiku": build_haiku, "equinox": build_equinox}
CALLS = {"linen": called, "nnx": called, "haiku": called, "equinox": by_example}


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """A layer at some parameters: its output, and the gradients of a non-linear loss."""

    built: Built
    params: Any
    state: Any
    output: Any
    params_bar: Any
    args_bar: Any


def evaluated(built: Built, params: Any, state: Any, args: Any) -> Evaluated:
    inputs, rest = eqx.partition(args, eqx.is_inexact_array)

    def loss(params, inputs):
        out, _ = built.run(params, state, *eqx.combine(inputs, rest))
        return jnp.sum(jnp.sin(1.3 * out + 0.1 * jnp.arange(out.size, dtype=out.dtype).reshape(out.shape))), out

    (_, output), (params_bar, args_bar) = compiled(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, inputs)
    return Evaluated(built, params, state, output, params_bar, args_bar)


def compiled(function: Any) -> Any:
    """Compiles with few optimisations, in a fifth of the time: each program runs once."""
    options = {
        "xla_backend_optimization_level": 0,
        "xla_cpu_use_fusion_emitters": False,
        "xla_cpu_parallel_codegen_split_count": 1,
    }
    return jax.jit(function, compiler_options=options)


def random_arrays(types: Any, dtype: Any, seed: int = 0) -> Any:
    """Draws arrays of these types; each has another size of entries, so that none is taken for another."""
    draw = np.random.default_rng(seed)
    return {path: (draw.normal(size=kind.shape) * 0.5 + 0.1).astype(dtype) for path, kind in sorted(types.items())}


def check_converts(source: Evaluated, target: Evaluated, layout: Layout | None, tolerance: float) -> None:
    """Checks that the source's arrays become the target's, and that outputs and gradients are then the same."""
    pair = (source.built.layer, source.built.layout), (target.built.layer, layout or target.built.layout)
    (of, its), (to, theirs) = pair
    converted = convert(of, its, source.params, source.state, to, theirs)
    assert converted.params.keys() == target.params.keys()
    for path, array in converted.params.items():
        assert_near(array, target.params[path], tolerance, f"parameter {path}")
    assert_near(source.output, target.output, tolerance, "output")
    for mine, other in zip(jax.tree.leaves(source.args_bar), jax.tree.leaves(target.args_bar), strict=True):
        assert_near(mine, other, tolerance, "gradient of the input")
    # Against the largest of all: softmax makes the gradient of the keys' bias 0, but for rounding.
    scale = max(float(np.max(np.abs(array))) for array in target.params_bar.values())
    for path, array in convert_cotangents(of, its, source.params_bar, to, theirs).items():
        if _has_source(of, its, to, theirs, path):
            assert_near(array, target.params_bar[path], tolerance, f"gradient of {path}", scale)


def _has_source(of: Layer, its: Layout, to: Layer, theirs: Layout, path: Any) -> bool:
    names = {name for move in its.moves(of) for name in move.canonical}
    names |= {name for name, part_of in its.absent.items() if isinstance(part_of, str)}
    return any(path in move.own and set(move.canonical) <= names for move in theirs.moves(to))


def assert_near(array: Any, other: Any, tolerance: float, what: str, scale: float | None = None) -> None:
    """Checks the largest difference against the largest entry, or against a scale."""
    assert array.shape == other.shape, f"{what} has shapes {array.shape} and {other.shape}"
    scale = float(np.max(np.abs(other))) if scale is None else scale
    error = float(np.max(np.abs(array - other))) / (scale + 1e-30)
    assert error <= tolerance, f"{what} is {error:.1e} off, beyond {tolerance:.0e}"


def _type(leaf: Any) -> Any:
    value = leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf
    return jax.ShapeDtypeStruct(value.shape, value.dtype)


def _flat(tree: Any) -> Any:
    return traverse_util.flatten_dict(tree)


def _nested(arrays: Any) -> Any:
    return traverse_util.unflatten_dict(arrays)
