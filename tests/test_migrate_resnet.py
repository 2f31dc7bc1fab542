"""A published model with state, `hk.nets.ResNet18`, moved to its rewrite in Linen."""

from __future__ import annotations

import haiku as hk
import jax
import jax.numpy as jnp
from resnet_linen import ResNet18

import crossvjp as cv
from crossvjp.adapters.haiku import bind

IMAGES = jax.random.normal(jax.random.key(1), (8, 32, 32, 3))


def test_resnet18_of_haiku_moves_to_linen_with_its_state_and_the_proof():
    net = hk.transform_with_state(lambda x, train: hk.nets.ResNet18(5)(x, train))
    params, state = jax.jit(net.init, static_argnums=2)(jax.random.key(0), IMAGES, True)
    params["res_net18/~/logits"]["w"] += 0.1  # they start at zero
    counted = lambda path, leaf: leaf + 500 if path[-1].key == "counter" else leaf
    # As after 500 steps, of which the last was that of `init`; the sum is what the average was made of.
    state = jax.tree_util.tree_map_with_path(counted, state)
    state = {name: {**pair, "hidden": pair["average"]} for name, pair in state.items()}
    moved = cv.migrate(
        bind(net, params, state),
        ResNet18(5),
        IMAGES,
        source_call=lambda mdl, x: mdl(x, False),
        source_train=lambda mdl, x: mdl(x, True),
        target_call=lambda mdl, x: mdl(x, False),
        target_train=lambda mdl, x: mdl(x, True),
        steps=2,
    )
    assert moved.report.proved
    assert len(moved.report.layers) == 41  # 20 convolutions, 20 batch norms, one dense layer
    shortcut = next(one for one in moved.report.layers if one.target == "group_1_block_0/shortcut_norm")
    assert shortcut.source == "res_net18/~/block_group_1/~/block_0/~/shortcut_batchnorm"
    text = str(moved.report)
    assert "parameters after 2 steps" in text
    assert "hidden_mean, hidden_var, mean_count, var_count of res_net18/~/initial_batchnorm" in text
    assert moved.variables["batch_stats"]["stem_norm"]["mean"].shape == (64,)
    assert jnp.all(moved.variables["params"]["stem"]["kernel"] == params["res_net18/~/initial_conv"]["w"])
