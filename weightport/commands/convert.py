"""`weightport convert`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from ..converters.settings import Settings
from . import without_blas
from .options import add_options, given
from .terminal import print_result, progress_bar

if TYPE_CHECKING:
    from ..converters.conversion import Conversion


def add(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes to its parser."""
    parser.description = (
        "Convert KerasCV files or original checkpoints into a diffusers repo, or a repo into"
        " either."
    )
    option = parser.add_argument
    option(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="Keras file or folder, .ckpt, .safetensors, or diffusers repo",
    )
    option(
        "-o",
        "--output",
        required=True,
        help=(
            "the repo, .safetensors (--to ldm), .weights.h5 (--to kerascv or kerashub) or .h5 (--to"
            " kerascv)"
        ),
    )
    option(
        "--base",
        help=(
            "fills in what the sources lack: a repo, a folder such as ~/.keras/models, or a Hub id"
        ),
    )
    add_options(parser, Settings)
    option("-q", "--quiet", action="store_true", help="print errors only")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    without_blas()
    from ..api import convert
    from ..converters.conversion import describe

    with progress_bar(arguments.quiet) as progress:
        conversion = convert(
            arguments.sources,
            arguments.output,
            base=arguments.base,
            progress=progress,
            **given(arguments, Settings),
        )
    print_result(lambda: _summary(conversion), describe(conversion), arguments)
    return 0


def _summary(conversion: Conversion) -> dict[str, Any]:
    return {
        "family": conversion.family,
        "components": {name: len(c.tensors) for name, c in conversion.components.items()},
        "output": str(conversion.output) if conversion.output else None,
        "lacks": conversion.lacks,
        "notes": conversion.notes,
        "regenerated": conversion.report.get("regenerated", {}),
        "files": conversion.report.get("files", {}),
    }
