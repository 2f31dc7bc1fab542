"""One function of a dict of arrays, as a module of each framework that holds just these arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
from flax import nnx

from crossvjp.testing import Subject

Arrays = Mapping[str, Any]
Fn = Callable[..., Any]
"""`fn(variables, *inputs)`"""


def five(variables: Arrays, fn: Fn, inputs: tuple[Any, ...], model: str = "") -> list[Subject]:
    """Makes the subjects, one a framework.

    Args:
        variables: the parameters by their names; may be empty.
        fn: what the module's call computes.
        inputs: what the subjects' calls get.
        model: what reports call it.
    """
    makers = {"plain": plain, "linen": linen, "nnx": nnx_graph, "haiku": haiku, "equinox": equinox}
    made = {name: make(dict(variables), fn) for name, make in makers.items()}
    return [
        Subject(f"{name} {model}".strip(), held, (), inputs, run, common, model)
        for name, (held, run, common) in made.items()
    ]


def plain(variables: dict[str, Any], fn: Fn) -> Any:
    """Plain JAX: the dict itself, with its function as a `Partial`; without variables, a function of the inputs."""

    def run(held, rest, use, *inputs):
        return use(jax.tree_util.Partial(fn, held) if held else lambda *inputs: fn(held, *inputs), *inputs), ()

    return variables, run, lambda held: held


class _Linen(nn.Module):
    fn: Any
    shapes: Any

    @nn.compact
    def __call__(self, *inputs):
        held = {name: self.param(name, lambda key, a=a: jax.numpy.zeros(a.shape, a.dtype)) for name, a in self.shapes}
        return self.fn(held, *inputs)


class _Net(nn.Module):
    """Holds the module, so that it is called inside of another."""

    fn: Any
    shapes: Any
    use: Any

    @nn.compact
    def __call__(self, *inputs):
        return self.use(_Linen(self.fn, self.shapes, name="inner"), *inputs)


def linen(variables: dict[str, Any], fn: Fn) -> Any:
    """Flax Linen: a submodule in a compact method."""
    shapes = tuple((name, jax.ShapeDtypeStruct(a.shape, a.dtype)) for name, a in variables.items())

    def run(held, rest, use, *inputs):
        return _Net(fn, shapes, use).apply({"params": held}, *inputs), ()

    return ({"inner": variables} if variables else {}), run, lambda held: held.get("inner", {})


class _Nnx(nnx.Module):
    def __init__(self, variables, fn):
        for name, value in variables.items():
            setattr(self, name, nnx.Param(value))
        self.names = tuple(variables)
        self.fn = fn

    def __call__(self, *inputs):
        return self.fn({name: getattr(self, name)[...] for name in self.names}, *inputs)


def nnx_graph(variables: dict[str, Any], fn: Fn) -> Any:
    """Flax NNX: a module with one `Param` an array."""
    graphdef, held = nnx.split(_Nnx(variables, fn))

    def run(held, rest, use, *inputs):
        return use(nnx.merge(graphdef, held, copy=True), *inputs), ()

    return held, run, nnx.to_pure_dict


def haiku(variables: dict[str, Any], fn: Fn) -> Any:
    """Haiku: a module inside a transform."""

    class Module(hk.Module):
        def __call__(self, *inputs):
            get = lambda name, a: hk.get_parameter(name, a.shape, a.dtype, init=hk.initializers.Constant(0))
            return fn({name: get(name, a) for name, a in variables.items()}, *inputs)

    transformed = hk.transform(lambda use, *inputs: use(Module(name="inner"), *inputs))

    def run(held, rest, use, *inputs):
        return transformed.apply(held, None, use, *inputs), ()

    return ({"inner": variables} if variables else {}), run, lambda held: held.get("inner", {})


class _Equinox(eqx.Module):
    held: Any
    fn: Any = eqx.field(static=True)

    def __call__(self, *inputs):
        return self.fn(self.held, *inputs)


def equinox(variables: dict[str, Any], fn: Fn) -> Any:
    """Equinox: a module with the dict as a field."""

    def run(held, rest, use, *inputs):
        return use(held, *inputs), ()

    return _Equinox(variables, fn), run, lambda held: held.held
