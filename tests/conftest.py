"""Fixtures of all tests."""

from __future__ import annotations

import itertools
import os

import jax
import pytest
from worlds import WORLDS, World, world_of

jax.config.update("jax_num_cpu_devices", 8)  # for test_sharding.py; the others run on the first of them

jax.config.update("jax_traceback_in_locations_limit", 0)  # a seventh of the time, for what nobody reads

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


_TESTS_A_CACHE = 40
_finished = itertools.count(1)


def pytest_runtest_teardown() -> None:
    """Clears JAX's caches now and then: lowering slows down with the number of programs that are kept."""
    if next(_finished) % _TESTS_A_CACHE == 0:
        jax.clear_caches()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Makes a skipped test a failure in CI, where every framework is installed."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("CI") and reporter is not None and reporter.stats.get("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
