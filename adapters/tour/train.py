"""The training loop: the same batches, keys and optimiser for every framework."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import jax
import numpy as np
import optax
from jaxtyping import Float64

import crossvjp as cv
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
    training: type[Training],
    rule: cv.Rule | None,
    plan: Plan,
    digits: Digits,
    report: Callable[[float], None],
) -> Run:
    """Trains one network.

    Args:
        label: what the report calls the run.
        training: the framework's `Training`.
        rule: the rule on every layer; `None`, in plain JAX, for plain gradients.
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
    start = time.perf_counter()
    # pyright knows `None` in one constructor only; `PlainTraining` is the one that gets it
    network = training(rule, optimizer(plan), initial_arrays(plan.seed))  # pyright: ignore[reportArgumentType]
    seconds = time.perf_counter() - start
    for number, batch in enumerate(batches(len(digits.train_labels), plan.steps, plan.seed), start=1):
        start = time.perf_counter()
        loss = network.step(digits.train_images[batch], digits.train_labels[batch], jax.random.fold_in(key, number))
        losses.append(float(loss))
        seconds += time.perf_counter() - start
        report(losses[-1])
        if number % every == 0 or number == plan.steps:
            snapshots[number] = jax.tree.map(np.asarray, network.arrays())
    guesses = np.argmax(np.asarray(network.logits(digits.test_images)), axis=-1)
    return Run(label, np.array(losses), snapshots, float(np.mean(guesses == digits.test_labels)), seconds)
