"""The tour's networks trained by two processes together, with the data cut over their devices, or the layers."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from across_processes import DEVICES, PLACEMENTS, trained
from test_collectives import collectives as collectives

from crossvjp.tour.frameworks import OTHERS, PLAIN
from crossvjp.tour.rule import UnitNorm

PROCESSES = 2
NETWORKS = {"plain": PLAIN, **OTHERS}
PROGRAM = Path(__file__).with_name("across_processes.py")


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the processes agree on."""
    out, port = tmp_path_factory.mktemp("together") / "found.npz", free_port()
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), str(rank), str(PROCESSES), str(port), str(out)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(PROCESSES)
    ]
    try:
        said = [process.communicate(timeout=600)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * PROCESSES, "\n".join(said)
    return np.load(out)


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """The same on one device."""
    with jax.enable_x64(True):
        return {name: trained(each.load(), UnitNorm(), lambda tree, what: tree) for name, each in NETWORKS.items()}


def test_each_process_has_devices_of_its_own(together):
    assert (together["processes"], together["devices"]) == (PROCESSES, DEVICES // PROCESSES)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_processes_train_together_as_one_device_does(together, alone, placement, name):
    """In float64, so that what is summed in another order differs by far less than the 1e-6 that is asked for."""
    leaves = jax.tree_util.tree_leaves_with_path(alone[name])
    found = {path.removeprefix(f"{placement}/{name}") for path in together if path.startswith(f"{placement}/{name}[")}
    assert found == {jax.tree_util.keystr(path) for path, _ in leaves}
    for path, leaf in leaves:
        came = together[f"{placement}/{name}{jax.tree_util.keystr(path)}"]
        np.testing.assert_allclose(came, leaf, rtol=0, atol=1e-12 * max(1, np.abs(leaf).max()))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_program_of_two_processes_has_the_collectives_of_the_rule_by_hand(together, collectives, placement):
    by_rule, by_hand = (collectives.count(str(together[f"{placement}/{by}"])) for by in ("by rule", "by hand"))
    assert by_rule == by_hand
    assert by_rule["all-reduce"] > 0
