"""`weightport diff`."""

from __future__ import annotations

import argparse

from ..mappings.families import NAMES
from . import without_blas
from .terminal import print_result, progress_bar


def add(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes to its parser."""
    parser.description = (
        "Compare two checkpoints in canonical form, tensor by tensor. Exit status 1 if they differ."
    )
    parser.add_argument(
        "a", metavar="A", help="Keras file or folder, .ckpt, .safetensors, or diffusers repo"
    )
    parser.add_argument("b", metavar="B", help="another one, in any layout")
    parser.add_argument("--family", choices=NAMES, help="where the tensors leave a choice")
    parser.add_argument(
        "--ema", action="store_true", help="compare the moving averages of original checkpoints"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    without_blas()
    from ..api import diff
    from ..converters.compare import describe

    with progress_bar(quiet=False) as progress:
        found = diff(
            arguments.a, arguments.b, family=arguments.family, ema=arguments.ema, progress=progress
        )
    print_result(found.to_dict, describe(found), arguments)
    return 1 if found.differences or found.families[0] != found.families[1] else 0
