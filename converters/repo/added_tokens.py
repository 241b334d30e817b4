"""Tokens beyond a tokenizer's vocabulary: which there are, and new ones in its files.

As transformers 4 and 5 read them: `tokenizer.json`, `added_tokens_decoder` in the config, or
`added_tokens.json`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import ConversionError, printable
from ...io.config_files import write_json
from ...io.documents import read_json
from ..planning.plan import PlannedComponent
from .base import base_file
from .tokenizer import clip_vocabulary, placeholder_names

_WHOLE = "tokenizer.json"
_CONFIG = "tokenizer_config.json"
_VOCABULARY = "vocab.json"
_ADDED = "added_tokens.json"
_DECODER = "added_tokens_decoder"


def known_tokens(encoder: PlannedComponent, folder: str) -> tuple[dict[str, int], dict[str, int]]:
    """The vocabulary of a text encoder's tokenizer, and the tokens that were added to it.

    Args:
        folder: the tokenizer's in a repository.

    Raises:
        ConversionError: its files are damaged.
    """

    def read(name: str, schema: str) -> dict[str, Any]:
        path = base_file(encoder, f"{folder}/{name}")
        return read_json(path, schema) if path else {}

    whole = read(_WHOLE, "tokenizer")
    vocabulary = read(_VOCABULARY, "vocabulary")
    if whole:
        vocabulary = whole["model"]["vocab"]
    if not isinstance(vocabulary, dict) or not vocabulary:
        vocabulary = clip_vocabulary()
    added = {token["content"]: token["id"] for token in whole.get("added_tokens", ())}
    for id_, token in read(_CONFIG, "tokenizer_config").get(_DECODER, {}).items():
        added[token if isinstance(token, str) else token["content"]] = int(id_)
    added |= read(_ADDED, "vocabulary")
    beyond = {token: id_ for token, id_ in added.items() if token not in vocabulary}
    return vocabulary, dict(sorted(beyond.items(), key=lambda entry: entry[1]))


def token_rows(
    encoder: PlannedComponent, folder: str, rows: int, given: Sequence[str]
) -> dict[str, int]:
    """Token -> row, of those beyond the vocabulary: as the tokenizer or else the user names them.

    Args:
        rows: of the text encoder's table.
        given: the user's names.

    Raises:
        ConversionError: there are not as many names as rows, or the tokenizer has names.
    """
    vocabulary, added = known_tokens(encoder, folder)
    first = len(vocabulary)
    if not added:
        return {name: first + i for i, name in enumerate(placeholder_names(rows, given))}
    if given:
        raise ConversionError(
            f"--placeholder-token: the tokenizer names the added tokens of the {encoder.name}"
            f" already, {printable(next(iter(added)))} first"
        )
    return {token: row for token, row in added.items() if first <= row < rows}


def add_tokens(folder: Path, tokens: Mapping[str, int]) -> None:
    """Write tokens into the files of a tokenizer.

    Raises:
        ConversionError: a file is damaged.
    """
    if not tokens:
        return
    whole = folder / _WHOLE
    if whole.is_file():
        content = read_json(whole, "tokenizer")
        entries = [{"id": id_, "content": token, **_flags()} for token, id_ in tokens.items()]
        content["added_tokens"] = [*content.get("added_tokens", ()), *entries]
        write_json(whole, content)
    config = folder / _CONFIG
    if config.is_file():
        content = read_json(config, "tokenizer_config")
        if _DECODER in content:
            new = {str(id_): {"content": token, **_flags()} for token, id_ in tokens.items()}
            content[_DECODER] = {**content[_DECODER], **new}
            write_json(config, content)
    added = folder / _ADDED
    if added.is_file() or (folder / _VOCABULARY).is_file():
        before = read_json(added, "vocabulary") if added.is_file() else {}
        write_json(added, {**before, **tokens})


def check_new(token: str, known: Mapping[str, int], where: object) -> None:
    """Raise ConversionError if a token cannot be added to those that are known."""
    flaw = None
    if not token or not token.isprintable() or any(letter.isspace() for letter in token):
        flaw = "is empty or holds white space or control characters"
    elif token in known:
        flaw = f"is token {known[token]} of the vocabulary already"
    if flaw:
        raise ConversionError(
            f"{where}: `{printable(token)}` {flaw}; give the word another name: weightport convert"
            " FILE -o OTHER --placeholder-token '<name>'"
        )


def _flags() -> dict[str, bool]:
    return {
        "lstrip": False,
        "normalized": True,
        "rstrip": False,
        "single_word": False,
        "special": False,
    }
