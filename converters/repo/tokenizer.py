"""The `tokenizer/` folder of a repository: OpenAI CLIP's byte-pair encoding, as every CLIP
tokenizer reads it.

One constant, the ranked list of merges, defines the tokenizer of SD 1.x, SD 2.x and both SDXL text
encoders; the vocabulary follows from it (a test derives it), and is packaged because to derive it
takes more than to convert. The files are the classic ones (`vocab.json`, `merges.txt`), which
transformers 4 and 5 and `tokenizers` all load. With the default arguments vocabulary, merges and
special tokens are byte for byte those of the published SD 1.x repositories.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import ConversionError, printable
from ...mappings.families import Family
from ..planning.plan import PlannedComponent
from .base import base_file
from .packaged import unpacked

CLASS_NAME = "CLIPTokenizer"  # in transformers
VOCABULARY_SIZE = 49_408
MAX_LENGTH = 77
START, END = "<|startoftext|>", "<|endoftext|>"  # 49406, 49407


def clip_vocabulary() -> dict[str, int]:
    """CLIP's token -> id."""
    vocabulary: dict[str, int] = json.loads(unpacked("clip_vocab.json"))
    return vocabulary


def placeholder_names(rows: int, given: Sequence[str]) -> tuple[str, ...]:
    """Names for the rows that textual inversion added to a token table, in row order.

    Args:
        rows: the rows of the text encoder's token embedding.
        given: the user's names, `<cat>=2` for two rows `<cat>` and `<cat>_1`; empty for
            `<placeholder-0>`, `<placeholder-1>`, …

    Raises:
        ConversionError: there is not one name for each added row, or a name cannot be a token.
    """
    added = max(rows - VOCABULARY_SIZE, 0)
    given = expanded(given)
    if given and len(given) != added:
        raise ConversionError(
            f"the token table has {rows} rows, {added} more than CLIP's vocabulary, but"
            f" {len(given)} placeholder tokens are named: name exactly {added} with"
            " --placeholder-token"
        )
    names = tuple(given) or tuple(f"<placeholder-{i}>" for i in range(added))
    _check_placeholders(names)
    return names


def expanded(given: Sequence[str]) -> tuple[str, ...]:
    """The tokens of names: `<cat>=2` is `<cat>` and `<cat>_1`."""
    if not given:
        return ()
    from ...adapters.embeddings import spelled

    tokens: list[str] = []
    for name in given:
        found = re.fullmatch(r"(.+)=([1-9]\d{0,3})", name)
        tokens += spelled(found[1], int(found[2])) if found else [name]
    return tuple(tokens)


def placeholder_warnings(names: Sequence[str]) -> list[str]:
    """A line for each name that KerasCV could not have used: it lower-cases the prompt before it
    looks tokens up."""
    return [
        f"placeholder token {printable(name)}: KerasCV lower-cases prompts, so it never found this"
        " token; was it trained under another name?"
        for name in names
        if name != name.lower()
    ]


def _check_placeholders(names: Sequence[str]) -> None:
    for i, name in enumerate(names):
        if flaw := _flaw(name, names[:i]):
            raise ConversionError(
                f"placeholder token '{printable(name)}' {flaw}; choose another --placeholder-token"
            )


def _flaw(name: str, earlier: Sequence[str]) -> str | None:
    """Why a name cannot be a placeholder token after the `earlier` ones."""
    if not name or not name.isprintable() or " " in name:
        return "is empty or holds white space or control characters"
    if name in (vocabulary := clip_vocabulary()):
        return f"is token {vocabulary[name]} of CLIP's vocabulary"
    if name.lower() in (
        other.lower() for other in earlier
    ):  # fast tokenizers match added tokens in any case
        return "is named twice (upper and lower case are one)"
    return None


def write_tokenizer(
    folder: Path,
    *,
    placeholder_tokens: Sequence[str] = (),
    pad_token: str = END,
    max_length: int = MAX_LENGTH,
) -> list[Path]:
    """Write a CLIP tokenizer: `vocab.json`, `merges.txt`, `tokenizer_config.json`,
    `special_tokens_map.json`.

    Args:
        folder: created if missing.
        placeholder_tokens: tokens 49408, 49409, … in order, written to `added_tokens.json`.
        pad_token: fills a prompt up to 77 tokens. KerasCV pads with the end token for SD 1.x and
            2.x alike; Stability's own SD 2.x repositories pad with `!`.
        max_length: of a prompt in tokens: the positions of the text encoder.

    Returns:
        The files, in the order they were written.

    Raises:
        ConversionError: a placeholder cannot be a token, or the pad token is not one.
    """
    _check_placeholders(placeholder_tokens)
    if pad_token != END and pad_token not in clip_vocabulary():
        raise ConversionError(f"pad token '{printable(pad_token)}' is not in CLIP's vocabulary")
    contents = {  # all of them before any is written: packaged data may be damaged
        "vocab.json": unpacked("clip_vocab.json"),
        "merges.txt": b"#version: 0.2\n" + unpacked("clip_bpe_merges.txt"),
        "tokenizer_config.json": _json(_config(pad_token, max_length)),
        "special_tokens_map.json": _json(_special_tokens(pad_token)),
    }
    if placeholder_tokens:
        added = {name: VOCABULARY_SIZE + i for i, name in enumerate(placeholder_tokens)}
        contents["added_tokens.json"] = _json(added)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return [folder / name for name in contents]


def named_placeholders(
    family: Family, components: Mapping[str, PlannedComponent], given: tuple[str, ...]
) -> tuple[str, ...]:
    """Names for the token rows beyond CLIP's vocabulary, in order.

    Raises:
        ConversionError: there are not as many names as rows, or one cannot be a token.
    """
    own = [one for one in family.tokenizers.items() if one[1].class_name == CLASS_NAME]
    folder, encoder = next(((name, components.get(one.encoder)) for name, one in own), ("", None))
    if encoder is None or base_file(encoder, f"{folder}/tokenizer_config.json"):
        if given:
            raise ConversionError(
                "--placeholder-token: no source is a text encoder, so there is no token row to name"
            )
        return ()
    return placeholder_names(encoder.config["vocab_size"], given)


def placeholder_notes(tokens: tuple[str, ...]) -> list[str]:
    """What the user should know about placeholder tokens."""
    if not tokens:
        return []
    return [
        f"placeholder tokens: {', '.join(tokens)} (ids from {VOCABULARY_SIZE} on)",
        *placeholder_warnings(tokens),
    ]


def _config(pad_token: str, max_length: int) -> dict[str, Any]:
    special = {
        role: {"__type": "AddedToken", **token} if isinstance(token, dict) else token
        for role, token in _special_tokens(pad_token).items()
    }
    return {
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": max_length,
        "tokenizer_class": CLASS_NAME,
        **special,
    }


def _special_tokens(pad_token: str) -> dict[str, Any]:
    flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    start, end = {"content": START, **flags}, {"content": END, **flags}
    return {"bos_token": start, "eos_token": end, "pad_token": pad_token, "unk_token": end}


def _json(value: dict[str, Any]) -> bytes:
    """The spelling of transformers' own tokenizer files: sorted by key, two spaces, a final
    newline."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
