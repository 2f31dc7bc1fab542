"""The training loop: the same batches, keys and optimiser for every framework."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float64

from crossvjp.tour.data import Digits, batches
from crossvjp.tour.network import Arrays, Training, initial_arrays

LEARNING_RATE = 0.02
SNAPSHOTS = 40


@dataclasses.dataclass(frozen=True)
class Plan:
    """What all runs have in common.

    Args:
        steps: >= 1.
        seed: >= 0; decides on the initial arrays, the batches and the dropout keys.
    """

    steps: int
    seed: int


@dataclasses.dataclass(frozen=True)
class Run:
    """What one training left behind."""

    label: str
    losses: Float64[np.ndarray, " steps"]
    snapshots: dict[int, Arrays]
    """The arrays after so many steps, the last step among them."""
    accuracy: float
    """The fraction of test images that are classified correctly."""
    seconds: float
    """Time for building, compiling and all steps."""

    @property
    def final(self) -> Arrays:
        """The arrays after the last step."""
        return self.snapshots[len(self.losses)]


def optimizer(plan: Plan) -> optax.GradientTransformation:
    """Makes the optimiser: momentum, with a learning rate that falls to zero.

    Adam would undo the rule by itself, since it divides each gradient by its usual size.
    """
    return optax.sgd(optax.schedules.cosine_decay_schedule(LEARNING_RATE, plan.steps), momentum=0.9)


def train(
    label: str,
    start: Callable[[optax.GradientTransformation, Arrays], Training],
    plan: Plan,
    digits: Digits,
    report: Callable[[float], None],
) -> Run:
    """Trains one network.

    Args:
        label: what the report calls the run.
        start: builds the network from an optimiser and the initial arrays.
        plan: the number of steps and the seed.
        digits: the images.
        report: is called after each step with its loss.

    Returns:
        The losses, snapshots of the arrays, the accuracy on the test images, and the time.
    """
    key = jax.random.key(plan.seed)
    every = max(1, plan.steps // SNAPSHOTS)
    losses: list[float] = []
    snapshots: dict[int, Arrays] = {}
    began = time.perf_counter()
    network = start(optimizer(plan), initial_arrays(plan.seed))
    seconds = time.perf_counter() - began
    for number, batch in enumerate(batches(len(digits.train_labels), plan.steps, plan.seed), start=1):
        images, labels = jnp.asarray(digits.train_images[batch]), jnp.asarray(digits.train_labels[batch])
        began = time.perf_counter()
        loss = network.step(images, labels, jax.random.fold_in(key, number))
        losses.append(float(loss))
        seconds += time.perf_counter() - began
        report(losses[-1])
        if number % every == 0 or number == plan.steps:
            snapshots[number] = jax.tree.map(np.asarray, network.arrays())
    guesses = np.argmax(np.asarray(network.logits(jnp.asarray(digits.test_images))), axis=-1)
    return Run(label, np.array(losses), snapshots, float(np.mean(guesses == digits.test_labels)), seconds)
