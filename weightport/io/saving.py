"""Files appear whole or not at all: written beside their place, their content synced, then renamed
into it."""

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
    """An empty folder to write into; when the block ends its files move to `folder`, replacing
    those of their names.

    If the block raises, `folder` stays as it was. A `model_index.json` at the top moves last, as it
    names the others. Files of `folder` named in `stale`, by paths in it, are removed in the end
    unless they were written anew.

    Raises:
        OSError: `folder` is a file, or cannot be written.
    """
    place = Path(folder).expanduser().absolute()
    if place.exists() and not place.is_dir():
        raise OSError(f"{place}: not a folder")
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix=f".{place.name}.", suffix=".partial", dir=place.parent
    ) as name:
        staging = Path(name) / place.name
        staging.mkdir()
        yield staging
        written = {
            path.relative_to(staging).as_posix() for path in staging.rglob("*") if path.is_file()
        }
        for name in written:
            with (staging / name).open("rb") as file:
                os.fsync(file.fileno())
        if not place.exists():
            staging.rename(place)
            return
        for name in sorted(written, key=lambda name: name == "model_index.json"):
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (staging / name).replace(place / name)
        for name in set(stale) - written:
            (place / name).unlink()


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object as diffusers does, keys sorted."""
    path.write_text(
        json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8"
    )
