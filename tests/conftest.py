"""Fixtures of all tests."""

from __future__ import annotations

import pytest
from worlds import WORLDS, World

_MADE: dict[str, World] = {}


def make_world(name: str) -> World:
    """Makes a world once a session; worlds are immutable."""
    if name not in _MADE:
        _MADE[name] = WORLDS[name]()
    return _MADE[name]


@pytest.fixture(params=sorted(WORLDS))
def world(request: pytest.FixtureRequest) -> World:
    """Each framework in turn."""
    return make_world(request.param)
