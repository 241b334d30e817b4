"""All that a user names as jobs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import ConversionError, printable
from .jobs import HUB, Entry
from .lists import is_list, read_list, reference
from .shelf import Shelf

_SHOWN = 3  # paths that are named of many


def gather(texts: Sequence[str], results: Path) -> tuple[list[Entry], list[str]]:
    """The jobs that folders, globs, `hub:` names and lists of jobs name, and what is to be said of
    what is none.

    Args:
        results: a folder in which no sources are looked for.

    Raises:
        ConversionError: one names nothing, or cannot be read.
    """
    entries: list[Entry] = []
    paths = []
    for text in texts:
        path = Path(text).expanduser()
        if text.startswith(HUB):
            entries.append(reference(text, text))
        elif is_list(path) and path.is_file():
            entries += read_list(path)
        else:
            paths.append(text)
    shelf = Shelf(results)
    shelf.search(paths)
    entries += shelf.entries
    if not entries:
        raise ConversionError(f"{', '.join(texts)}: holds no checkpoint")
    return entries, [_left(shelf.left)] if shelf.left else []


def _left(paths: Sequence[Path]) -> str:
    shown = ", ".join(printable(path.name, 40) for path in paths[:_SHOWN])
    more = f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else ""
    return f"left out, as no checkpoints: {shown}{more}"
