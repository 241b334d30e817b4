"""Files appear whole or not at all: written beside their place, synced to the disk, then renamed into it."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def placed(folder: str | os.PathLike[str], stale: Iterable[str] = ()) -> Iterator[Path]:
    """An empty folder to write into; when the block ends its files move to `folder`, replacing those of their names.

    If the block raises, `folder` stays as it was. A `model_index.json` at the top moves last, as it names the others.
    Files of `folder` named in `stale`, by paths in it, are removed in the end unless they were written anew.

    Raises:
        OSError: `folder` is a file, or cannot be written.
    """
    place = Path(folder).expanduser().absolute()
    if place.exists() and not place.is_dir():
        raise OSError(f"{place}: not a folder")
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{place.name}.", suffix=".partial", dir=place.parent) as name:
        staging = Path(name) / place.name
        staging.mkdir()
        yield staging
        written = {path.relative_to(staging).as_posix() for path in staging.rglob("*")}
        for name in (*written, "."):
            _sync(staging / name)
        if place.exists():
            _merge(staging, place)
        else:
            staging.rename(place)
        for name in set(stale) - written:
            (place / name).unlink()
        _sync(place.parent)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object as diffusers does, keys sorted."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _merge(source: Path, target: Path) -> None:
    for path in sorted(source.iterdir(), key=lambda path: path.name == "model_index.json"):
        place = target / path.name
        if path.is_dir() and place.is_dir():
            _merge(path, place)
        else:
            path.replace(place)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # some file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)
