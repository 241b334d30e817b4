"""Weights in several files, and the index that says which tensor lies in which."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ...errors import ConversionError, printable
from ...io.documents import read_json
from ...io.weight_files import read_index
from ..checkpoint import Checkpoint, SourceFile, Tensor


def read_shards(path: Path, suffix: str, read: Callable[[Path], Checkpoint]) -> Checkpoint:
    """The tensors of all shards, in the order of the shards.

    Args:
        path: the index, which must say exactly where each tensor is.
        suffix: of the shards.
        read: reads one of them.

    Raises:
        ConversionError: a shard is missing or damaged, or does not hold what the index says.
    """
    files = [SourceFile(path)]
    try:
        return _read(files, suffix, read)
    except BaseException:
        for file in files:
            file.close()
        raise


def _read(files: list[SourceFile], suffix: str, read: Callable[[Path], Checkpoint]) -> Checkpoint:
    """The checkpoint; the files of the shards go to `files`, whose first is the index."""
    path = files[0].path
    try:
        weight_map = read_index(read_json(path), suffix)
    except ValueError as error:
        raise ConversionError(f"{path}: {error}") from None
    tensors: dict[str, Tensor] = {}
    skipped: dict[str, str] = {}
    classes: set[str] = set()
    listed: dict[str, set[str]] = {}
    for key, name in weight_map.items():
        listed.setdefault(name, set()).add(key)
    for name, keys in sorted(listed.items()):
        if not (path.parent / name).exists():
            raise ConversionError(f"{path}: shard `{name}` is missing; download it again")
        shard = read(path.parent / name)
        files += shard.files
        for key in sorted(keys ^ shard.tensors.keys()):
            how = "does not hold" if key in keys else "also holds"
            raise ConversionError(
                f"{path}: shard `{name}` {how} `{printable(key)}`, against what the index says"
            )
        tensors |= shard.tensors
        skipped |= shard.skipped
        classes |= set(shard.ignored_classes)
    return Checkpoint(
        path,
        f"sharded {shard.format}",
        tensors,
        skipped=skipped,
        files=files,
        ignored_classes=sorted(classes),
    )
