"""What the card of an adapter or embedding alone says, from what is in the file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..adapters.embeddings import fitting, number_of
from ..mappings.families import families
from .adapter_inspection import InspectedAdapter, inspect_adapter
from .checkpoint import Checkpoint
from .layouts.adapters import open_adapter
from .layouts.embeddings import EmbeddingFile, open_embeddings
from .layouts.source import Source
from .repo.adapter_card import Described

_PLAIN = ("LoRA", "LoRA + DoRA")  # that diffusers has, of DoRA in PEFT's names only


@dataclass(frozen=True)
class Loose:
    """A file or folder that is no repository, and changes a model.

    Attributes:
        files: name -> where it lies.
        sha256: name -> digest.
    """

    described: Described
    files: dict[str, Path]
    sha256: dict[str, str]


def loose(path: Path) -> Loose | None:
    """What a path is, if it is an adapter or an embedding alone.

    Raises:
        ConversionError: it is one, and cannot be read.
    """
    if not path.exists() or (path.is_dir() and not _is_folder(path)):
        return None
    source = Source(path)
    if source.is_embedding:
        file = open_embeddings(source)
        return _loose(_of_words(file), list(file.checkpoints), path)
    if source.is_adapter:
        opened_file = open_adapter(source)
        found = inspect_adapter(opened_file, None)
        names = _names(path)
        return _loose(_of_modules(found, names), [opened_file.checkpoint], path)
    return None


def _is_folder(path: Path) -> bool:
    """Whether a folder is one that PEFT or diffusers' training scripts wrote."""
    source = Source(path)
    return source.is_embedding or source.is_adapter


def _names(path: Path) -> tuple[str, ...]:
    """The files of an adapter; that of the weights comes first."""
    if path.is_file():
        return (path.name,)
    return tuple(sorted((one.name for one in path.iterdir() if one.is_file()), reverse=True))


def _loose(described: Described, checkpoints: list[Checkpoint], path: Path) -> Loose:
    folder = path if path.is_dir() else path.parent
    opened_files = {file.path.name: file for one in checkpoints for file in one.files}
    files = {name: folder / name for name in described.names}
    digests = {name: file.sha256() for name, file in opened_files.items()}
    return Loose(described, files, digests)


def _of_modules(found: InspectedAdapter, names: tuple[str, ...]) -> Described:
    flavours: Counter[str] = Counter()
    for _, title, count in found.flavours:
        flavours[title] += count
    ranks = sorted({rank for rank, _, _ in found.ranks})
    facts = [
        ("changes", ", ".join(f"{count} x {title}" for title, count in flavours.items())),
        ("names", ", ".join(found.conventions)),
    ]
    if ranks:
        facts.append(("ranks", ", ".join(map(str, ranks))))
    facts += list(found.metadata.items())
    in_diffusers = all(title in _PLAIN for title in flavours) and not (
        found.magnitudes and "PEFT" not in found.conventions
    )
    words = found.words[:1]
    return Described(
        "adapter", _tags(found.families), found.families, words, facts, names, in_diffusers
    )


def _tags(titles: Sequence[str]) -> tuple[str, ...]:
    """What cards call models of families of these titles."""
    tags = [family.tag for family in families().values() if family.title in titles]
    return tuple(dict.fromkeys(tags))


def _of_words(file: EmbeddingFile) -> Described:
    found = fitting(file.embeddings)
    titles = [families()[name].title for name in found.whole or found.halves]
    facts = []
    for word in file.embeddings:
        counts = [f"{number_of(one)} x {one.shape[-1]}" for one in word.vectors.values()]
        facts.append((word.token, f"vectors: {' and '.join(counts)}"))
    names = tuple(one.path.name for one in file.checkpoints)
    has_one = len(file.embeddings) == 1 and len(file.embeddings[0].vectors) == 1
    words = [word.token for word in file.embeddings]
    return Described(
        "embedding", _tags(titles), titles, words, facts, names, has_one and file.is_named
    )
