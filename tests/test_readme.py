"""Runs every Python block of the README."""

from __future__ import annotations

import pathlib
import re
from typing import Any

import jax
import numpy as np
import pytest

import crossvjp
from crossvjp.testing import assert_same_bits

TEXT = (pathlib.Path(__file__).parents[1] / "README.md").read_text()
FIRST, *OTHERS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def title(block: str) -> str:
    """Names a block by its first line."""
    return block.splitlines()[0]


def run(block: str, namespace: dict[str, Any]) -> None:
    """Runs a block as a file of its own, without the future statements of this one."""
    exec(compile(block, "README.md", "exec", dont_inherit=True), namespace)


@pytest.mark.parametrize("block", OTHERS, ids=title)
def test_a_block_runs_behind_the_first_and_signs_the_parameters_gradient(block):
    namespace: dict[str, Any] = {"__name__": "readme"}
    run(FIRST, namespace)
    run(block, namespace)
    if "ClipByNorm" in namespace:
        clipped = namespace["ClipByNorm"](0.5).lift(lambda w, x: (w * x).sum())
        np.testing.assert_allclose(np.linalg.norm(jax.grad(clipped)(np.ones(2), namespace["x"])), 0.5, rtol=1e-6)
        return
    if "halve_where_positive" in namespace:
        message = str(namespace["failure"])
        assert "plain mlp: homogeneous in y_bar: failed" in message
        assert "say linear=False" in message
        return
    if "RoundToStep" in namespace:
        x = namespace["x"]
        np.testing.assert_allclose(namespace["step_bar"], sum(np.round(x / 0.3) - x / 0.3), rtol=1e-5)
        return
    if "Probed" in namespace:
        (norm,) = crossvjp.channels(namespace["variables"]).values()
        y = namespace["Probed"]().apply(namespace["variables"], namespace["x"])
        np.testing.assert_allclose(norm.value, 2 * np.linalg.norm(y), rtol=1e-5)
        return
    if "four_bits" in namespace:
        linear, x = namespace["linear"], namespace["x"]
        weight = 0.1 * np.round(np.clip(np.asarray(linear.weight) / 0.1, -8, 7))
        np.testing.assert_allclose(namespace["four_bits"](np.float32(0.1)), weight @ x + linear.bias, rtol=1e-5)
        assert float(namespace["step_bar"]) != 0
        return
    if "guided" in namespace:
        x, params, own = namespace["x"], namespace["params"], namespace["plain"]
        of = lambda model: jax.grad(lambda params: model.apply(params, x).sum())(params)
        assert_same_bits(of(namespace["net"]), own)
        assert_same_bits(namespace["grads"], jax.tree.map(np.sign, own))
        expected = jax.tree_util.tree_map_with_path(lambda path, g: g / 2 if "linear_0" in str(path) else g, own)
        assert_same_bits(of(namespace["half"]), expected)
        with pytest.raises(AssertionError):
            assert_same_bits(of(namespace["guided"]), own)
        return
    if "moved" in namespace:
        x, y = namespace["x"], namespace["trained"].apply(namespace["params"], None, namespace["x"])
        np.testing.assert_allclose(namespace["y"], y, rtol=1e-5)
        return
    if "scaled" in namespace:
        x = namespace["x"]
        np.testing.assert_array_equal(namespace["scaled"], x * (1 + x))
        return
    leaves = jax.tree.leaves(namespace["grads"])
    assert leaves
    assert all(set(np.unique(leaf)) <= {-1.0, 1.0} for leaf in leaves)


def test_there_is_a_block_for_every_framework():
    imports = "\n".join(OTHERS)
    for framework in ("flax.linen", "from flax import nnx", "import haiku", "import equinox", "params = {"):
        assert framework in imports
