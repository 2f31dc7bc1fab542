"""In CI, a test that was skipped has failed."""

from __future__ import annotations

import pathlib
import shutil
import subprocess
import sys

import pytest


@pytest.mark.parametrize(("ci", "code"), [("true", 1), ("", 0)], ids=["in CI", "elsewhere"])
def test_a_skip_is_a_failure_in_ci_alone(tmp_path, monkeypatch, ci, code):
    here = pathlib.Path(__file__).parent
    for name in ("conftest.py", "worlds.py"):
        shutil.copy(here / name, tmp_path)
    skips = "import pytest\ndef test_it():\n    pytest.skip('not here')\n"  # what CI must refuse; ours skips nothing
    (tmp_path / "test_skipped.py").write_text(skips)
    monkeypatch.setenv("CI", ci)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(tmp_path),
        str(tmp_path),
    ]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, check=False).returncode == code
