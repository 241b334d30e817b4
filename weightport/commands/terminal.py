"""What the commands show: lines on stdout, a progress bar on a terminal."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any


@contextlib.contextmanager
def progress_bar(quiet: bool, unit: str = "B") -> Iterator[Any]:
    """A bar on a terminal, nothing in a pipe; the callback takes (units just done, units in
    all)."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    with tqdm(unit=unit, unit_scale=unit == "B", leave=False, delay=0.5) as bar:

        def step(done: int, total: int) -> None:
            bar.total = total
            bar.update(done)

        yield step


def print_result(
    content: Callable[[], dict[str, Any]], lines: Iterable[str], arguments: argparse.Namespace
) -> None:
    """What a command found: as JSON with `--json`, else for people, and with `--quiet`, if it has
    that, not at all."""
    if arguments.json:
        print(json.dumps(content(), indent=2))
    elif not getattr(arguments, "quiet", False):
        print_lines(lines)


def print_lines(lines: Iterable[str]) -> None:
    """Print lines in which names of files and tensors cannot control the terminal."""
    from ..errors import printable

    sys.stdout.writelines(f"{printable(line, limit=10_000)}\n" for line in lines)
