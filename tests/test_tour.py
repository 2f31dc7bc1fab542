"""`crossvjp tour`: what it shows, that the frameworks agree, and that it notices when they do not."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import optax
import pytest
from flax import nnx

import crossvjp as cv
from crossvjp import _cli
from crossvjp.tour import command, plain, verdict
from crossvjp.tour.data import BATCH_SIZE, Digits, batches, load
from crossvjp.tour.frameworks import OTHERS, PLAIN, Framework
from crossvjp.tour.network import DROPOUT, Arrays, Start, Training, initial_arrays
from crossvjp.tour.rule import UnitNorm
from crossvjp.tour.train import Run

STEPS = 120  # enough for 95 %
LABELS = [framework.label for framework in OTHERS.values()]


@dataclasses.dataclass(frozen=True)
class Tour:
    """A finished tour: what it printed and wrote, and the runs behind it."""

    code: int
    out: str
    err: str
    folder: Path
    runs: dict[str, Run]


@pytest.fixture(scope="module")
def tour(tmp_path_factory: pytest.TempPathFactory) -> Tour:
    """The tour as the command runs it, once."""
    runs: list[Run] = []
    train_all = command.train_all

    def recorded(*args: Any) -> list[Run]:
        runs.extend(train_all(*args))
        return runs

    folder = tmp_path_factory.mktemp("tour") / "made" / "by the command"
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(command, "train_all", recorded)
        code = _cli.main(["tour", "--steps", str(STEPS), "--out", str(folder)])
    return Tour(code, out.getvalue(), err.getvalue(), folder, {run.label: run for run in runs})


@pytest.fixture
def settings() -> Iterator[None]:
    """The tour's own precision."""
    with command.settings():
        yield


@pytest.fixture(scope="module")
def digits() -> Digits:
    """The images."""
    return load()


def test_it_ends_with_zero_where_all_agree(tour: Tour) -> None:
    assert (tour.code, tour.err) == (0, "")
    assert f"Agreed: plain JAX, {', '.join(LABELS)}." in tour.out


@pytest.mark.parametrize("label", ["plain JAX", *LABELS, "plain JAX, no rule"])
def test_progress_and_table_have_a_line_for_each_training(tour: Tour, label: str) -> None:
    lines = [line for line in tour.out.splitlines() if label in line.split("│")[0] or f"│ {label} " in line]
    assert any(f"{STEPS}/{STEPS}" in line for line in lines)
    assert any(line.startswith("│") and f"{tour.runs[label].accuracy:.1%}" in line for line in lines)


def test_the_plot_is_a_picture_with_something_on_it(tour: Tour) -> None:
    pixels = matplotlib.image.imread(tour.folder / "tour.png")
    assert min(pixels.shape[:2]) > 500
    assert len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > 100
    assert "tour.png" in tour.out


@pytest.mark.parametrize("label", LABELS)
def test_frameworks_agree_up_to_rounding(tour: Tour, label: str) -> None:
    ours, reference = tour.runs[label], tour.runs["plain JAX"]
    np.testing.assert_allclose(ours.losses, reference.losses, rtol=1e-9)
    for at, arrays in ours.snapshots.items():
        assert verdict.largest_difference(arrays.params, reference.snapshots[at].params).value < 1e-9
        assert verdict.largest_difference(arrays.statistics, reference.snapshots[at].statistics).value < 1e-9
    assert {leaf.dtype.name for leaf in jax.tree.leaves(ours.final)} == {"float64"}


def test_the_rule_changes_training(tour: Tour) -> None:
    reference, baseline = tour.runs["plain JAX"], tour.runs["plain JAX, no rule"]
    assert reference.losses[0] == baseline.losses[0]  # the same network; only the backward pass differs
    assert verdict.largest_difference(reference.final.params, baseline.final.params).value > 0.1
    assert reference.losses[-20:].mean() < 0.7 * baseline.losses[-20:].mean()


def test_neither_import_nor_run_changes_precision(tour: Tour) -> None:
    assert tour.code == 0
    assert jnp.ones(()).dtype == jnp.float32


@pytest.mark.parametrize("framework", [PLAIN, *OTHERS.values()], ids=lambda framework: framework.label)
@pytest.mark.usefixtures("settings")
def test_the_rule_is_on_every_layer(framework: Framework, digits: Digits) -> None:
    before = initial_arrays(0)
    # one step of plain descent shows the cotangents that it got
    training = framework.load()(UnitNorm(size=0.5), optax.sgd(1.0), before)
    training.step(*first_batch(digits), jax.random.key(0))
    after = training.arrays().params
    for layer, values in before.params.items():
        squares = [np.sum((np.asarray(after[layer][name]) - value) ** 2) for name, value in values.items()]
        assert np.sqrt(sum(squares)) == pytest.approx(0.5, rel=1e-9), layer


@pytest.mark.usefixtures("settings")
def test_the_loss_depends_on_the_dropout_key(digits: Digits) -> None:
    training = PLAIN.load()(UnitNorm(), optax.sgd(0.0), initial_arrays(0))
    first, again, other = (float(training.step(*first_batch(digits), jax.random.key(key))) for key in (0, 0, 1))
    assert first == again
    assert first != other


def first_batch(digits: Digits) -> tuple[jax.Array, jax.Array]:
    """Gives a few images and their labels."""
    return jnp.asarray(digits.train_images[:8]), jnp.asarray(digits.train_labels[:8])


