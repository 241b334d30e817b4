"""`weightport convert`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
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
        help="the repo, .safetensors (--to ldm), .weights.h5 or .h5 (--to kerascv)",
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

    with progress_bar(arguments.quiet) as progress:
        conversion = convert(
            arguments.sources,
            arguments.output,
            base=arguments.base,
            progress=progress,
            **given(arguments, Settings),
        )
    print_result(lambda: _summary(conversion), _conversion_lines(conversion), arguments)
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


def _conversion_lines(conversion: Conversion) -> Iterator[str]:
    for name, component in conversion.components.items():
        for part in component.parts:
            source = part.checkpoint
            of_which = f" ({part.part})" if part.part != name else ""
            yield (
                f"{name:<13} {len(source.tensors):>5} tensors{of_which} from {source.path},"
                f" {source.format}"
            )
    yield from (f"note: {note}" for note in conversion.notes)
    yield from (f"lacks: {gap}" for gap in conversion.lacks)
    yield (
        f"wrote {conversion.output}"
        if conversion.output
        else "dry run: everything fits, nothing was written"
    )
