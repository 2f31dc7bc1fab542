"""ResNet-18 in Linen, a rewrite of `hk.nets.ResNet18`."""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp


class Block(nn.Module):
    """Two convolutions beside a shortcut."""

    channels: int
    stride: int
    has_projection: bool

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        """Computes the block."""
        conv = partial(nn.Conv, self.channels, use_bias=False)
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        shortcut = x
        if self.has_projection:
            shortcut = conv(kernel_size=(1, 1), strides=self.stride, name="shortcut_conv")(x)
            shortcut = norm(name="shortcut_norm")(shortcut)
        y = nn.relu(norm(name="norm_0")(conv(kernel_size=(3, 3), strides=self.stride, name="conv_0")(x)))
        y = norm(name="norm_1")(conv(kernel_size=(3, 3), name="conv_1")(y))
        return nn.relu(y + shortcut)


class ResNet18(nn.Module):
    """The network, with the settings that Haiku's has."""

    classes: int

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        """Computes logits of images in NHWC."""
        x = nn.Conv(64, (7, 7), strides=2, use_bias=False, name="stem")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9, name="stem_norm")(x))
        x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for group, channels in enumerate((64, 128, 256, 512)):
            for block in range(2):
                is_first = block == 0
                stride = 2 if group and is_first else 1
                x = Block(channels, stride, bool(group) and is_first, name=f"group_{group}_block_{block}")(x, train)
        return nn.Dense(self.classes, name="logits")(jnp.mean(x, (1, 2)))
