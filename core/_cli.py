"""The command `crossvjp`. What a subcommand needs is imported when it runs."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ._cli_files import add_migrate, add_show

_FRAMEWORKS = ("linen", "nnx", "haiku", "equinox")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: the arguments; those of the process by default.

    Returns:
        The exit code: 0 for success, 1 if the frameworks disagree or parameters can't be moved, 2 if a package or
        a file is missing.

    Raises:
        SystemExit: an argument is wrong, with code 2; or help was asked for, with code 0.
    """
    parser = argparse.ArgumentParser(
        prog="crossvjp",
        description="Write a backward rule once; run it in Flax Linen, Flax NNX, Haiku, Equinox and plain JAX.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_tour(commands.add_parser)
    add_migrate(commands.add_parser)
    add_show(commands.add_parser)
    options = parser.parse_args(argv)
    return options.run(options)


def _add_tour(add_parser: Callable[..., argparse.ArgumentParser]) -> None:
    summary = "train one small network on handwritten digits, in five frameworks, under the same rule object"
    tour = add_parser(
        "tour",
        help=summary,
        description=f"{summary.capitalize()}. Prints a table, writes a plot, and ends with code 1 if they disagree.",
    )
    tour.add_argument(
        "--steps",
        type=_integer(1, 10**6),
        default=300,
        metavar="N",
        help="training steps in each framework; 300 by default",
    )
    tour.add_argument(
        "--seed",
        type=_integer(0, 2**32 - 1),
        default=0,
        metavar="N",
        help="of arrays, batches and dropout keys; 0 by default",
    )
    tour.add_argument(
        "--out", type=Path, default=Path("tour-out"), metavar="FOLDER", help="folder for the plot; tour-out by default"
    )
    tour.add_argument(
        "--frameworks",
        nargs="+",
        choices=_FRAMEWORKS,
        default=_FRAMEWORKS,
        metavar="NAME",
        help=f"which to compare with plain JAX: {', '.join(_FRAMEWORKS)}; all by default",
    )
    tour.set_defaults(run=lambda options: _tour(options, tour))


def _tour(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    try:
        command = importlib.import_module("crossvjp.tour.command")
        starts = command.load(list(dict.fromkeys(options.frameworks)))
    except ModuleNotFoundError as error:
        package = (error.name or str(error)).partition(".")[0]
        print(
            f"crossvjp tour: the package {package!r} is missing or too old. Install what the tour needs with\n"
            '    pip install "crossvjp[tour]"',
            file=sys.stderr,
        )
        return 2
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: can't make the folder {str(options.out)!r}: {error.strerror}")
    if not os.access(options.out, os.W_OK):
        parser.error(f"argument --out: can't write into the folder {str(options.out)!r}")
    return command.run(starts, command.Plan(options.steps, options.seed), options.out)


def _integer(least: int, most: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"must be an integer from {least} to {most}, but is {text!r}")
        return value

    return parse
