"""`weightport parity`."""

from __future__ import annotations

import argparse

from ..converters.settings import COMPONENTS
from .terminal import print_result, progress_bar


def add(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes to its parser."""
    parser.description = (
        "Run a converted repo and the framework that its weights came from on the same inputs,"
        " one process after the other, and compare weights and outputs. Exit status 1 if a"
        " check fails."
    )
    option = parser.add_argument
    option("repo", metavar="REPO", help="the converted diffusers repo")
    other = parser.add_mutually_exclusive_group(required=True)
    other.add_argument(
        "--source", nargs="+", metavar="FILE", default=[], help="the files it was converted from"
    )
    other.add_argument(
        "--against", choices=["diffusers"], help="compare with diffusers on the same repo"
    )
    option(
        "--source-python",
        metavar="PYTHON",
        help="the interpreter that has the source framework (default: this one)",
    )
    option("--ema", action="store_true", help="it was converted with --ema")
    option("--component", choices=COMPONENTS, help="compare only this one")
    option(
        "--layers",
        action="store_true",
        help="record the error after every module, not only where a check fails",
    )
    option(
        "--dtype",
        choices=["float32", "float64"],
        default="float32",
        help="to compute in (default: float32)",
    )
    option("--image-size", type=int, default=128, metavar="PIXELS", help="default: 128")
    option(
        "--no-images",
        action="store_false",
        dest="images",
        help="do not run KerasCV's generate_image",
    )
    option("-o", "--output", metavar="FOLDER", help="receives parity.html and parity.json")
    option("-q", "--quiet", action="store_true", help="print errors only")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    from ..api import parity
    from ..parity.report import describe

    python = {"source_python": arguments.source_python} if arguments.source_python else {}
    with progress_bar(arguments.quiet, unit=" checks") as progress:
        found = parity(
            arguments.repo,
            arguments.source,
            component=arguments.component,
            ema=arguments.ema,
            layers=arguments.layers,
            dtype=arguments.dtype,
            image_size=arguments.image_size,
            images=arguments.images,
            report=arguments.output,
            progress=progress,
            **python,
        )
    print_result(found.to_dict, describe(found), arguments)
    return 0 if found.passed else 1
