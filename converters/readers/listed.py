"""Files that merely list tensors; what reads a kind of them is imported for the first one."""

from __future__ import annotations

from pathlib import Path

from ..checkpoint import Checkpoint

KINDS = ("safetensors", "torch")
"""See `sniff`."""
NAMED = {".safetensors": "safetensors", ".bin": "torch"}
"""What the files in folders of other programs end in -> the kind that those write under it."""


def read_listed(path: Path, kind: str) -> Checkpoint:
    """The tensors of a file of one of `KINDS`; none is read yet.

    Raises:
        ConversionError: it is damaged, ambiguous or malicious.
    """
    if kind == "torch":
        from .torch_file import read_torch

        return read_torch(path)
    from .safetensors import read_safetensors

    return read_safetensors(path)
