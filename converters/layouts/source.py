"""What a user names, and how it is to be read."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ...adapters.modules import is_adapter
from ..checkpoint import Checkpoint
from ..readers.safetensors import read_safetensors
from ..readers.sniff import sniff
from ..readers.torch_file import read_torch
from .foreign import refuse_file
from .groups import Split, split
from .keras_saves import KerasFile, read_keras
from .scales import unscaled

_BARE = {"safetensors": read_safetensors, "torch": read_torch}


@dataclass(frozen=True)
class Source:
    """A file or folder, opened when it is asked for.

    Attributes:
        lora_alpha: LoRA factors inside a model are merged with it; they are refused without.
        ema: take the moving average of the weights.
        revision: of the Hub, where the path is the folder of a repository in its cache.
    """

    path: Path
    lora_alpha: float | None = None
    ema: bool = False
    revision: str | None = None

    @cached_property
    def kind(self) -> str:
        """What its content is, see `sniff`.

        Raises:
            ConversionError: nothing that is read.
        """
        kind = sniff(self.path)
        if kind == "unknown":
            refuse_file(self.path)
        return kind

    @cached_property
    def raw(self) -> Checkpoint | None:
        """The tensors of a file that merely lists them, under its own keys; None for others."""
        read = _BARE.get(self.kind)
        return unscaled(read(self.path)) if read else None

    @cached_property
    def saved(self) -> KerasFile | None:
        """The variables of a file of Keras; None for others."""
        return read_keras(self.path, self.kind)

    @cached_property
    def is_adapter(self) -> bool:
        """Whether such a file changes a model."""
        return self.raw is not None and is_adapter(self.raw.tensors)

    @cached_property
    def split(self) -> Split:
        """The names of such a file, taken apart."""
        return split(self.raw.tensors if self.raw else {})
