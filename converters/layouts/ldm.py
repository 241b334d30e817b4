"""Original Stable Diffusion checkpoints: files of tensors of which some have original names."""

from __future__ import annotations

from ..checkpoint import Checkpoint
from .single_file import parts_of
from .source import Source


def reads(source: Source) -> bool:
    """Whether this is a file of tensors, some of them under original names."""
    return source.raw is not None and source.split.layout == "ldm"


def parts(source: Source) -> list[Checkpoint]:
    """The parts of an original checkpoint; tensors that belong to none of them as an unknown one.

    Raises:
        ConversionError: no tensor at all belongs to a model.
    """
    return parts_of(source)
