"""Mapping tables: rows `target = "source : then"`, expanded over a finite key list into links.

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
from collections import ChainMap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from .errors import MappingError
from .expressions import Scope, evaluate
from .ops import Op, Shape
from .rows import Row, filled
from .spelling import Spelling

SourceShape = Callable[[str], Shape | None]
_OPEN = re.compile(r"[{*]")  # where the text of a segment ends that is the same for all keys
_NOTHING = r"(?!)"  # a pattern that fits nothing
_HEADER = (
    "extends",
    "prefix",
    "about",
    "let",
    "adjust",
    "spelling",
    "ignore",
    "regenerate",
    "make",
    "same",
)


class Link(NamedTuple):
    """One concrete correspondence: `targets = op(sources)`.

    Attributes:
        op: None where the tensor is the same.
        row: the table row(s) that made it, for reports.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    op: Op | None
    row: str

    @property
    def inverse(self) -> Link:
        """The link read the other way."""
        op = self.op.inverse if self.op else None
        return Link(self.targets, self.sources, op, self.row)

    def source_shape(self, targets: Mapping[str, Shape]) -> Shape:
        """The shape that a source has whose targets have these shapes.

        Raises:
            MappingError: no source gives targets of such shapes.
        """
        shapes = [targets[key] for key in self.targets]
        if self.op is None:
            return shapes[0]
        return self.op.inverse.shapes(shapes)[0]


