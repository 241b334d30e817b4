"""What a file of textual inversion holds, from its headers alone."""

from __future__ import annotations

from dataclasses import dataclass

from ..adapters.embeddings import Embedding, fitting, number_of
from ..errors import printable
from ..mappings.facts import facts
from ..mappings.families import families
from .checkpoint import Tensor
from .layouts.embeddings import EmbeddingFile


@dataclass(frozen=True)
class InspectedWord:
    """A word.

    Attributes:
        token: what prompts call it.
        vectors: (which text encoder's, number, width, dtype); the encoder is empty where the width
            tells it.
    """

    token: str
    vectors: tuple[tuple[str, int, int, str], ...]


@dataclass(frozen=True)
class InspectedEmbedding:
    """The words in a file.

    Attributes:
        families: for whose text encoders they are.
        evidence: how they are known, one sentence each.
        format: of the file.
        metadata: what it says beside.
    """

    families: tuple[str, ...]
    evidence: tuple[str, ...]
    format: str
    words: tuple[InspectedWord, ...]
    metadata: dict[str, str]


def inspect_embedding(file: EmbeddingFile) -> InspectedEmbedding:
    """Describe a file of words."""
    found = fitting(file.embeddings)
    names = found.whole or found.halves
    said = file.metadata
    return InspectedEmbedding(
        families=tuple(families()[name].title for name in names),
        evidence=tuple(_evidence(file, found.whole, found.halves)),
        format=file.checkpoints[0].format,
        words=tuple(_word(one) for one in file.embeddings),
        metadata={
            key: printable(said[key]) for key in facts("embeddings")["says"]["keys"] if key in said
        },
    )


def _word(word: Embedding[Tensor]) -> InspectedWord:
    vectors = tuple(
        (role, number_of(one), one.shape[-1], one.dtype) for role, one in word.vectors.items()
    )
    return InspectedWord(printable(word.token), vectors)


def _evidence(file: EmbeddingFile, whole: tuple[str, ...], halves: tuple[str, ...]) -> list[str]:
    """How the families are known, and what is not sure."""
    vectors = [one for word in file.embeddings for one in word.vectors.values()]
    widths = " and ".join(str(width) for width in sorted({one.shape[-1] for one in vectors}))
    evidence = [f"vectors of width {widths}"]
    if whole and halves:
        others = " and ".join(families()[name].title for name in halves)
        evidence.append(f"of {others} they serve one of two text encoders")
    if not file.is_named:
        evidence.append("the file names no word: it is that of its name")
    outputs = [role for word in file.embeddings for role in word.outputs]
    if outputs:
        evidence.append(f"{outputs[0]} takes the place of what the text encoder answers")
    return evidence
