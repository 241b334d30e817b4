"""Mapping tables: rows `target = "source : then"`, expanded over a finite key list into concrete
links.

A row matches a dotted prefix of a *target* (diffusers) key. The row with more segments, then with
fewer wildcards, wins. On the left `{i}` binds an integer, `*` one segment, `{q,k,v}` the parts of a
fused tensor. On the right `{...}` is arithmetic over what was bound, the table's `[let]` and the
target's config; `*` is what the left `*` matched. What is left of the key is carried over, handed
to a section (`: resnet`), or must be empty and finished by an op (`: i o -> o i`). Nothing is
searched: the target's key list drives the expansion, so a table is invertible. See
docs/table-language.md.
"""

from __future__ import annotations

import fnmatch
import hashlib
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from .errors import MappingError
from .expressions import evaluate
from .ops import Op

FOLDER = Path(__file__).resolve().parent
_HEADER = ("extends", "prefix", "about", "let", "ignore", "regenerate")


@dataclass(frozen=True, slots=True)
class Link:
    """One concrete correspondence: `targets = op(sources)`; `op` is None where the tensor is the
    same."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    op: Op | None
    row: str  # the table row(s) that made it, for reports

    @property
    def inverse(self) -> Link:
        """The link read the other way."""
        return Link(self.targets, self.sources, self.op.inverse if self.op else None, self.row)


@dataclass(frozen=True)
class Row:
    """One line of a table, parsed once."""

    section: str
    left: str
    right: str
    then: str

    @cached_property
    def _patterns(self) -> tuple[re.Pattern[str], ...]:
        return tuple(re.compile(_segment_regex(segment)) for segment in _split(self.left))

    @cached_property
    def source(self) -> tuple[str, ...]:
        """The segments of the right-hand side, not filled in yet."""
        return tuple(_split(self.right))

    @property
    def rank(self) -> tuple[int, int]:
        """How specific the row is: more segments first, then fewer wildcards."""
        return len(self._patterns), -self.left.count("*")

    def match(self, segments: tuple[str, ...]) -> dict[str, str] | None:
        """What the row binds when it matches the first segments of a key, else None."""
        if len(segments) < len(self._patterns):
            return None
        bound: dict[str, str] = {}
        for pattern, segment in zip(self._patterns, segments, strict=False):
            found = pattern.fullmatch(segment)
            if found is None:
                return None
            bound |= found.groupdict()
        return bound

    @property
    def length(self) -> int:
        """Number of segments the row takes from a key."""
        return len(self._patterns)

    @property
    def parts(self) -> tuple[str, ...]:
        """The names in the row's `{q,k,v}`, or nothing."""
        found = re.search(r"\{(\w+(?:,\w+)+)\}", self.left)
        return tuple(found[1].split(",")) if found else ()

    def __str__(self) -> str:
        return f'{self.left} = "{self.right}{" : " + self.then if self.then else ""}"'


@dataclass(frozen=True)
class Table:
    """A mapping table, loaded from `mappings/<name>.toml`.

    Attributes:
        about: title, layout and part it reads, the component it fills, which of its keys
            (`covers`), the families it serves, and where the facts come from.
        ignore: patterns of source keys that carry nothing -> the reason.
        regenerate: source keys that no target holds -> how they are made again: `positions`,
            `identity`, a number, or the pattern of those that are copied.
        sha256: of the file and of those it extends, recorded with every conversion.
    """

    name: str
    about: Mapping[str, Any]
    let: Mapping[str, str]
    prefix: str
    sections: Mapping[str, tuple[Row, ...]]
    ignore: Mapping[str, str]
    regenerate: Mapping[str, str]
    sha256: str

    def covers(self, key: str) -> bool:
        """Whether a target key is this table's to explain (a VAE is filled by two tables)."""
        prefixes = self.about.get("covers")
        return prefixes is None or any(key == p or key.startswith(p + ".") for p in prefixes)

    def ignored(self, key: str) -> str | None:
        """The reason why a source key is left out, if the table gives one."""
        return next(
            (
                reason
                for pattern, reason in self.ignore.items()
                if fnmatch.fnmatchcase(key, pattern)
            ),
            None,
        )

    def links(self, targets: Iterable[str], config: Mapping[str, Any]) -> list[Link]:
        """Expand the table over target keys, in their order; one link per source tensor.

        Raises:
            MappingError: no row explains a key, or two rows claim one source.
        """
        names = dict(config)
        for name, text in self.let.items():
            names[name] = evaluate(text, names)
        explain = _Expansion(self, names).explain
        found: dict[str, _Explained] = {}  # source -> what explains it
        parts: dict[str, dict[int, str]] = {}  # source of a fused tensor -> place -> target
        unexplained: list[str] = []
        for key in filter(self.covers, targets):
            explained = explain(tuple(key.split(".")))
            if explained is None:
                unexplained.append(key)
                continue
            places = parts.setdefault(explained.source, {})
            if (
                found.setdefault(explained.source, explained).row != explained.row
                or explained.place in places
            ):
                raise MappingError(
                    f"{self.name}: `{explained.source}` is claimed by {(*places.values(),)} and"
                    f" `{key}`"
                )
            places[explained.place] = key
        if unexplained:
            raise MappingError(
                f"{self.name}: no row explains {unexplained[0]} (and {len(unexplained) - 1} more)"
            )
        return [
            Link((source,), tuple(key for _, key in sorted(parts[source].items())), how.op, how.row)
            for source, how in found.items()
        ]


class _Explained(NamedTuple):
    """What a table says of one target key: its source, its place among the parts of a fused one,
    the op, the rows."""

    source: str
    place: int
    op: Op | None
    row: str


