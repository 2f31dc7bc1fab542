"""Metadata of Flax variables, between the boxes of Linen and the Variables of NNX."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
from flax import nnx
from flax.nnx.bridge import variables as bridge


def collection_of(leaf: Any) -> str:
    """Names the collection of a leaf of an NNX module: "params" for all that is trained, in every host."""
    if not isinstance(leaf, nnx.Variable):
        return "buffers"
    if isinstance(leaf, nnx.Param):
        return "params"
    try:
        return nnx.variable_name_from_type(type(leaf))
    except ValueError:  # a type that has no other name than its own
        return type(leaf).__name__


def boxed(variable: nnx.Variable[Any]) -> Any:
    """Gives a Variable's value, in a box if there is metadata.

    A sharding becomes `nn.Partitioned`, which Linen's transforms keep up when they add an axis. What else there
    is goes into the box that Flax's own bridge has for it.
    """
    if bridge.is_vanilla_variable(variable):
        return variable.get_raw_value()
    metadata = _beyond_vanilla(variable)
    if set(metadata) <= {"out_sharding", "mesh"} and metadata.get("out_sharding") is not None:
        return nn.Partitioned(variable.get_raw_value(), names=metadata["out_sharding"], mesh=metadata.get("mesh"))
    return bridge.to_linen_var(variable)


def _beyond_vanilla(variable: nnx.Variable[Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in variable.get_metadata().items()
        if name not in nnx.Variable.required_metadata and not (name.endswith("_hooks") and value == ())
    }


def unboxed(value: Any) -> Any:
    """Takes a value out of its box."""
    return value.unbox() if isinstance(value, nn.meta.AxisMetadata) else value


def variable_of(collection: str, value: Any) -> nnx.Variable[Any]:
    """Makes a Variable of a value of a collection, with the metadata of its box."""
    if not isinstance(value, nn.meta.AxisMetadata):
        return bridge.to_nnx_var(collection, value)
    # Without a mesh NNX would refuse to make a Variable with a sharding, though nothing is to be moved.
    has_mesh = not jax.sharding.get_abstract_mesh().empty or getattr(value, "mesh", None) is not None
    with nnx.use_eager_sharding(nnx.using_eager_sharding() and has_mesh):
        if isinstance(value, nnx.bridge.NNXMeta):
            return value.to_nnx_variable()
        return bridge.to_nnx_var(collection, value)
