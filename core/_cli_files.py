"""The commands `crossvjp migrate` and `crossvjp show`: their arguments. What they do is imported when they run."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_FORMATS = ("pickle", "npz", "safetensors", "msgpack", "eqx", "orbax")
_CALLS = ("source_call", "target_call", "source_train", "target_train")
_EXTRAS = {"flax": "flax", "orbax": "flax", "msgpack": "flax", "haiku": "haiku", "equinox": "equinox"}

_MIGRATE = """Converts saved parameters of a model into those of the same model in another framework. Prints which layer
went where and how far the two models' outputs, gradients and training are apart, and writes the new file if they are
the same. MODEL is package.module:name or file.py:name, a model (an unbound Linen module, hk.transform or
hk.transform_with_state of a function, an NNX or Equinox module, or (module, state)) or a function without arguments
that makes it. Never overwrites a file. Ends with code 0, with 1 if the models differ or the layers or the file don't
fit, or with 2 if an argument is wrong or a package is missing."""


def add_migrate(add_parser: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds the command `migrate`."""
    parser = add_parser("migrate", help="convert saved parameters for another framework", description=_MIGRATE)
    parser.add_argument("params", type=Path, metavar="PARAMS", help="the saved parameters; for Orbax a folder")
    parser.add_argument("--source", required=True, metavar="MODEL", help="the model that they are of")
    parser.add_argument("--target", required=True, metavar="MODEL", help="the model that they are to go to")
    parser.add_argument(
        "--sample",
        required=True,
        nargs="+",
        metavar="ARRAY",
        help="what both are called with: float32[2,8] for a random array, or module:name of an array, a tuple of "
        "arguments, or a function that makes them",
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", type=Path, metavar="FILE", help="the new file, by whose suffix its format is chosen")
    where.add_argument("--dry-run", action="store_true", help="write nothing")
    parser.add_argument("--from-format", choices=_FORMATS, help="of PARAMS; found out by its content if left out")
    parser.add_argument("--to-format", choices=_FORMATS, help="of FILE; by its suffix if left out")
    parser.add_argument(
        "--mapping",
        nargs="+",
        type=_pair,
        default=[],
        metavar="SOURCE=TARGET",
        help="layers that are paired so, by their paths in the table; `SOURCE=` is left behind",
    )
    parser.add_argument(
        "--ignore", nargs="+", default=[], metavar="GLOB", help="what in PARAMS is no parameter: 'opt_state/*'"
    )
    for name in _CALLS:
        side, _, when = name.partition("_")
        while_training = "while training, if not by its call" if when == "train" else "if not by `mdl(*sample)`"
        parser.add_argument(
            f"--{side}-{when}",
            metavar="FUNCTION",
            help=f"module:name of `(mdl, *sample) -> y`, by which the {side} is called {while_training}",
        )
    parser.add_argument(
        "--tolerance",
        type=_positive,
        metavar="X",
        help="how far figures may be apart, in units of an array's largest entry",
    )
    parser.add_argument(
        "--steps", type=_count, default=3, metavar="N", help="of training that are compared; 3 by default"
    )
    parser.add_argument("--no-proof", action="store_true", help="compare nothing: convert the layers, and write")
    parser.add_argument("--write-anyway", action="store_true", help="write even if the models differ; ends with code 1")
    parser.set_defaults(run=_migrate)


def add_show(add_parser: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds the command `show`."""
    summary = "list what a file of parameters holds: paths, shapes, dtypes"
    parser = add_parser("show", help=summary, description=f"{summary.capitalize()}. No model is needed.")
    parser.add_argument("file", type=Path, metavar="FILE", help=f"one of {', '.join(_FORMATS)}; for Orbax a folder")
    parser.add_argument("--format", choices=_FORMATS, help="found out by its content")
    parser.set_defaults(run=_show)


def _migrate(options: argparse.Namespace) -> int:
    def run() -> int:
        command = importlib.import_module("crossvjp.adapters.migrating.command")
        job = command.Job(
            params=options.params,
            source=options.source,
            target=options.target,
            sample=options.sample,
            out=options.out,
            formats=(options.from_format, options.to_format),
            calls={name: getattr(options, name) for name in _CALLS},
            mapping=dict(options.mapping),
            ignore=options.ignore,
            options={"tolerance": options.tolerance, "steps": options.steps, "prove": not options.no_proof},
            write_anyway=options.write_anyway,
        )
        return command.run(job)

    return _with_packages("migrate", run)


def _show(options: argparse.Namespace) -> int:
    def run() -> int:
        listing = importlib.import_module("crossvjp.adapters.migrating.listing")
        return listing.run(options.file, options.format)

    return _with_packages("show", run)


def _with_packages(command: str, run: Callable[[], int]) -> int:
    """Runs a command; a package that it lacks is named with what installs it."""
    try:
        return run()
    except ModuleNotFoundError as error:
        package = (error.name or str(error)).partition(".")[0]
        print(
            f"crossvjp {command}: the package {package!r} is missing or too old. Install what is needed with\n"
            f'    pip install "crossvjp[{_EXTRAS.get(package, "files")}]"',
            file=sys.stderr,
        )
        return 2


def _pair(text: str) -> tuple[str, str | None]:
    source, equals, target = text.partition("=")
    if not equals or not source:
        raise argparse.ArgumentTypeError(f"must be SOURCE=TARGET, but is {text!r}")
    return source, target or None


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be an integer from 0 on, but is {text!r}")
    return int(text)


def _positive(text: str) -> Any:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be a number above 0, but is {text!r}")
    return value