DROPOUTS: dict[str, Callable[[Any, Any], Any]] = {
    "linen": lambda key, x: nn.Dropout(DROPOUT, deterministic=False).apply({}, x, rng=key),
    "nnx": lambda key, x: nnx.Dropout(DROPOUT)(x, rngs=key),
    "haiku": lambda key, x: hk.dropout(key, DROPOUT, x),
    "equinox": lambda key, x: eqx.nn.Dropout(DROPOUT)(x, key=key),
}


@pytest.mark.parametrize("framework", OTHERS)
@pytest.mark.usefixtures("settings")
def test_one_key_gives_one_dropout_mask(framework: str) -> None:
    key, x = jax.random.key(3), jnp.ones((64, 64))
    ours, reference = DROPOUTS[framework](key, x), plain.dropout(key, x)
    assert np.array_equal(np.asarray(ours), np.asarray(reference))
    assert np.mean(np.asarray(reference) == 0) == pytest.approx(DROPOUT, abs=0.05)


def perturbed(start: Start) -> Start:
    """Makes a framework start from slightly other arrays."""

    def start_elsewhere(rule: cv.Rule, optimizer: optax.GradientTransformation, arrays: Arrays) -> Training:
        output = {**arrays.params["output"], "bias": arrays.params["output"]["bias"] + 1e-3}
        return start(rule, optimizer, Arrays({**arrays.params, "output": output}, arrays.statistics))

    return start_elsewhere


def without_rule(start: Start) -> Start:
    """Makes a framework use a rule that leaves all cotangents as they are."""
    own = cv.rule(lambda call, y_bar: call.pullback(y_bar))
    return lambda rule, optimizer, arrays: start(own, optimizer, arrays)


def test_frameworks_that_go_wrong_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    starts = command.load(["linen", "haiku"])
    wrong = {"Haiku": perturbed(starts["Haiku"]), "ruleless Linen": without_rule(starts["Flax Linen"])}
    monkeypatch.setattr(command, "load", lambda names: starts | wrong)
    assert _cli.main(["tour", "--steps", "4", "--out", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert "Haiku disagrees with plain JAX: the parameter " in err
    assert "ruleless Linen disagrees with plain JAX: the parameter " in err
    assert "Flax Linen disagrees" not in err
    assert "Flax Linen has a test accuracy of " in err  # after four steps
    assert "Agreed" not in out
    assert (tmp_path / "tour.png").exists()


def made_run(label: str, bias: float, accuracy: float = 0.99, mean: float = 0.0) -> Run:
    """Makes a run of one step with given figures."""
    params = {"output": {"kernel": np.zeros((2, 2)), "bias": np.array([0.0, bias])}}
    arrays: Any = Arrays(params, {"norm": {"mean": np.array([mean])}})  # pyright: ignore[reportArgumentType]  NumPy's
    return Run(label, np.zeros(1), {1: arrays}, accuracy, 0.0)


GOOD, BASELINE = made_run("plain JAX", 0.0), made_run("plain JAX, no rule", 1.0)


@pytest.mark.parametrize(
    ("other", "baseline", "expected"),
    [
        (made_run("Haiku", 9e-5), BASELINE, []),
        (made_run("Haiku", 2e-4), BASELINE, ["Haiku disagrees.*parameter output/bias differs by up to 2.0e-04"]),
        (made_run("Haiku", np.nan), BASELINE, ["Haiku disagrees.*output/bias differs by up to nan"]),
        (made_run("Haiku", 0.0, mean=3.0), BASELINE, ["Haiku disagrees.*statistic norm/mean differs by up to 3.0e"]),
        (made_run("Haiku", 0.0, accuracy=0.94), BASELINE, ["Haiku has a test accuracy of 94.0%; at least 95%"]),
        (made_run("Haiku", 0.0), made_run("plain JAX, no rule", 1e-5), ["can't tell whether a framework applies"]),
    ],
)
def test_the_verdict_lists_each_fault(other: Run, baseline: Run, expected: Sequence[str]) -> None:
    found = verdict.faults(GOOD, [other], baseline)
    assert len(found) == len(expected)
    for fault, pattern in zip(found, expected, strict=True):
        with pytest.raises(AssertionError, match=pattern):
            raise AssertionError(fault)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tour", "--steps", "0"], "argument --steps: must be an integer from 1 to 1000000, but is '0'"),
        (["tour", "--steps", "many"], "argument --steps: must be an integer from 1 to 1000000, but is 'many'"),
        (["tour", "--seed", "-1"], "argument --seed: must be an integer from 0 to 4294967295, but is '-1'"),
        (["tour", "--frameworks", "torch"], "argument --frameworks: invalid choice: 'torch'"),
        (["tour", "--out", __file__], "argument --out: can't make the folder"),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_a_bad_option_is_explained(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        _cli.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("package", ["rich", "haiku"])
def test_a_missing_package_is_named_with_the_command_that_installs_it(package: str) -> None:
    program = f"import sys; sys.modules[{package!r}] = None; from crossvjp._cli import main; sys.exit(main(['tour']))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"the package {package!r} is missing or too old" in done.stderr
    assert 'pip install "crossvjp[tour]"' in done.stderr
    assert "Traceback" not in done.stderr


def test_the_command_knows_the_frameworks_of_the_tour() -> None:
    assert tuple(OTHERS) == _cli._FRAMEWORKS


def test_batches_are_shuffled_passes(digits: Digits) -> None:
    count = len(digits.train_labels)
    drawn = batches(count, 30, seed=0)
    in_a_pass = count // BATCH_SIZE
    assert drawn.shape == (30, BATCH_SIZE)
    assert len(np.unique(drawn[:in_a_pass])) == in_a_pass * BATCH_SIZE
    assert not np.array_equal(drawn, batches(count, 30, seed=1))
    assert count + len(digits.test_labels) == 1797
