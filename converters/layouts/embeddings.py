"""Files of textual inversion: pickles, safetensors, pictures, folders, and files of LoRA."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ...adapters.embeddings import Embedding, read_embeddings
from ...adapters.marks import BUNDLED, is_embedding
from ...errors import ConversionError
from ...mappings.facts import facts
from ..checkpoint import Checkpoint, Tensor
from ..readers.embedding_image import read_embedding_image
from ..readers.listed import NAMED, read_listed
from ..readers.signatures import is_picture
from .source import Source, learned_in


@dataclass(frozen=True)
class EmbeddingFile:
    """Words, and where they lie.

    Attributes:
        path: what the user named.
        embeddings: the words, in the order of the file.
        is_named: whether the file says its words, rather than its name.
        checkpoints: the files that were read.
    """

    path: Path
    embeddings: tuple[Embedding[Tensor], ...]
    is_named: bool
    checkpoints: tuple[Checkpoint, ...]

    @property
    def metadata(self) -> Mapping[str, str]:
        """What the first file says beside its vectors."""
        return self.checkpoints[0].metadata

    def check_unchanged(self) -> None:
        """Raise ConversionError if a file was modified since it was opened."""
        for one in self.checkpoints:
            one.check_unchanged()


def open_embeddings(source: Source) -> EmbeddingFile:
    """The words in a file or folder; those in a file of LoRA too.

    Raises:
        ConversionError: it cannot be read, or holds none.
    """
    path = source.path
    if path.is_dir():
        return _folder(path)
    is_image = is_picture(path)
    checkpoint = read_embedding_image(path) if is_image else source.raw
    if checkpoint is None:
        raise ConversionError(f"{path}: holds no embedding")
    tensors = checkpoint.tensors
    if not is_image and not is_embedding(tensors) and source.is_adapter:
        tensors = {name: one for name, one in tensors.items() if name.startswith(BUNDLED)}
    return _of(path, [checkpoint], [_words(checkpoint, tensors)])


def _folder(folder: Path) -> EmbeddingFile:
    files = learned_in(folder)
    if not files:
        raise ConversionError(f"{folder}: holds no embedding")
    stems = {path.stem: path for path in reversed(files)}  # safetensors before the same as a pickle
    checkpoints = [read_listed(path, NAMED[path.suffix]) for _, path in sorted(stems.items())]
    return _of(folder, checkpoints, [_words(one, one.tensors) for one in checkpoints])


def _words(checkpoint: Checkpoint, tensors: Mapping[str, Tensor]) -> list[Embedding[Tensor]]:
    """The words of a file; one without a token has none yet."""
    try:
        found = read_embeddings(tensors)
    except ValueError as error:
        raise ConversionError(f"{checkpoint.path}: {error}") from None
    for word in found:
        for tensor in word.vectors.values():
            if tensor.dtype not in ("F64", "F32", "F16", "BF16"):
                raise ConversionError(
                    f"{checkpoint.path}: `{tensor.name}` holds {tensor.dtype}, which are no vectors"
                )
    return found


def _of(
    path: Path, checkpoints: list[Checkpoint], words: Iterable[list[Embedding[Tensor]]]
) -> EmbeddingFile:
    """The words of all files of a folder, each by its token; files have their name for one."""
    said = checkpoints[0].metadata.get(facts("embeddings")["says"]["token"], "")
    joined: dict[str, Embedding[Tensor]] = {}
    is_named = True
    for found in words:
        for word in found:
            is_named &= bool(word.token or said)
            token = word.token or said or path.stem
            if token in joined:
                both = joined[token].for_encoders() | word.for_encoders()
                joined[token] = Embedding(token, both)
            else:
                joined[token] = Embedding(token, word.vectors)
    return EmbeddingFile(path, tuple(joined.values()), is_named, tuple(checkpoints))
