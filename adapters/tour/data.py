"""Scikit-learn's handwritten digits: 1,797 real images of 8 x 8 pixels that come with the package."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

BATCH_SIZE = 64


@dataclasses.dataclass(frozen=True)
class Digits:
    """Images with pixels from 0 to 1 and their labels, cut in two once and for all."""

    train_images: Float64[np.ndarray, "train 8 8 1"]
    train_labels: Int64[np.ndarray, " train"]
    test_images: Float64[np.ndarray, "test 8 8 1"]
    test_labels: Int64[np.ndarray, " test"]


def load() -> Digits:
    """Loads the digits; a fifth of each class is for testing, the same images every time."""
    bundle: Any = load_digits()
    images = bundle.images[..., None] / 16.0  # (example, row, column, channel)
    parts = train_test_split(images, bundle.target, test_size=0.2, random_state=0, stratify=bundle.target)
    train_images, test_images, train_labels, test_labels = map(np.asarray, parts)
    return Digits(train_images, train_labels, test_images, test_labels)


def batches(count: int, steps: int, seed: int) -> Int64[np.ndarray, "steps batch"]:
    """Lists which of `count` examples each step trains on: shuffled passes, each without its incomplete last batch."""
    generator = np.random.default_rng(seed)
    in_a_pass = count // BATCH_SIZE
    passes = [generator.permutation(count)[: in_a_pass * BATCH_SIZE] for _ in range(-(-steps // in_a_pass))]
    return np.concatenate(passes).reshape(-1, BATCH_SIZE)[:steps]
