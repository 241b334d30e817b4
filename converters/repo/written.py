"""What was written, and what was seen in the weights on the way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..writers.safetensors import Written, WrittenFile


@dataclass
class WrittenRepo:
    """A repository that was written.

    Attributes:
        files: path in the repo -> size and sha256, of weights only.
        nonfinite: `component key` -> how many NaN and Inf its source holds.
        overflowed: `component key` -> how many values were too large for the dtype.
        notes: what the user should know, one sentence each.
    """

    files: dict[str, WrittenFile] = field(default_factory=dict)
    nonfinite: dict[str, int] = field(default_factory=dict)
    overflowed: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, component: str, place: str, weights: Written) -> None:
        """Record the weights of a component, which lie in a folder of the repo."""
        self.files |= {str(Path(place, file.name)): file for file in weights.files}
        self.nonfinite |= _named(component, weights.nonfinite)
        self.overflowed |= _named(component, weights.overflow)


def _named(component: str, counts: Mapping[str, int]) -> dict[str, int]:
    return {f"{component} {key}": count for key, count in counts.items()}
