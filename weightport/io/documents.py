"""JSON that others wrote, or may have changed: read once, in bounds, and checked by a schema.

The schemas are JSON Schema (draft 7, https://json-schema.org), written as TOML in `schemas/`.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import ConversionError, printable
from .collector import collector_paused
from .regular import read_regular

MAX_BYTES = 64 << 20
"""Of a document; a `tokenizer.json` has 4 million."""

MAX_CONFIG = 1 << 20
"""Of a config; those of models have a few thousand."""

MAX_VALUES = 2_000_000
"""In a document, as its brackets and commas count them; a vocabulary of CLIP has 50,000."""

_SCHEMAS = Path(__file__).parent / "schemas"


def read_json(path: Path, schema: str | None = None, limit: int = MAX_BYTES) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        path: the file.
        schema: the name of a schema that it follows.
        limit: bytes at most.

    Raises:
        ConversionError: in one line that names file and field.
    """
    return parse_json(read_regular(path, limit), path, schema)


def read_text(path: Path, limit: int) -> str:
    """The text in a file.

    Raises:
        ConversionError: it cannot be read, is longer than `limit` bytes, or is not UTF-8.
    """
    try:
        return read_regular(path, limit).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConversionError(f"{path}: {_fault(error)}; is the file damaged?") from None


def parse_json(data: bytes | str, where: object, schema: str | None = None) -> dict[str, Any]:
    """A JSON object; `where` is for messages.

    As diffusers writes them, numbers may be infinite; none is NaN.

    Raises:
        ConversionError: it is no JSON object, is nested too deeply, has a name twice, more values
            than a document may have, numbers of thousands of digits, or half a character.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            raise ConversionError(f"{where}: `{printable(_twice(pairs))}` is there twice")
        return result

    try:
        text = data if isinstance(data, str) else data.decode("utf-8-sig")
        if sum(map(text.count, "[{,")) > MAX_VALUES:
            raise ValueError(f"more than {MAX_VALUES} values")
        with collector_paused():
            content = json.loads(
                text, object_pairs_hook=unique, parse_float=_finite, parse_constant=_infinite
            )
        if "\\u" in text:
            json.dumps(content, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        raise ConversionError(
            f"{where}: the JSON in it cannot be read ({_fault(error)}); is the file damaged?"
        ) from None
    if not isinstance(content, dict):
        raise ConversionError(f"{where}: the JSON in it is not an object")
    if schema:
        check(content, schema, where)
    return content


def check(content: object, schema: str, where: object) -> None:
    """Check what was read.

    Args:
        content: made of what JSON is made of.
        schema: the name of a schema.
        where: for messages.

    Raises:
        ConversionError: it does not follow the schema; names the field.
    """
    from fastjsonschema import JsonSchemaValueException

    try:
        _validator(schema)(content)
    except JsonSchemaValueException as error:
        field = ".".join(error.path[1:])
        rest = error.message.removeprefix(str(error.name)).strip()
        name = f"`{printable(field)}`" if field else "it"
        raise ConversionError(f"{where}: {name} {printable(rest, 200)}") from None


@cache
def _validator(name: str) -> Callable[[object], object]:
    import fastjsonschema

    schema = tomllib.loads((_SCHEMAS / f"{name}.toml").read_text(encoding="utf-8"))
    validator: Callable[[object], object] = fastjsonschema.compile(schema, use_default=False)
    return validator


def _twice(pairs: list[tuple[str, Any]]) -> str:
    seen = set[str]()
    return next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {printable(text, 20)} is too large")
    return value


def _infinite(word: str) -> float:
    value = float(word)
    if math.isnan(value):
        raise ValueError("a number is NaN")
    return value


def _fault(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg.lower()}, line {error.lineno}"
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 at byte {error.start}"
    if isinstance(error, UnicodeEncodeError):
        return "half a surrogate pair"
    return printable(error, 80)
