"""Files that name jobs: TOML, JSON Lines, CSV, and lists of Hub ids.

Others wrote them: they are read in bounds, and each entry is checked by a schema.
"""

from __future__ import annotations

import csv
import io
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from ..converters.settings import Option, Settings, options
from ..errors import ConversionError, printable
from ..io.documents import check, parse_json, read_text
from ..pull import Reference
from .jobs import HUB, Entry, Steps, absolute, path_from

MAX_BYTES = 64 << 20
"""Of a list."""

MAX_TOML = 8 << 20
"""Of one in TOML, whose parser takes a second a million bytes."""

MAX_JOBS = 1_000_000

_PART = r"""(?:[\w-]++|"(?:[^"\\\n]|\\.)*+"|'[^'\n]*+')[ \t]*+\.[ \t]*+"""
_LONG_KEY = re.compile(rf"""(?<![\\\w"'.-])(?:{_PART}){{32}}""")
"""A dotted key whose reading takes the square of its parts."""

_TABLES = ("job", "jobs")
_SEPARATOR = ";"  # between the values of one field in CSV
_NOT_A_JOBS = {"dry_run"}  # of the whole batch
_YES = ("true", "yes", "1")
_NO = ("false", "no", "0")


def is_list(path: Path) -> bool:
    """Whether a file is one of jobs, by its name: their content is anybody's."""
    return path.suffix.lower() in _READERS


def read_list(path: Path) -> list[Entry]:
    """The jobs that a file names.

    Raises:
        ConversionError: in one line that names the file, and the line or the entry.
    """
    entries: list[Entry] = []
    for entry in _READERS[path.suffix.lower()](path):
        if len(entries) == MAX_JOBS:
            raise ConversionError(f"{path}: more than {MAX_JOBS} jobs; split the file")
        entries.append(entry)
    if not entries:
        raise ConversionError(f"{path}: names no job")
    return entries


def reference(text: str, where: str) -> Entry:
    """A job of what a text names on the Hub.

    Raises:
        ConversionError: it is no name.
    """
    found = Reference.parse(text)
    if found is None:
        raise ConversionError(
            f"{where}: {printable(text)} is no name on the Hub; write hub:owner/name, or"
            " hub:owner/name@revision/file"
        )
    owner, name = found.repo_id.split("/")
    names = [name, f"{owner}--{name}"]
    if found.path:
        inner = PurePosixPath(found.path)
        flat = found.path.replace("/", "--")
        names = [
            inner.name.split(".")[0] or name,
            flat,
            f"{name}--{flat}",
            f"{owner}--{name}--{flat}",
        ]
    if found.revision:
        names.append(f"{names[-1]}--{found.revision.replace('/', '-')}")
    return Entry(where, (str(found),), tuple(names))


# --- formats --------------------------------------------------------------------------------------


def _toml(path: Path) -> Iterator[Entry]:
    text = read_text(path, MAX_TOML)
    if _LONG_KEY.search(text):
        raise ConversionError(f"{path}: the TOML in it cannot be read (a key of many parts)")
    try:
        content = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError, ValueError) as error:
        fault = "nested too deeply" if isinstance(error, RecursionError) else printable(error, 200)
        raise ConversionError(f"{path}: the TOML in it cannot be read ({fault})") from None
    unknown = [name for name in content if name not in _TABLES]
    if unknown:
        raise ConversionError(
            f"{path}: `{printable(unknown[0])}` is not known; each job is a table [[job]]"
        )
    tables = [table for name in _TABLES for table in _tables(content.get(name, []), path)]
    for number, table in enumerate(tables, 1):
        yield _entry(table, path, f"{path}: job {number}")


def _tables(value: Any, path: Path) -> list[Any]:
    if not isinstance(value, list):
        raise ConversionError(f"{path}: each job is a table [[job]], with two brackets")
    return value


def _json_lines(path: Path) -> Iterator[Entry]:
    for where, line in _lines(path):
        yield _entry(parse_json(line, where), path, where)


def _csv(path: Path) -> Iterator[Entry]:
    rows = csv.reader(io.StringIO(read_text(path, MAX_BYTES), newline=""), strict=True)
    try:
        header = next(rows, [])
        _check_header(header, path)
        for row in rows:
            where = f"{path}: line {rows.line_num}"
            if not any(cell.strip() for cell in row):
                continue
            if len(row) != len(header):
                raise ConversionError(
                    f"{where}: {len(row)} fields, and the first line names {len(header)}"
                )
            cells = {name: cell.strip() for name, cell in zip(header, row, strict=True)}
            yield _entry(_parsed({n: c for n, c in cells.items() if c}, where), path, where)
    except csv.Error as error:
        raise ConversionError(f"{path}: line {rows.line_num}: {printable(error)}") from None


