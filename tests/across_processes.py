"""One of several processes that train the tour's networks together; `test_across_processes.py` starts them.

    python across_processes.py RANK COUNT PORT OUT

Every process has `DEVICES / COUNT` devices. The first one writes what all agree on to `OUT`, as a `.npz` file.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

DEVICES, STEPS, BATCH = 8, 3, 64
PLACEMENTS = ("data", "tensor")


def specs_of(placement: str) -> tuple[Any, P]:
    """Says how parameters, and the batch, are cut over the devices.

    In `tensor`, the features of each layer are, but for those of the last, whose inputs are.
    """
    if placement == "data":
        return (lambda path, leaf: P()), P("devices")

    def of(path: Any, leaf: Any) -> P:
        names = jax.tree_util.keystr(path)
        if "output" in names:
            return P("devices", None) if leaf.ndim == 2 else P()
        return P(*[None] * (leaf.ndim - 1), "devices")

    return of, P()


def placed(array: Any, mesh: Mesh, spec: P) -> Any:
    """Cuts an array that every process has over the devices of all."""
    whole = np.asarray(array)
    return jax.make_array_from_callback(whole.shape, NamedSharding(mesh, spec), lambda index: whole[index])


def place_on(mesh: Mesh, of_arrays: Callable[[Any, Any], P], of_batch: P, tree: Any, what: str) -> Any:
    """Cuts the arrays of a network, a batch or a key."""
    if what == "key":
        return jax.jit(jax.random.wrap_key_data)(placed(jax.random.key_data(tree), mesh, P()))
    if what == "batch":
        return jax.tree.map(lambda leaf: placed(leaf, mesh, of_batch), tree)
    return jax.tree.map_with_path(lambda path, leaf: placed(leaf, mesh, of_arrays(path, leaf)), tree)


def batch_of(step: int) -> tuple[Any, Any]:
    """Draws images and labels."""
    draw = np.random.default_rng(step)
    return draw.uniform(size=(BATCH, 8, 8, 1)), draw.integers(0, 10, BATCH)


def trained(start: Callable[..., Any], rule: Any, place: Callable[[Any, str], Any]) -> tuple[list[Any], Any]:
    """Trains a network for a few steps; gives the losses and the arrays after them."""
    import optax

    from crossvjp.tour.network import initial_arrays

    network = start(rule, optax.sgd(0.02, momentum=0.9), place(initial_arrays(0), "arrays"))
    losses = []
    for step in range(STEPS):
        images, labels = batch_of(step)
        losses.append(network.step(place(images, "batch"), place(labels, "batch"), place(jax.random.key(step), "key")))
    return losses, network.arrays()


def by_hand(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Puts the tour's rule on `fn(params, x)` with nothing but `jax.custom_vjp`."""
    from crossvjp.tour.rule import UnitNorm

    rule = UnitNorm()

    @jax.custom_vjp
    def call(params: Any, x: Any) -> Any:
        return fn(params, x)

    def forward(params: Any, x: Any) -> Any:
        return jax.vjp(fn, params, x)

    def backward(pullback: Any, y_bar: Any) -> Any:
        params_bar, x_bar = pullback(y_bar)
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(params_bar)))
        scale = rule.size / (norm + rule.epsilon)
        return jax.tree.map(lambda leaf: scale * leaf, params_bar), x_bar

    call.defvjp(forward, backward)
    return call


def program(under: Callable[..., Any], place: Callable[[Any, str], Any]) -> str:
    """Compiles the gradient of the network in plain JAX, as XLA writes it."""
    from crossvjp.tour.network import cross_entropy, initial_arrays
    from crossvjp.tour.plain import network

    def loss(params: Any, statistics: Any, images: Any, labels: Any, key: Any) -> Any:
        logits, statistics = network(under, params, statistics, images, key)
        return cross_entropy(logits, labels), statistics

    arrays, (images, labels) = place(initial_arrays(0), "arrays"), place(batch_of(0), "batch")
    lowered = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(
        *arrays, images, labels, place(jax.random.key(0), "key")
    )
    text = lowered.compile().as_text()
    assert text is not None
    return text


def main(rank: int, count: int, port: int, out: Path) -> None:
    """Trains every network in each placement."""
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_num_cpu_devices", DEVICES // count)
    jax.distributed.initialize(f"localhost:{port}", num_processes=count, process_id=rank)
    from jax.experimental.multihost_utils import process_allgather

    from crossvjp.tour.frameworks import OTHERS, PLAIN
    from crossvjp.tour.rule import UnitNorm

    mesh = jax.make_mesh((DEVICES,), ("devices",), axis_types=(AxisType.Auto,))
    found: dict[str, Any] = {"processes": jax.process_count(), "devices": len(jax.local_devices())}
    for placement in PLACEMENTS:
        of_arrays, of_batch = specs_of(placement)

        place = functools.partial(place_on, mesh, of_arrays, of_batch)
        found[f"{placement}/by rule"] = program(UnitNorm().lift, place)
        found[f"{placement}/by hand"] = program(by_hand, place)
        for name, framework in {"plain": PLAIN, **OTHERS}.items():
            losses, arrays = trained(framework.load(), UnitNorm(), place)
            gathered = process_allgather((losses, arrays), tiled=True)
            for path, leaf in jax.tree_util.tree_leaves_with_path(gathered):
                found[f"{placement}/{name}{jax.tree_util.keystr(path)}"] = leaf
    if rank == 0:
        np.savez(out, **found)
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