@dataclass(frozen=True, eq=False)
class Table:
    """A mapping table.

    Attributes:
        about: title, layout and part it reads, the component it fills, which of its keys
            (`covers`), the families it serves, and where the facts come from.
        base: the table that this one extends.
        rows: section -> the rows of the file, as they stand there.
        prefix: put before every source path.
        spelling: how source paths are written, where not with dots.
        ignore: patterns of source keys that carry nothing -> the reason.
        regenerate: source keys that no target holds -> how they are made again: `positions`,
            `identity`, a number, or the pattern of those that are copied.
        make: target keys that no source holds -> how they are made: `identity`.
        same: source keys, less the prefix, that hold what another one holds -> that one; left out
            if that is so.
        adjust: options that a model in this layout has otherwise than its tensors tell -> the
            value.
        sha256: of the file and of those it extends, recorded with every conversion.
    """

    name: str
    base: Table | None
    rows: Mapping[str, Mapping[str, str]]
    about: Mapping[str, Any]
    let: Mapping[str, str]
    prefix: str
    spelling: Spelling | None
    ignore: Mapping[str, str]
    regenerate: Mapping[str, str]
    make: Mapping[str, str]
    same: Mapping[str, str]
    adjust: Mapping[str, str]
    sha256: str

    @classmethod
    def parse(cls, name: str, text: bytes, load: Callable[[str], Table]) -> Table:
        """Read a table's file.

        Args:
            load: gives the table that this one extends.

        Raises:
            ValueError: the text is no TOML, or a part of it cannot be read.
        """
        document = tomllib.loads(text.decode())
        digest = hashlib.sha256(text)
        base = EMPTY
        if "extends" in document:
            base = load(document["extends"])
            digest.update(base.sha256.encode())
        spelling = base.spelling
        if "spelling" in document:
            spelling = Spelling.parse(name, document["spelling"])
        return cls(
            name=name,
            base=base,
            rows={name: rows for name, rows in document.items() if name not in _HEADER},
            about={**base.about, **document.get("about", {})},
            let={**base.let, **document.get("let", {})},
            prefix=document.get("prefix", base.prefix),
            spelling=spelling,
            ignore={**base.ignore, **document.get("ignore", {})},
            regenerate={**base.regenerate, **document.get("regenerate", {})},
            make={**base.make, **document.get("make", {})},
            same={**base.same, **document.get("same", {})},
            adjust={**base.adjust, **document.get("adjust", {})},
            sha256=digest.hexdigest(),
        )

    @property
    def beginning(self) -> str:
        """How every source key begins."""
        return self.spelling.prefix if self.spelling else self.prefix

    @cached_property
    def sections(self) -> Mapping[str, tuple[Row, ...]]:
        """The rows, the most specific first; read when they are first asked for.

        Raises:
            MappingError: two rows match the same.
        """
        inherited = self.base.sections if self.base else {}
        return _sections(inherited, self.rows)

    @cached_property
    def fronts(self) -> set[str]:
        """What source paths begin with, less the prefix: the first words of all rows."""
        segments = (row.source[0] if row.source else "" for row in self.sections["main"])
        return {_OPEN.split(segment)[0] for segment in segments}

    def of_family(self, fact: str, family: str) -> str:
        """What `[about]` says of a family: one value, or one for each."""
        value = self.about[fact]
        return str(value[family] if isinstance(value, Mapping) else value)

    def covers(self, key: str) -> bool:
        """Whether a target key is this table's to explain (a VAE is filled by two tables)."""
        if key in self.make:
            return False
        prefixes = self.about.get("covers")
        if prefixes is None:
            return True
        return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)

    def ignored(self, config: Mapping[str, Any]) -> Callable[[str], str | None]:
        """What gives the reason why a source key of a model is left out, if the table has one."""
        names = self._scope(config)
        reasons = {filled(pattern, names): reason for pattern, reason in self.ignore.items()}
        reasons |= {
            self.prefix + key: f"the same as `{self.prefix}{other}`"
            for key, other in self.same.items()
        }
        any_of_them = re.compile("|".join(map(fnmatch.translate, reasons)) or _NOTHING)

        def reason_of(key: str) -> str | None:
            if not any_of_them.match(key):  # most keys: one search for all patterns
                return None
            known = reasons.items()
            return next(why for pattern, why in known if fnmatch.fnmatchcase(key, pattern))

        return reason_of

    def adjusted(self, told: Mapping[str, Any]) -> dict[str, Any]:
        """What the tensors of this layout tell, as a model has it."""
        values = {option: evaluate(text, told) for option, text in self.adjust.items()}
        return {**told, **values}

    def regenerated(self, config: Mapping[str, Any]) -> dict[str, str]:
        """The source keys that are made again for a model -> how."""
        names = self._scope(config)
        return {filled(key, names): filled(rule, names) for key, rule in self.regenerate.items()}

    def shapes_of(self, source_shape: SourceShape) -> Callable[..., Shape | None]:
        """What gives the shape of a target by its key, for source tensors of known shapes.

        Args:
            source_shape: gives the shape of a source tensor by its name; None for one that is not
                there.

        What is returned takes the names that expressions may use beside the key; it gives None for
        a target whose source is not there.
        """
        expansions: dict[int, _Expansion] = {}

        def shape_of(key: str, names: Mapping[str, Any]) -> Shape | None:
            if id(names) not in expansions:
                expansions[id(names)] = _Expansion(self, Scope(names, self.let, remember=False))
            try:
                return self._shape(
                    expansions[id(names)].explain(tuple(key.split("."))), source_shape
                )
            except MappingError:  # what it depends on is not told
                return None

        return shape_of

    def _shape(self, explained: _Explained | None, source_shape: SourceShape) -> Shape | None:
        if explained is None:
            return None
        path = explained.source
        shape = source_shape(self.spelling.spell(path) if self.spelling else path)
        if shape is None or explained.op is None:
            return shape
        parts = explained.op.results or explained.parts
        return explained.op.shapes([shape], parts)[explained.place]

    def _scope(self, config: Mapping[str, Any]) -> Scope:
        return Scope(config, self.let)

    def links(self, targets: Iterable[str], config: Mapping[str, Any]) -> list[Link]:
        """Expand the table over target keys, in their order; one link per source tensor.

        Raises:
            MappingError: no row explains a key, two rows claim one source, or two sources have one
                name.
        """
        expansion = _Expansion(self, self._scope(config))
        found: dict[str, _Explained] = {}  # source path -> what explains it
        parts: dict[str, dict[int, str]] = {}  # the same -> place among fused parts -> target
        unexplained: list[str] = []
        for key in filter(self.covers, targets):
            explained = expansion.explain(tuple(key.split(".")))
            if explained is None:
                unexplained.append(key)
                continue
            source = explained.source
            places = parts.setdefault(source, {})
            first = found.setdefault(source, explained)
            if first.row != explained.row or explained.place in places:
                others = tuple(places.values())
                raise MappingError(f"{self.name}: `{source}` is claimed by {others} and `{key}`")
            places[explained.place] = key
        if unexplained:
            raise MappingError(
                f"{self.name}: no row explains {unexplained[0]} (and {len(unexplained) - 1} more)"
            )
        spelled = self._spelled(list(found))
        links = []
        for source, how in found.items():
            fused = tuple(key for _, key in sorted(parts[source].items()))
            if how.op and how.op.results not in (None, len(fused)):
                raise MappingError(
                    f"{self.name}: op `{how.op}` makes {how.op.results} tensors of `{source}`, but"
                    f" the row names {len(fused)}: {', '.join(fused)}"
                )
            links.append(Link((spelled[source],), fused, how.op, how.row))
        return links

    def _spelled(self, paths: Sequence[str]) -> dict[str, str]:
        """Source path -> its name, each of which must be one path's alone."""
        if self.spelling is None:
            return {path: path for path in paths}
        owners: dict[str, str] = {}
        for path in paths:
            name = self.spelling.spell(path)
            if name in owners:
                raise MappingError(
                    f"{self.name}: `{owners[name]}` and `{path}` are both spelled `{name}`"
                )
            owners[name] = path
        return {path: name for name, path in owners.items()}


