"""The tokenizer folders of a repository: a base's own, or made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

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


class StockTokenizer(NamedTuple):
    """A tokenizer whose vocabulary comes with this package.

    Attributes:
        class_name: in transformers.
        pad_token: what fills a prompt up.
        max_length: of a prompt, in tokens.
        placeholder_tokens: beyond the vocabulary, in the order of their ids.
    """

    class_name: str
    pad_token: str
    max_length: int
    placeholder_tokens: tuple[str, ...]

    def write(self, folder: Path) -> None:
        """Write its files into a folder, which is created if missing."""
        if self.class_name == CLASS_NAME:
            write_t5_tokenizer(folder)
            return
        write_tokenizer(
            folder,
            placeholder_tokens=self.placeholder_tokens,
            pad_token=self.pad_token,
            max_length=self.max_length,
        )


def stock_tokenizer(
    name: str, tokenizer: Tokenizer, encoder: PlannedComponent, placeholder_tokens: Sequence[str]
) -> StockTokenizer | None:
    """The tokenizer of a text encoder, if it is the family's and not a base's own.

    Args:
        name: of its folder.
        tokenizer: what the family says of it; the layout that the encoder comes from may pad
            otherwise.
    """
    if _theirs(name, encoder):
        return None
    return StockTokenizer(
        tokenizer.class_name,
        encoder.layout.pad_token or tokenizer.pad_token,
        encoder.config.get("max_position_embeddings", MAX_LENGTH),
        tuple(placeholder_tokens),
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
        tokenizer: as of `stock_tokenizer`.
    """
    folder.mkdir()
    stock = stock_tokenizer(folder.name, tokenizer, encoder, placeholder_tokens)
    if stock is not None:
        stock.write(folder)
    for file in _theirs(folder.name, encoder):
        (folder / file.name).write_bytes(file.read_bytes())
    add_tokens(folder, encoder.words)


def _theirs(name: str, encoder: PlannedComponent) -> list[Path]:
    """A base's own files of a tokenizer."""
    given = [base_file(encoder, f"{name}/{file}") for file in _FILES]
    return [file for file in given if file is not None]


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
