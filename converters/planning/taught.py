"""What became of the words that a model was taught."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint import Checkpoint


@dataclass(frozen=True)
class Taught:
    """Words that text encoders got.

    Attributes:
        path: of the embedding.
        tokens: text encoder -> token -> its row.
        left_out: what no text encoder took, by the user's leave.
    """

    path: Path
    checkpoints: tuple[Checkpoint, ...]
    tokens: Mapping[str, Mapping[str, int]]
    left_out: tuple[str, ...]
    notes: tuple[str, ...]

    def report(self, hashes: bool) -> dict[str, Any]:
        """What `conversion.json` says of them."""
        files = [file for one in self.checkpoints for file in one.files]
        return {
            "path": self.path.name,
            "files": {file.path.name: file.sha256() for file in files} if hashes else {},
            "tokens": {name: dict(rows) for name, rows in self.tokens.items()},
            "left_out": list(self.left_out),
        }
