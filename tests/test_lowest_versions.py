"""The lowest versions that pyproject.toml allows are those that `make lowest` installs and tests."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

HERE = Path(__file__).parent
PROJECT = (HERE.parent / "pyproject.toml").read_text()
CONSTRAINTS = (HERE / "lowest.txt").read_text()


def lower_bounds(project: str) -> dict[str, Version]:
    """Lists what a user's installation depends on, by name, with the one lower bound that each has."""
    table = tomllib.loads(project)["project"]
    written = [*table["dependencies"], *(line for extra in table["optional-dependencies"].values() for line in extra)]
    bounds = {}
    for requirement in map(Requirement, written):
        name = canonicalize_name(requirement.name)
        if name == table["name"]:  # an extra that takes in others
            continue
        (bound,) = requirement.specifier
        assert bound.operator == ">=", f"{requirement} has no lower bound"
        assert bounds.setdefault(name, Version(bound.version)) == Version(bound.version), f"{name} has two lower bounds"
    return bounds


def pins(constraints: str) -> dict[str, Version]:
    """Lists what the constraints pin to one version."""
    written = [line.partition("#")[0].strip() for line in constraints.splitlines()]
    found = {}
    for requirement in map(Requirement, filter(None, written)):
        for bound in requirement.specifier:
            if bound.operator == "==":
                found[canonicalize_name(requirement.name)] = Version(bound.version)
    return found


def test_the_lowest_environment_pins_every_lower_bound():
    assert pins(CONSTRAINTS) == lower_bounds(PROJECT)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("jax==", "jax==0."),
        ("jax==", "jax>="),
        ("flax==", "# flax=="),
        ("optax==", "chex==0.1.90\noptax=="),
    ],
    ids=["another version", "no pin", "one missing", "one too many"],
)
def test_other_constraints_do_not_pass(old, new):
    assert old in CONSTRAINTS
    assert pins(CONSTRAINTS.replace(old, new, 1)) != lower_bounds(PROJECT)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"jax>=', '"jax>=1!'),
        ('"equinox>=', '"equinox2>='),
        ('"rich>=', '"attrs>=20", "rich>='),
    ],
    ids=["another version", "another name", "one more"],
)
def test_another_project_does_not_pass(old, new):
    assert old in PROJECT
    assert pins(CONSTRAINTS) != lower_bounds(PROJECT.replace(old, new, 1))


@pytest.mark.parametrize(("old", "new"), [("flax>=", "flax=="), ("flax>=", "flax<")])
def test_every_dependency_needs_a_lower_bound(old, new):
    with pytest.raises(AssertionError, match=r"flax.* has no lower bound"):
        lower_bounds(PROJECT.replace(old, new))


def test_two_extras_may_not_disagree():
    twice = PROJECT.replace('"rich>=', '"flax>=1", "rich>=')
    with pytest.raises(AssertionError, match="flax has two lower bounds"):
        lower_bounds(twice)
