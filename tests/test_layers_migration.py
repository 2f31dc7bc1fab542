"""Every layer converts into the same layer of every other framework: outputs, gradients, state."""

from __future__ import annotations

import contextlib
import inspect
import subprocess
import sys

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import pytest
from flax import nnx
from migration_cases import CASES, DIRECTIONS, at_work, built
from migration_layers import check_converts

from crossvjp.adapters.layers import equinox, haiku, linen
from crossvjp.adapters.layers import nnx as nnx_layers


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-12)])
@pytest.mark.parametrize(("name", "source", "target"), DIRECTIONS)
def test_a_layer_computes_the_same_in_every_other_framework(name, source, target, dtype, tolerance):
    with jax.enable_x64() if dtype == "float64" else contextlib.nullcontext():
        check_converts(at_work(name, source, dtype), at_work(name, target, dtype), None, tolerance)


# What has no layout, and why it needs none or can't have one yet.
HOLDS_NOTHING = "has no parameters"
HOLDS_LAYERS = "its layers are converted"
ONE_FRAMEWORK = "only one framework has it"
NOT_COMPARED = "the frameworks' conventions for it are not established"
ABSTRACT = "a base class"
WITHOUT_LAYOUT = {
    nn: {
        HOLDS_NOTHING: "Dropout",
        HOLDS_LAYERS: "Bidirectional RNN Sequential",
        ONE_FRAMEWORK: "ConvLocal MGUCell Fp8DirectDotGeneralOp Fp8DotGeneralOp Fp8Einsum NANOOFp8DotGeneralOp",
        NOT_COMPARED: "ConvLSTMCell SpectralNorm WeightNorm",
        ABSTRACT: "Module RNNCellBase",
    },
    nnx: {
        HOLDS_NOTHING: "Dropout",
        HOLDS_LAYERS: "Bidirectional Dict List RNN Sequential",
        ONE_FRAMEWORK: "LoRA",
        NOT_COMPARED: "SpectralNorm WeightNorm",
        ABSTRACT: "Module RNNCellBase",
    },
    hk: {
        HOLDS_NOTHING: "AvgPool Flatten IdentityCore MaxPool Reshape",
        HOLDS_LAYERS: "DeepRNN ResetCore SeparableDepthwiseConv2D Sequential",
        ONE_FRAMEWORK: "Bias EMAParamsTree ExponentialMovingAverage SNParamsTree",
        NOT_COMPARED: "Conv1DLSTM Conv2DLSTM Conv3DLSTM SpectralNorm",
        ABSTRACT: "Module RNNCore",
    },
    eqx.nn: {
        HOLDS_NOTHING: "AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveAvgPool3d AdaptiveMaxPool1d AdaptiveMaxPool2d "
        "AdaptiveMaxPool3d AdaptivePool AvgPool1d AvgPool2d AvgPool3d Dropout Identity Lambda MaxPool1d MaxPool2d "
        "MaxPool3d Pool RotaryPositionalEmbedding StateIndex",
        HOLDS_LAYERS: "MLP Sequential Shared",
        NOT_COMPARED: "SpectralNorm WeightNorm",
        ABSTRACT: "StatefulLayer",
    },
}
TABLES = {nn: linen, nnx: nnx_layers, hk: haiku, eqx.nn: equinox}


@pytest.mark.parametrize("framework", TABLES, ids=lambda module: module.__name__)
def test_every_public_layer_has_a_layout_or_a_reason(framework):
    base = eqx.Module if framework is eqx.nn else framework.Module
    public = {cls for _, cls in inspect.getmembers(framework, inspect.isclass) if issubclass(cls, base)}
    known = tuple(layout.cls for layout in TABLES[framework].LAYOUTS)
    without = {cls.__name__ for cls in public if not issubclass(cls, known)}
    assert without == set(" ".join(WITHOUT_LAYOUT[framework].values()).split())


def test_every_layout_is_run_by_a_case():
    ran = {id(built(name, framework, "float32").layout) for name, case in CASES.items() for framework in case.makes}
    left = {layout.kind for table in TABLES.values() for layout in table.LAYOUTS if id(layout) not in ran}
    assert left == {"batch_norm_ema", "haiku_gru"}  # these two convert into nothing else


def test_only_the_tables_of_loaded_frameworks_are_loaded():
    code = "import sys, crossvjp.migration as m, equinox; m.layout_of(equinox.nn.PReLU()); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "crossvjp.adapters.layers.equinox" in loaded
    assert not {"flax", "haiku", "crossvjp.adapters.layers.linen", "crossvjp.adapters.layers.haiku"} & set(loaded)
