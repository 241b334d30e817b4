"""`weightport inspect`."""

from __future__ import annotations

import argparse

from ..mappings import families
from . import without_blas
from .terminal import print_result


def add(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes to its parser."""
    parser.description = "Say what a checkpoint holds, from its headers alone."
    parser.add_argument(
        "file",
        metavar="FILE",
        help="Keras file, TensorFlow or SavedModel folder, diffusers repo, LoRA, or embedding",
    )
    parser.add_argument(
        "--family", choices=families.NAMES, help="of an adapter, where it fits several"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    without_blas()
    from ..api import inspect
    from ..converters.inspection_description import describe

    inspection = inspect(arguments.file, family=arguments.family)
    print_result(inspection.to_dict, describe(inspection), arguments)
    return 0
