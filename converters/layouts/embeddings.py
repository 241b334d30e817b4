"""Files of textual inversion: pickles, safetensors, pictures, folders, and files of LoRA."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ...adapters.embeddings import Embedding, is_embedding, read_embeddings
from ...adapters.modules import BUNDLED
from ...errors import ConversionError
from ...mappings.facts import facts
from ..checkpoint import Checkpoint, Tensor
from ..readers.embedding_image import is_picture, read_embedding_image
from ..readers.safetensors import read_safetensors
from ..readers.torch_file import read_torch
from . import adapters
from .source import Source

_READERS = {".safetensors": read_safetensors, ".bin": read_torch}


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


def reads(source: Source) -> bool:
    """Whether a path is words for models and no more."""
    path = source.path
    if path.is_dir():
        return bool(_learned(path))
    if is_picture(path):
        return read_embedding_image(path) is not None
    return source.raw is not None and is_embedding(source.raw.tensors)


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
    if not is_image and not is_embedding(tensors) and adapters.reads(source):
        tensors = {name: one for name, one in tensors.items() if name.startswith(BUNDLED)}
    return _of(path, [checkpoint], [_words(checkpoint, tensors)])


def refuse_embedding(source: Source) -> None:
    """Refuse words where a model is expected.

    Raises:
        ConversionError: it is some; says what to do with them.
    """
    if reads(source):
        raise ConversionError(
            f"{source.path}: a textual inversion, new words for a model rather than a model; put it"
            " into one with `weightport convert MODEL --embedding FILE`, or write it for another"
            " program: `--to diffusers`, `--to a1111`, ..."
        )


def _learned(folder: Path) -> list[Path]:
    """The files in a folder of diffusers' training scripts."""
    names = facts("embeddings")["folder"]["names"]
    return [folder / name for name in names if (folder / name).is_file()]


def _folder(folder: Path) -> EmbeddingFile:
    files = _learned(folder)
    if not files:
        raise ConversionError(f"{folder}: holds no embedding")
    stems = {path.stem: path for path in reversed(files)}  # safetensors before the same as a pickle
    checkpoints = [_READERS[path.suffix](path) for _, path in sorted(stems.items())]
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
