"""A dense layer in every framework, called through a function of its handle, as a pure function of its arrays."""

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

from crossvjp.adapters.haiku import bind

Use = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Host:
    """One kind of module handle.

    Args:
        name: the framework and the kind of handle.
        params: the parameters of the layer: a kernel of shape (2, 3), or its transpose, and a bias.
        run: `(params, use, *args) -> use(mdl, *args)`, with a live handle.
        kernel_only: a word of the framework's own for `grad_vars` that leaves the bias out.
        is_reference: whether the handle is a reference to variables that live elsewhere.
    """

    name: str
    params: Any
    run: Callable[..., Any]
    kernel_only: Any
    is_reference: bool

    def __repr__(self) -> str:
        return self.name


def the_input() -> Any:
    """Makes an input of shape (2,)."""
    return jnp.array([1.0, -2.0])


def kernel_and_bias(tree: Any) -> tuple[Any, Any]:
    """Finds the kernel, which has two axes, and the bias among the arrays of a tree."""
    leaves = jax.tree.leaves(tree)
    kernel = next(leaf for leaf in leaves if leaf.ndim == 2)
    return kernel, next(leaf for leaf in leaves if leaf.ndim == 1)


def linen_compact() -> Host:
    """A submodule made in `nn.compact`."""

    class Net(nn.Module):
        use: Any

        @nn.compact
        def __call__(self, *args):
            return self.use(nn.Dense(3), *args)

    params = Net(lambda mdl, x: mdl(x)).init(jax.random.key(0), the_input())
    return Host("linen compact", params, lambda params, use, *args: Net(use).apply(params, *args), "*/kernel", True)


def linen_setup() -> Host:
    """A submodule made in `setup`."""

    class Net(nn.Module):
        use: Any

        def setup(self):
            self.dense = nn.Dense(3)

        def __call__(self, *args):
            return self.use(self.dense, *args)

    params = Net(lambda mdl, x: mdl(x)).init(jax.random.key(0), the_input())
    return Host("linen setup", params, lambda params, use, *args: Net(use).apply(params, *args), "*/kernel", True)


def linen_bound() -> Host:
    """A module bound to its variables outside of any other."""
    params = nn.Dense(3).init(jax.random.key(0), the_input())
    return Host(
        "linen bound", params, lambda params, use, *args: use(nn.Dense(3).bind(params), *args), "*/kernel", True
    )


def nnx_module(*, graph: bool) -> Host:
    """An NNX module, in graph mode or in tree mode."""
    graphdef, params = nnx.split(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))

    def run(params, use, *args):
        with nnx.set_graph_mode(graph), nnx.set_graph_updates(graph):
            return use(nnx.merge(graphdef, params, copy=True), *args)

    kernel_only = nnx.All(nnx.Param, nnx.PathContains("kernel"))
    return Host(f"nnx {'graph' if graph else 'tree'}", params, run, kernel_only, True)


def haiku_module() -> Host:
    """A Haiku module inside a transform."""
    return _haiku("haiku module", lambda: hk.Linear(3, name="dense"))


def haiku_function() -> Host:
    """A function of Haiku modules inside a transform."""
    return _haiku("haiku function", lambda: lambda *args: hk.Linear(3, name="dense")(*args))


def _haiku(name: str, make: Callable[[], Any]) -> Host:
    transformed = hk.transform(lambda use, *args: use(make(), *args))
    params = transformed.init(jax.random.PRNGKey(0), lambda mdl, x: mdl(x), the_input())
    return Host(name, params, lambda params, use, *args: transformed.apply(params, None, use, *args), "*/w", True)


def haiku_with_state() -> Host:
    """A Haiku module inside a transform with state."""
    transformed = hk.transform_with_state(lambda use, *args: use(hk.Linear(3), *args))
    params, state = transformed.init(jax.random.PRNGKey(0), lambda mdl, x: mdl(x), the_input())
    run = lambda params, use, *args: transformed.apply(params, state, None, use, *args)[0]
    return Host("haiku with state", params, run, "*/w", True)


def haiku_multi() -> Host:
    """A Haiku module inside a multi-transform."""

    def make():
        layer = hk.Linear(3)
        return lambda x: layer(x), {"use": lambda use, *args: use(layer, *args)}

    transformed = hk.multi_transform(make)
    params = transformed.init(jax.random.PRNGKey(0), the_input())
    run = lambda params, use, *args: transformed.apply["use"](params, None, use, *args)
    return Host("haiku multi", params, run, "*/w", True)


def haiku_transformed() -> Host:
    """A transformed function outside, bound to its parameters."""
    transformed = hk.transform(lambda x: hk.Linear(3)(x))
    params = transformed.init(jax.random.PRNGKey(0), the_input())
    run = lambda params, use, *args: use(bind(transformed, params), *args)
    return Host("haiku transformed", params, run, "*/w", False)


def equinox_module() -> Host:
    """An Equinox module."""
    layer = eqx.nn.Linear(2, 3, key=jax.random.key(0))
    params, static = eqx.partition(layer, eqx.is_array)
    spec = eqx.tree_at(lambda layer: (layer.weight, layer.bias), layer, (True, False))
    return Host("equinox", params, lambda params, use, *args: use(eqx.combine(params, static), *args), spec, False)


def equinox_method() -> Host:
    """A bound method of an Equinox module."""

    class Layer(eqx.Module):
        inner: eqx.nn.Linear

        def forward(self, x):
            return self.inner(x)

    params, static = eqx.partition(Layer(eqx.nn.Linear(2, 3, key=jax.random.key(0))), eqx.is_array)
    run = lambda params, use, *args: use(eqx.combine(params, static).forward, *args)
    return Host("equinox method", params, run, "*/weight", False)


def plain() -> Host:
    """Plain parameters, with their function as a `Partial`."""

    def dense(params, x):
        return x @ params["kernel"] + params["bias"]

    params = {"kernel": jax.random.normal(jax.random.key(0), (2, 3)), "bias": jnp.zeros(3)}
    run = lambda params, use, *args: use(jax.tree_util.Partial(dense, params), *args)
    return Host("plain", params, run, "*kernel", False)


HOSTS = {
    host.name: host
    for host in (
        linen_compact(),
        linen_setup(),
        linen_bound(),
        nnx_module(graph=True),
        nnx_module(graph=False),
        haiku_module(),
        haiku_function(),
        haiku_with_state(),
        haiku_multi(),
        haiku_transformed(),
        equinox_module(),
        equinox_method(),
        plain(),
    )
}
