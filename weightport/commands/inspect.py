"""`weightport inspect`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from . import without_blas
from .terminal import print_result, size

if TYPE_CHECKING:
    from ..api import Inspection


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the parser."""
    parser = commands.add_parser(
        "inspect",
        parents=[common],
        help="what a file holds and what would become of it",
        description="Say what a checkpoint holds, from its headers alone.",
    )
    parser.add_argument(
        "file",
        metavar="FILE",
        help="Keras file, TensorFlow or SavedModel folder, or diffusers repo",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    without_blas()
    from ..api import inspect

    inspection = inspect(arguments.file)
    print_result(inspection.to_dict(), _inspection_lines(inspection), arguments)
    return 0


def _inspection_lines(inspection: Inspection) -> Iterator[str]:
    yield inspection.path
    for part in inspection.parts:
        mixed = len(part.dtypes) > 1
        dtypes = ", ".join(
            f"{dtype} ({count})" if mixed else dtype for dtype, count in part.dtypes.items()
        )
        yield ""
        yield f"{part.root or part.part}: {part.count} tensors, {size(part.nbytes)}, {dtypes}"
        yield f"  format      {part.format}"
        yield (
            "  part       "
            f" {part.part}{' of ' + ' or '.join(part.families) if part.families else ''}"
        )
        yield from (
            f"  {'because' if index == 0 else '':<11} {fact}"
            for index, fact in enumerate(part.evidence)
        )
        yield f"  becomes     {part.becomes}"
        yield from (
            f"  skipped     {count} tensors: {reason}" for reason, count in part.skipped.items()
        )
        for title, keys in (("missing", part.missing), ("unexpected", part.unexpected)):
            yield from (f"  {title:<11} {key}" for key in _some(keys))
        for pattern, count, dtype, nbytes in part.tensors:
            yield f"    {count:>4} x {pattern}  {dtype}  {size(nbytes)}"


def _some(keys: Sequence[str], limit: int = 20) -> list[str]:
    from ..converters.planning.keys import collapse

    patterns = [
        f"{pattern} ({len(group)})" if len(group) > 1 else pattern
        for pattern, group in collapse(keys)
    ]
    return (
        patterns
        if len(patterns) <= limit
        else [*patterns[:limit], f"... and {len(patterns) - limit} more patterns"]
    )
