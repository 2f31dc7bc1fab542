"""`crossvjp migrate` from beginning to end: read, move, show, and write if the proof holds."""

from __future__ import annotations

import dataclasses
import importlib
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import crossvjp as cv
from crossvjp.adapters import files
from crossvjp.adapters.migrating import objects, report
from crossvjp.adapters.migrating.refusal import UsageError
from crossvjp.migration import Migration, Report, framework_of


@dataclasses.dataclass(frozen=True)
class Job:
    """What the command line asks for.

    Attributes:
        params: the saved parameters.
        source: names their model.
        target: names the model that they are to go to.
        sample: names what both are called with.
        out: the file to write; `None` writes nothing.
        formats: of `params` and of `out`; `None` finds out.
        calls: name how source and target are called, and how while training.
        mapping: pairs of layers that are said.
        ignore: globs of what in the file is left.
        options: of `crossvjp.migrate`.
        write_anyway: write even if the proof fails.
    """

    params: Path
    source: str
    target: str
    sample: Sequence[str]
    out: Path | None
    formats: tuple[str | None, str | None]
    calls: Mapping[str, str | None]
    mapping: Mapping[str, str | None]
    ignore: Sequence[str]
    options: Mapping[str, Any]
    write_anyway: bool


def run(job: Job) -> int:
    """Runs the command.

    Returns:
        0 if the models are proved the same and the file is written, 1 if they are not, or the file does not fit or the
        layers do not, and 2 if the command line is wrong.
    """
    try:
        return _run(job)
    except (UsageError, FileNotFoundError, FileExistsError) as error:
        return _fail(error, 2)
    except (cv.CrossVJPError, OSError) as error:
        return _fail(error, 1)


def _run(job: Job) -> int:
    if job.out is not None:
        _check_target(job.out, job.formats[1])
    source, target = objects.model(job.source, "--source"), objects.model(job.target, "--target")
    calls = {name: objects.call(text, f"--{name.replace('_', '-')}") for name, text in job.calls.items()}
    sample = objects.sample(job.sample)
    format = None if job.out is None else files.format_for(job.out, job.formats[1]).name
    if format == "eqx" and framework_of(target) != "Equinox":
        raise UsageError(f"--out {job.out}: the format eqx holds models of Equinox, but {job.target} is none.")
    console, progress = report.console(), Console(stderr=True)
    with progress.status("Reading"):
        values = _values(job, source, calls, sample)
    with progress.status("Moving, and comparing the two models"):
        moved = _moved(job, _saved(source).filled(source, values), target, calls, sample)
    report.show(moved.report, console)
    written = None if format is None else _saved(target).stored(moved, format)
    report.show_dtypes(values, written, console)
    if not job.options["prove"]:
        console.print("The two models were not compared.", highlight=False)
    elif not moved.report.proved:
        _fail("the two models don't compute the same.", 1)
    holds = moved.report.proved or not job.options["prove"]
    if job.out is not None and (holds or job.write_anyway):
        files.write(job.out, written, format=format)
        console.print(f"Written: {job.out}", soft_wrap=True, highlight=False, markup=False)
    else:
        console.print("Nothing is written.", highlight=False)
    return 0 if holds else 1


def _moved(job: Job, source: Any, target: Any, calls: Mapping[str, Any], sample: Sequence[Any]) -> Migration:
    """Migrates, and says of an error of the user's own code where it is."""
    try:
        return cv.migrate(source, target, *sample, **calls, mapping=job.mapping, check=False, **job.options)
    except cv.MigrationError as error:
        if isinstance(error.report, Report):
            report.show(error.report, report.console())
        raise
    except cv.CrossVJPError:
        raise
    except Exception as error:
        traceback.print_exc()
        raise cv.MigrationError(
            "One of the models could not be run; the lines above say where. Nothing is written."
        ) from error


def _check_target(out: Path, format: str | None) -> None:
    """Finds out before all work whether the file can be written."""
    files.refuse_existing(out)
    if not out.parent.is_dir():
        raise UsageError(f"--out {out}: there is no folder {str(out.parent)!r}.")
    try:
        files.format_for(out, format).load()
    except files.FileError as error:
        raise UsageError(f"--out {out}: {error}") from None


def _values(job: Job, source: Any, calls: Mapping[str, Any], sample: Sequence[Any]) -> Any:
    """Reads the file into the places that the source has."""
    saved = _saved(source)
    like = saved.like(source, calls["source_train"] or calls["source_call"], sample)
    ignore = [*job.ignore, *saved.unread(source)]
    return jax.tree.map(_on_device, files.read(job.params, like, format=job.formats[0], ignore=ignore))


def _on_device(leaf: Any) -> Any:
    if not isinstance(leaf, np.ndarray | np.generic):
        return leaf
    if jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype:
        raise files.FileError(
            f"The file has arrays of {leaf.dtype}, which JAX would cut to {jax.dtypes.canonicalize_dtype(leaf.dtype)}. "
            "Set the environment variable JAX_ENABLE_X64=1."
        )
    return jnp.asarray(leaf)


def _saved(model: Any) -> Any:
    """Imports what is known of the files of a model's framework."""
    framework = framework_of(model)
    assert framework is not None  # of a model
    return importlib.import_module(f"crossvjp.adapters.migrating.{framework.lower().replace('flax ', '')}")


def _fail(reason: Any, code: int) -> int:
    notes = "".join(f"\n{note}" for note in getattr(reason, "__notes__", []))
    print(f"crossvjp migrate: {reason}{notes}", file=sys.stderr)
    return code