class _Step(NamedTuple):
    """One row applied to the front of a key: what it took, and what it gave."""

    row: Row
    scope: Mapping[str, Any]
    source: tuple[str, ...]
    place: int | None


class _Expansion:
    """A table at work on the keys of one model. Keys share their fronts, so each step is remembered
    by its front."""

    def __init__(self, table: Table, names: Mapping[str, Any]) -> None:
        self._table, self._names = table, names
        self._depth = {
            section: max(row.length for row in rows)
            for section, rows in table.sections.items()
            if rows
        }
        self._steps: dict[tuple[str, tuple[str, ...]], _Step | None] = {}

    def explain(self, key: tuple[str, ...]) -> _Explained | None:
        """What the table says of a target key, given in segments; None if no row fits."""
        section, at, place, scope = "main", 0, 0, self._names
        source: list[str] = []
        rows: list[str] = []
        while True:
            step = self._step(section, key, at, scope)
            if step is None:
                return None
            row, scope, filled, part = step
            source += filled
            rows.append(str(row))
            at += row.length
            place = place if part is None else part
            if row.then in self._table.sections:
                section = row.then
                continue
            if row.then and at < len(key):
                return None  # an op ends a key; a longer one needs its own row
            path = self._table.prefix + ".".join((*source, *key[at:]))
            return _Explained(
                path, place, Op.parse(row.then) if row.then else None, " / ".join(rows)
            )

    def _step(
        self, section: str, key: tuple[str, ...], at: int, scope: Mapping[str, Any]
    ) -> _Step | None:
        front = section, key[: at + self._depth.get(section, 0)]
        if front not in self._steps:
            self._steps[front] = self._first(section, key[at:], scope)
        return self._steps[front]

    def _first(
        self, section: str, segments: tuple[str, ...], scope: Mapping[str, Any]
    ) -> _Step | None:
        for row in self._table.sections.get(section, ()):  # most specific first
            bound = row.match(segments)
            if bound is not None:
                known = {
                    **scope,
                    **{name: int(value) for name, value in bound.items() if value.isdigit()},
                }
                filled = (_fill(segment, known, bound) for segment in row.source)
                place = row.parts.index(bound["part"]) if row.parts else None
                return _Step(row, known, tuple(segment for segment in filled if segment), place)
        return None


@lru_cache(maxsize=1)
def all_tables() -> tuple[Table, ...]:
    """Every table that reads a part of a checkpoint (those that others extend name no layout), by
    name."""
    tables = (
        load_table(path.stem)
        for path in sorted(FOLDER.glob("*_*.toml"))
        if path.stem != "keras_layers"
    )
    return tuple(table for table in tables if "part" in table.about)


@cache
def load_table(name: str, folder: Path = FOLDER) -> Table:
    """Load `<folder>/<name>.toml` and whatever it extends.

    Raises:
        MappingError: no such table, or a row that cannot be read.
    """
    path = folder / f"{name}.toml"
    try:
        text = path.read_bytes()
        document = tomllib.loads(text.decode())
    except (OSError, ValueError) as error:
        raise MappingError(f"table {name}: {error}") from None
    digest = hashlib.sha256(text)
    rows: dict[str, dict[str, str]] = {}
    base: Table | None = None
    if "extends" in document:
        base = load_table(document["extends"], folder)
        digest.update(base.sha256.encode())
        rows = {
            section: {row.left: _spell(row) for row in base.sections[section]}
            for section in base.sections
        }
    for section, entries in document.items():
        if section not in _HEADER:
            rows[section] = rows.get(section, {}) | entries
    sections = {
        section: tuple(
            sorted(
                (_row(section, *entry) for entry in entries.items()),
                key=lambda r: r.rank,
                reverse=True,
            )
        )
        for section, entries in rows.items()
    }
    return Table(
        name=name,
        about=dict(base.about if base else {}) | document.get("about", {}),
        let=dict(base.let if base else {}) | document.get("let", {}),
        prefix=document.get("prefix", base.prefix if base else ""),
        sections=sections,
        ignore=dict(base.ignore if base else {}) | document.get("ignore", {}),
        regenerate=dict(base.regenerate if base else {}) | document.get("regenerate", {}),
        sha256=digest.hexdigest(),
    )


def _row(section: str, left: str, value: str) -> Row:
    right, _, then = value.partition(" : ")
    return Row(section, left, right.strip(), then.strip())


def _spell(row: Row) -> str:
    return f"{row.right} : {row.then}" if row.then else row.right


def _split(path: str) -> list[str]:
    """Split at the dots that are not inside braces."""
    return re.findall(r"(?:\{[^}]*\}|[^.{])+", path)


def _segment_regex(segment: str) -> str:
    """`linear_{k}` -> a regex; `{k}` binds an integer, `{q,k}` a part, `*` anything."""
    pieces = []
    for piece in re.split(r"(\{[^}]*\}|\*)", segment):
        if piece == "*":
            pieces.append("(?P<star>.+)")
        elif "," in piece:
            pieces.append(f"(?P<part>{'|'.join(map(re.escape, piece[1:-1].split(',')))})")
        elif piece.startswith("{"):
            pieces.append(rf"(?P<{piece[1:-1]}>\d+)")
        else:
            pieces.append(re.escape(piece))
    return "".join(pieces)


def _fill(segment: str, scope: Mapping[str, Any], bound: Mapping[str, str]) -> str:
    """Put values into a right-hand segment."""
    filled = segment.replace("*", bound.get("star", "*"))
    if "{" not in filled:
        return filled
    return re.sub(r"\{([^}]*)\}", lambda found: str(evaluate(found[1], scope)), filled)