def _check_header(header: list[str], path: Path) -> None:
    names = [name.strip() for name in header]
    if len(set(names)) < len(names):
        raise ConversionError(f"{path}: line 1: a column is there twice")
    if "sources" not in names:
        raise ConversionError(
            f"{path}: line 1: no column `sources`; the first line names the columns"
        )


def _text(path: Path) -> Iterator[Entry]:
    for where, line in _lines(path):
        yield reference(line, where)


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """The lines that say something, and where each is; `#` begins a comment."""
    for number, line in enumerate(read_text(path, MAX_BYTES).split("\n"), 1):
        text = line.strip()
        if text and not text.startswith("#"):
            yield f"{path}: line {number}", text


_READERS: dict[str, Callable[[Path], Iterator[Entry]]] = {
    ".toml": _toml,
    ".jsonl": _json_lines,
    ".csv": _csv,
    ".txt": _text,
}


# --- entries --------------------------------------------------------------------------------------


def _entry(fields: Any, path: Path, where: str) -> Entry:
    """A job from its fields.

    Raises:
        ConversionError: one is not known, or its value cannot be.
    """
    if not isinstance(fields, Mapping):
        raise ConversionError(f"{where}: a job is a table of fields")
    named = _by_field(fields, where)
    for name in ("sources", *_repeated()):
        if isinstance(named.get(name), str):
            named[name] = [named[name]]
    check(named, "job", where)
    folder = path.absolute().parent
    sources = tuple(path_from(source, folder) for source in named.pop("sources"))
    output = named.pop("output", None)
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in named.items()}
    return Entry(where, sources, names_of(sources, where), output, absolute(given, folder))


def names_of(sources: tuple[str, ...], where: str) -> tuple[str, ...]:
    """What the result of sources may be called: as the first of them."""
    first = sources[0]
    if first.startswith(HUB):
        return reference(first, where).names
    name = Path(first).name
    return stem(name), name


def stem(name: str) -> str:
    """The name of a file without what says its format."""
    for ending in (".weights.h5", ".weights.json", ".safetensors.index.json", ".bin.index.json"):
        if name.endswith(ending):
            return name.removesuffix(ending)
    return PurePosixPath(name).stem


def _by_field(fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Fields by the names of `weightport.convert`, as they are or as the command line has them."""
    known = _spellings()
    found: dict[str, Any] = {}
    for key, value in fields.items():
        spelled = str(key).replace("-", "_")
        name, is_turned = known.get(spelled, (str(key), False))
        if name in found:
            raise ConversionError(f"{where}: `{printable(name)}` is said twice")
        found[name] = not value if is_turned and isinstance(value, bool) else value
    return found


@cache
def _options() -> dict[str, Option]:
    known = {**options(Settings), **options(Steps)}
    return {name: option for name, option in known.items() if name not in _NOT_A_JOBS}


@cache
def _spellings() -> dict[str, tuple[str, bool]]:
    """How a field may be written -> its name, and whether it says the opposite."""
    found = {}
    for name, option in _options().items():
        flag = (option.flag or f"--{name}").removeprefix("--").replace("-", "_")
        found[name] = (name, False)
        if option.typed is True:
            found[flag if flag.startswith("no_") else f"no_{name}"] = (name, True)
        else:
            found[flag] = (name, False)
    return found


@cache
def _repeated() -> frozenset[str]:
    """The options that take several values."""
    return frozenset(name for name, option in _options().items() if isinstance(option.typed, tuple))


def _parsed(cells: Mapping[str, str], where: str) -> dict[str, Any]:
    """Values of the cells of a line."""
    known = _options()
    spelled = _spellings()
    found: dict[str, Any] = {}
    for column, text in cells.items():
        name, _ = spelled.get(column.replace("-", "_"), (column, False))
        option = known.get(name)
        try:
            found[column] = _value(text, name, option)
        except ValueError:
            raise ConversionError(
                f"{where}: `{printable(column)}` cannot be {printable(text, 60)}"
            ) from None
    return found


def _value(text: str, name: str, option: Option | None) -> Any:
    if name == "sources":
        return [part.strip() for part in text.split(_SEPARATOR) if part.strip()]
    if option is None:
        return text
    if isinstance(option.typed, bool):
        return _truth(text)
    if name in _repeated() and option.parse is str:
        return [part.strip() for part in text.split(_SEPARATOR) if part.strip()]
    value = option.parse(text)
    return list(value) if isinstance(value, tuple) else value


def _truth(text: str) -> bool:
    """Yes or no.

    Raises:
        ValueError: neither.
    """
    word = text.lower()
    if word not in (*_YES, *_NO):
        raise ValueError(text)
    return word in _YES