EMPTY = Table("", None, {}, {}, {}, "", None, {}, {}, {}, {}, {}, "")
"""What a table extends that names no other."""


def _sections(
    inherited: Mapping[str, tuple[Row, ...]], own: Mapping[str, Mapping[str, str]]
) -> dict[str, tuple[Row, ...]]:
    """The rows of a base and of a file, the most specific first; a row replaces the base's with the
    same left side."""
    rows = {section: {row.path: row for row in known} for section, known in inherited.items()}
    for section, entries in own.items():
        known = rows.get(section, {}).values()
        kept = {row.path: row for row in known if row.left not in entries}
        rows[section] = kept | _rows(section, entries)
    return {
        section: tuple(sorted(known.values(), key=lambda row: row.rank, reverse=True))
        for section, known in rows.items()
    }


def _rows(section: str, entries: Mapping[str, str]) -> dict[str, Row]:
    """The rows of one section of a file, by what they match."""
    rows: dict[str, Row] = {}
    for left, value in entries.items():
        for row in Row.parse(section, left, value):
            if row.path in rows:
                raise MappingError(f"[{section}] has two rows for `{row.path}`")
            rows[row.path] = row
    return rows


class _Explained(NamedTuple):
    """What a table says of one target key: its source path, its place among the parts of a fused
    tensor and how many there are, the op, the rows."""

    source: str
    place: int
    parts: int
    op: Op | None
    row: str


class _Step(NamedTuple):
    """One row applied to the front of a key: what it took, what it gave, and what goes on."""

    row: Row
    scope: Mapping[str, Any]
    source: tuple[str, ...]
    then: str


class _Expansion:
    """A table at work on the keys of one model. Keys share their fronts, so each step is remembered
    by its front."""

    def __init__(self, table: Table, names: Mapping[str, Any]) -> None:
        self._table = table
        self._names = names
        self._depth = {
            section: max(row.length for row in rows)
            for section, rows in table.sections.items()
            if rows
        }
        self._steps: dict[tuple[str, tuple[str, ...]], _Step | None] = {}

    def explain(self, key: tuple[str, ...]) -> _Explained | None:
        """What the table says of a target key, given in segments; None if no row fits."""
        section = "main"
        scope = self._names
        taken = 0
        place = 0
        parts = 1
        source: list[str] = []
        rows: list[str] = []
        while True:
            step = self._step(section, key, taken, scope)
            if step is None:
                return None
            row = step.row
            rows.append(row.text)
            source += step.source
            taken += row.length
            scope = step.scope
            if row.place is not None:
                place = row.place
                parts = row.parts
            if step.then not in self._table.sections:
                break
            section = step.then
        if step.then and taken < len(key):
            return None  # an op ends a key; a longer one needs its own row
        path = self._table.prefix + ".".join((*source, *key[taken:]))
        op = Op.parse(step.then) if step.then else None
        return _Explained(path, place, parts, op, " / ".join(rows))

    def _step(
        self, section: str, key: tuple[str, ...], taken: int, scope: Mapping[str, Any]
    ) -> _Step | None:
        front = section, key[: taken + self._depth.get(section, 0)]
        if front not in self._steps:
            self._steps[front] = self._first(section, key[taken:], scope)
        return self._steps[front]

    def _first(
        self, section: str, segments: tuple[str, ...], scope: Mapping[str, Any]
    ) -> _Step | None:
        """The most specific row that matches."""
        for row in self._table.sections.get(section, ()):
            bound = row.match(segments)
            if bound is not None:
                numbers = {name: int(text) for name, text in bound.items() if text.isdigit()}
                known = ChainMap(numbers, scope)  # type: ignore[arg-type]  # nothing is written
                return _Step(row, known, row.write(bound, known), row.then_for(known))
        return None
