"""Where TensorFlow's checkpoints ("tensor bundles") lie: which of a folder's files a path means."""

from __future__ import annotations

import re
from contextlib import closing
from pathlib import Path

from ...errors import ConversionError, printable
from ..checkpoint import SourceFile
from .signatures import LEVELDB

_MAX_STATE = 1 << 22  # bytes of a `checkpoint` file


def find_bundle(path: Path) -> Path | None:
    """The prefix of the bundle that `path` names, or None.

    `path` is an index or data file, a prefix, a SavedModel or export directory, or a directory with
    one checkpoint or with a `checkpoint` file, which names the newest of several.

    Raises:
        ConversionError: a directory holds several checkpoints, or its `checkpoint` file names one
            elsewhere.
    """
    if path.is_dir():
        if _is_index(path / "variables" / "variables.index"):
            return path / "variables" / "variables"
        indexes = sorted(index for index in path.glob("*.index") if _is_index(index))
        return _choose(path, {index.stem: index.with_suffix("") for index in indexes})
    prefix = path.with_name(re.sub(r"(?<=.)\.(index|data-\d{5}-of-\d{5})$", "", path.name))
    return prefix if _is_index(index_path(prefix)) else None


def index_path(prefix: Path) -> Path:
    """Where the index of a bundle lies."""
    return prefix.with_name(prefix.name + ".index")


def _is_index(path: Path) -> bool:
    if not path.is_file():
        return False
    with closing(SourceFile(path)) as file:
        end = file.size - len(LEVELDB)
        return end >= 0 and file.read(end, len(LEVELDB)) == LEVELDB


def _choose(folder: Path, prefixes: dict[str, Path]) -> Path | None:
    """The only checkpoint of a folder, or the one that its `checkpoint` file (`CheckpointState`, as
    text) calls newest.

    The name is looked up among the folder's own checkpoints, so it cannot lead elsewhere.
    """
    if len(prefixes) == 1:
        return next(iter(prefixes.values()))
    state = folder / "checkpoint"
    newest = _newest(state) if state.is_file() else None
    if newest in prefixes:
        return prefixes[newest]
    if newest is not None:
        raise ConversionError(
            f"{state}: names {printable(newest)}, no checkpoint of this folder; name an .index file"
        )
    if prefixes:
        raise ConversionError(
            f"{folder}: holds several checkpoints; name one of {printable(', '.join(prefixes))}"
        )
    return None


def _newest(state: Path) -> str | None:
    with closing(SourceFile(state)) as file:
        found = re.match(
            rb'model_checkpoint_path: "([^"]*)"', file.read(0, min(file.size, _MAX_STATE))
        )
    return found[1].decode(errors="replace") if found else None
