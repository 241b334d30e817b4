"""JSON that must be an object, and means the same to every reader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from ...errors import ConversionError, printable
from ..checkpoint import SourceFile

MAX_JSON = 100_000_000  # bytes: safetensors' own limit for its header


def read_json(file: SourceFile, limit: int = MAX_JSON) -> dict[str, Any]:
    """The JSON object that a file is.

    Raises:
        ConversionError: it is none, see `parse_json`, or has more bytes than the limit.
    """
    if file.size > limit:
        raise ConversionError(f"{file.path}: {file.size} bytes, too many for JSON")
    return parse_json(file.read(0, file.size), file.path)


def parse_json(data: bytes, path: Path) -> dict[str, Any]:
    """A JSON object; `path` is for messages.

    Raises:
        ConversionError: it is no JSON object, has a name twice, NaN, or numbers of thousands of
            digits.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for name, value in pairs:
            if name in result:
                raise ConversionError(f"{path}: `{printable(name)}` is there twice")
            result[name] = value
        return result

    def refuse(word: str) -> NoReturn:
        raise ValueError(word)

    try:
        result = json.loads(data.decode(), object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
        raise ConversionError(
            f"{path}: the JSON in it cannot be read; is the file damaged?"
        ) from None
    if not isinstance(result, dict):
        raise ConversionError(f"{path}: the JSON in it is not an object")
    return result
