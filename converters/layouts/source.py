"""What a user names, and how it is to be read."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from ...adapters.marks import CONFIG, is_adapter, is_embedding
from ...mappings.facts import facts
from ..checkpoint import Checkpoint
from ..readers.listed import KINDS, read_listed
from ..readers.signatures import is_picture
from ..readers.sniff import KERAS, sniff
from .foreign import refuse_file
from .groups import Split, split
from .scales import unscaled

if TYPE_CHECKING:
    from .keras_saves import KerasFile


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
        return unscaled(read_listed(self.path, self.kind)) if self.kind in KINDS else None

    @cached_property
    def saved(self) -> KerasFile | None:
        """The variables of a file of Keras; None for others."""
        if self.kind not in KERAS:
            return None
        from .keras_saves import read_keras

        return read_keras(self.path, self.kind)

    @cached_property
    def is_adapter(self) -> bool:
        """Whether it changes a model: a file that does, or a folder that PEFT saved."""
        if self.path.is_dir():
            return (self.path / CONFIG).is_file()
        return self.raw is not None and is_adapter(self.raw.tensors)

    @cached_property
    def is_embedding(self) -> bool:
        """Whether it is words for models and no more."""
        if self.path.is_dir():
            return bool(learned_in(self.path))
        if is_picture(self.path):
            from ..readers.embedding_image import read_embedding_image

            return read_embedding_image(self.path) is not None
        return self.raw is not None and is_embedding(self.raw.tensors)

    @cached_property
    def split(self) -> Split:
        """The names of such a file, taken apart."""
        return split(self.raw.tensors if self.raw else {})


def learned_in(folder: Path) -> list[Path]:
    """The words in a folder of diffusers' training scripts."""
    names = facts("embeddings")["folder"]["names"]
    return [folder / name for name in names if (folder / name).is_file()]
