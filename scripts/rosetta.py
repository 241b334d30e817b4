#!/usr/bin/env python
"""Print every mapping table side by side, as Markdown: a section for each component of each family,
a row for each group of keys. What families have in common is there once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from weightport.converters.planning.keys import collapse
from weightport.mappings.families import Component, families
from weightport.mappings.library import all_tables
from weightport.mappings.table import Link, Table

INTRODUCTION = """\
# Tables side by side

What each layout calls a tensor of diffusers: all tables, expanded over the key lists of the stock
models. `{0..3}` is any of these numbers; how those of two columns belong together is said by the
rows of the tables ([the language](table-language.md)). Where a tensor is rearranged on its way to
diffusers, the op stands below its name; `1/3` is the first of three parts.
"""


@dataclass(frozen=True)
class Named:
    """What a layout calls one tensor: the source key, and what is done to it."""

    key: str
    remark: str

    @property
    def skeleton(self) -> tuple[str, str]:
        """The same for keys that differ only in whole numbers."""
        return _skeleton(self.key), self.remark


def main() -> None:
    """Print the page."""
    print(page())


def page() -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    first: dict[tuple[str, ...], str] = {}  # a section -> the family that has it first
    for family in families().values():
        parts.append(f"## {family.title}\n")
        for component in family.components.values():
            for filled in (component, *component.instead.values()):
                lines = section(filled)
                title = first.setdefault(tuple(lines[1:]), family.title)
                if lines and title != family.title:
                    lines = [lines[0], f"As of {title}.\n"]
                parts += lines
    return "\n".join(parts)


def section(component: Component) -> list[str]:
    """The lines about one component: tables of its layouts, a column each."""
    tables = _tables(component)
    keys = list(component.manifest())
    read = {_heading(table): _names(table, keys, component) for table in tables}
    columns = {heading: names for heading, names in read.items() if not _the_same(names)}
    if not columns:
        return []
    heading = ["diffusers", *columns]
    lines = [
        f"### {component.name}, {component.class_name}\n",
        _line(heading),
        _line("---" for _ in heading),
    ]
    for group in _groups(keys, list(columns.values())):
        cells = [_cell([Named(key, "") for key in group])]
        cells += [
            _cell([names[key] for key in group if key in names]) for names in columns.values()
        ]
        lines.append(_line(cells))
    return [*lines, ""]


def _tables(component: Component) -> list[Table]:
    """The tables that read a component from a layout, diffusers' own spellings last."""
    serving = [
        table
        for table in all_tables()
        if component.family in table.about["families"]
        and families()[component.family].filled_by(table) is component
    ]
    return sorted(serving, key=lambda table: table.about["layout"] == "diffusers")


def _heading(table: Table) -> str:
    """Title and name, and how names are spelled that have no dots: the column shows their paths."""
    heading = f"{table.about['title']}<br>`{table.name}`"
    if table.spelling is None:
        return heading
    begins = f", after `{table.spelling.prefix}`" if table.spelling.prefix else ""
    joint = f"with `{table.spelling.join}`" if table.spelling.join else "with nothing"
    return f"{heading}<br>written {joint} for dots{begins}"


def _names(table: Table, keys: list[str], component: Component) -> dict[str, Named]:
    """Target key -> what a table calls it."""
    names = {}
    dotted = replace(table, spelling=None)
    for link in dotted.links(keys, component.config):
        for place, target in enumerate(link.targets):
            names[target] = Named(link.sources[0], _remark(link, place))
    return names


def _the_same(names: dict[str, Named]) -> bool:
    """Whether a layout calls every tensor as diffusers does."""
    return all(key == named.key and not named.remark for key, named in names.items())


def _remark(link: Link, place: int) -> str:
    if link.op is None:
        return ""
    if len(link.targets) == 1:
        return str(link.op)
    return f"{link.op}, {place + 1}/{len(link.targets)}"


def _groups(keys: list[str], columns: list[dict[str, Named]]) -> list[list[str]]:
    """Target keys that differ only in whole numbers, in every layout."""
    groups: dict[object, list[str]] = {}
    for key in keys:
        skeletons = [names[key].skeleton if key in names else None for names in columns]
        groups.setdefault((_skeleton(key), *skeletons), []).append(key)
    return list(groups.values())


def _skeleton(key: str) -> str:
    return ".".join("#" if segment.isdigit() else segment for segment in key.split("."))


def _cell(names: list[Named]) -> str:
    """One cell: the pattern of a group, and what is done to its tensors."""
    if not names:
        return ""
    ((pattern, _),) = collapse(name.key for name in names)
    remark = names[0].remark
    return f"`{pattern}`<br>`{remark}`" if remark else f"`{pattern}`"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
