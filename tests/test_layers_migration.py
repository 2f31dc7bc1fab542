"""Every layer converts into the same layer of every other framework: outputs, gradients, state."""

from __future__ import annotations

import contextlib

import jax
import pytest
from migration_cases import DIRECTIONS, at_work
from migration_layers import check_converts


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-12)])
@pytest.mark.parametrize(("name", "source", "target"), DIRECTIONS)
def test_a_layer_computes_the_same_in_every_other_framework(name, source, target, dtype, tolerance):
    with jax.enable_x64() if dtype == "float64" else contextlib.nullcontext():
        check_converts(at_work(name, source, dtype), at_work(name, target, dtype), None, tolerance)
