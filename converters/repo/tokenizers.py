"""The tokenizer folders of a repository: a base's own, or made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ...mappings.families import Family, Tokenizer
from ..planning.plan import PlannedComponent
from .added_tokens import add_tokens
from .base import base_file
from .t5_tokenizer import CLASS_NAME, write_t5_tokenizer
from .tokenizer import MAX_LENGTH, VOCABULARY_SIZE, write_tokenizer

_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "special_tokens_map.json",
    "added_tokens.json",
)


def copy_or_write_tokenizer(
    folder: Path,
    tokenizer: Tokenizer,
    encoder: PlannedComponent,
    *,
    placeholder_tokens: Sequence[str],
) -> None:
    """The tokenizer of a text encoder: a base's own files, or else the family's.

    Args:
        folder: must not be there yet.
        tokenizer: what the family says of it; the layout that the encoder comes from may pad
            otherwise.
    """
    given = [base_file(encoder, f"{folder.name}/{name}") for name in _FILES]
    theirs = [file for file in given if file is not None]
    folder.mkdir()
    for file in theirs:
        (folder / file.name).write_bytes(file.read_bytes())
    if not theirs:
        _write(folder, tokenizer, encoder, placeholder_tokens)
    add_tokens(folder, encoder.words)


def _write(
    folder: Path,
    tokenizer: Tokenizer,
    encoder: PlannedComponent,
    placeholder_tokens: Sequence[str],
) -> None:
    """The tokenizer of a family."""
    if tokenizer.class_name == CLASS_NAME:
        write_t5_tokenizer(folder)
    else:
        pad_token = encoder.layout.pad_token or tokenizer.pad_token
        write_tokenizer(
            folder,
            placeholder_tokens=placeholder_tokens,
            pad_token=pad_token,
            max_length=encoder.config.get("max_position_embeddings", MAX_LENGTH),
        )


def unfit(family: Family, components: Mapping[str, PlannedComponent]) -> dict[str, int]:
    """Tokenizers that cannot be made, as the text encoder has fewer token rows than CLIP's has
    tokens: folder -> how many rows there are."""
    found = {}
    for folder, tokenizer in family.tokenizers.items():
        encoder = components.get(tokenizer.encoder)
        if encoder is None or tokenizer.class_name == CLASS_NAME:
            continue
        given = base_file(encoder, f"{folder}/tokenizer_config.json")
        if encoder.config["vocab_size"] < VOCABULARY_SIZE and not given:
            found[folder] = encoder.config["vocab_size"]
    return found
