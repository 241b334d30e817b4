"""Hashing of sources in a second thread while the output is made of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from ..io.behind import Together
from .checkpoint import SourceFile
from .writers.background import Later


def hash_beside_readers(files: Sequence[SourceFile]) -> None:
    """Begin to hash files. If they have to come from the disk, who hashes and who reads them for
    the output stay near each other, so that they come once."""
    together = Together() if any(file.comes_from_disk for file in files) else None
    for file in files:
        file.together = together
    Later(partial(_hash, files, together))


def _hash(files: Sequence[SourceFile], together: Together | None) -> None:
    try:
        for file in files:
            file.sha256(beside=together)
    finally:
        if together is not None:
            together.part()
