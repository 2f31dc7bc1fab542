"""Fixtures of all tests."""

from __future__ import annotations

import itertools
import os
import pathlib

import jax
import pytest
from worlds import WORLDS, World, world_of

jax.config.update("jax_num_cpu_devices", 8)  # for test_sharding.py; the others run on the first of them

# Most of the time goes into compiling thousands of small programs, many of them the same in several tests and in both
# of pytest's workers. So they are kept on disk, for the tests' own processes alone.
KEPT = pathlib.Path(__file__).parents[1] / ".pytest_cache" / "jax"
for setting, value in {
    "jax_compilation_cache_dir": str(KEPT),
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
    "jax_traceback_in_locations_limit": 0,  # part of the key; and a seventh of the time, for what nobody reads
}.items():
    jax.config.update(setting, value)

# Older versions of JAX have no coming custom_vjp.
collect_ignore = [] if "jax_custom_vjp3" in jax.config.values else ["test_coming_custom_vjp.py"]

_MADE: dict[str, World] = {}


def make_world(name: str) -> World:
    """Makes a world once a session; worlds are immutable."""
    if name not in _MADE:
        _MADE[name] = world_of(name)
    return _MADE[name]


@pytest.fixture(params=WORLDS)
def world(request: pytest.FixtureRequest) -> World:
    """Each framework in turn."""
    return make_world(request.param)


_TESTS_A_CACHE = 400
_finished = itertools.count(1)


def pytest_runtest_teardown() -> None:
    """Clears what JAX keeps in memory now and then: a worker would grow by a megabyte a test."""
    if next(_finished) % _TESTS_A_CACHE == 0:
        jax.clear_caches()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Makes a skipped test a failure in CI, where every framework is installed."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("CI") and reporter is not None and reporter.stats.get("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
