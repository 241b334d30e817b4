"""How adapter files name the modules of a model: `conventions/*.toml`, one a naming convention.

Nothing is searched for: a module of an adapter is a `.weight` of the model's key list, named as a
table of another layout names it, with a prefix, its segments joined by dots or underscores. What
the tensors of a module are called, and what they make, is in `facts/adapters.toml`.
"""

from __future__ import annotations

import fnmatch
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .facts import facts
from .families import families
from .spelling import Spelling

if TYPE_CHECKING:
    from .ops import Op

NAMES = (
    "kohya",
    "kohya-sgm",
    "peft",
    "diffusers-processors",
    "original",
    "onetrainer",
    "xlabs",
    "kohya-oft",
    "lycoris",
)
"""Every convention, those that are written first; each has its file."""

_FOLDER = Path(__file__).resolve().parent / "conventions"
_WEIGHT = ".weight"


class Layer(NamedTuple):
    """A layer as a convention names it.

    Attributes:
        name: by its spelling.
        modules: the model's own layers that its rows belong to, one or several.
        op: what makes their weights of its weight; None where it is the same.
        leaf: what its weight is called.
    """

    name: str
    modules: tuple[str, ...]
    op: Op | None
    leaf: str


@dataclass(frozen=True)
class Naming:
    """How modules of one component are named.

    Attributes:
        spelling: the prefix, and what joins the segments of a name.
        table: the name of the table whose sources name the modules; empty for diffusers' names.
        modules: patterns of the modules that are named so; empty for all.
        families: where it is so; empty for everywhere.
        roles: role -> the ending that is written, where it is another than the convention's.
    """

    component: str
    spelling: Spelling
    table: str
    modules: tuple[str, ...]
    families: tuple[str, ...]
    roles: Mapping[str, str] = field(hash=False)

    def serves(self, family: str) -> bool:
        """Whether it names modules of a family."""
        return not self.families or family in self.families

    def layers(self, keys: Iterable[str], config: Mapping[str, Any]) -> list[Layer]:
        """The layers whose weights are among the keys of a component's state dict.

        Raises:
            MappingError: two layers have one name.
        """
        weights = [key for key in keys if key.endswith(_WEIGHT) and self._covers(key)]
        if not self.table:
            return [self._layer(key, (key,), None) for key in weights]
        from .library import load_table  # numpy, which the command line does without

        table = load_table(self.table)
        return [
            self._layer(link.sources[0].removeprefix(table.prefix), link.targets, link.op)
            for link in table.links(weights, config)
        ]

    def beginnings(self, keys: Iterable[str]) -> set[str]:
        """How names of layers begin, for layers among the keys of a component's state dict."""
        if not self.table:
            fronts = {key.partition(".")[0] for key in keys}
        else:
            from .library import load_table

            fronts = load_table(self.table).fronts
        return {self.spelling.prefix + front for front in fronts}

    def _layer(self, source: str, targets: tuple[str, ...], op: Op | None) -> Layer:
        path, _, leaf = source.rpartition(".")
        modules = tuple(target.removesuffix(_WEIGHT) for target in targets)
        return Layer(self.spelling.spell(path), modules, op, leaf)

    def _covers(self, key: str) -> bool:
        module = key.removesuffix(_WEIGHT)
        return not self.modules or any(
            fnmatch.fnmatchcase(module, pattern) for pattern in self.modules
        )


@dataclass(frozen=True)
class Convention:
    """One way to name the modules of a model, and the tensors of a module.

    Attributes:
        title: what it is called.
        namings: the first that fits is written, all are read.
        roles: role -> the ending that is written.
        is_written: whether files are written so, or only read.
        alphas: where they are: in `tensors`, in the `header`, or `nowhere`, so that each is the
            rank.
        clamps: whether alpha bounds the norm of a rotation even where it is 0.
        flavours: what it can hold; empty for everything.
        lacks: roles that it has no name for.
        rows_only: whether magnitudes are those of rows only, of shape (o,).
    """

    name: str
    title: str
    namings: tuple[Naming, ...]
    roles: Mapping[str, str] = field(default_factory=dict)
    is_written: bool = True
    alphas: str = "tensors"
    clamps: bool = False
    flavours: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    rows_only: bool = False

    def of(self, component: str, family: str) -> Iterator[Naming]:
        """The namings of a component, the one that is written first."""
        for naming in self.namings:
            if naming.component == component and naming.serves(family):
                yield naming

    def ending(self, naming: Naming, role: str) -> str:
        """How the name of a tensor of a module ends."""
        written: str = facts("adapters")["roles"][role][0]
        return naming.roles.get(role) or self.roles.get(role) or written


@cache
def conventions() -> dict[str, Convention]:
    """Every convention by name. Treat as read-only."""
    return {name: _convention(name) for name in NAMES}


def written() -> tuple[str, ...]:
    """Names of the conventions that files are written in."""
    return tuple(name for name, one in conventions().items() if one.is_written)


@cache
def stock_layers(naming: Naming, family: str) -> dict[str, Layer]:
    """Module -> the layer that it is in, in the stock model of a family; nothing if the family
    lacks the component. Treat as read-only."""
    component = families()[family].components.get(naming.component)
    if component is None or not naming.serves(family):
        return {}
    layers = naming.layers(component.manifest(), component.config)
    return {module: layer for layer in layers for module in layer.modules}


def _convention(name: str) -> Convention:
    text = (_FOLDER / f"{name}.toml").read_text(encoding="utf-8")
    entry = tomllib.loads(text)
    namings = [
        _naming(component, entry["join"], one)
        for component, several in entry.items()
        if isinstance(several, list) and several and isinstance(several[0], dict)
        for one in several
    ]
    return Convention(
        name=name,
        title=entry["title"],
        namings=tuple(namings),
        roles=entry.get("roles", {}),
        is_written=not entry.get("read_only", False),
        alphas=entry.get("alphas", "tensors"),
        clamps=entry.get("clamps", False),
        flavours=tuple(entry.get("holds", ())),
        lacks=tuple(entry.get("lacks", ())),
        rows_only=entry.get("magnitude") == "rows",
    )


def _naming(component: str, join: str, entry: Mapping[str, Any]) -> Naming:
    return Naming(
        component=component,
        spelling=Spelling(entry["prefix"], join),
        table=entry.get("table", ""),
        modules=tuple(entry.get("modules", ())),
        families=tuple(entry.get("families", ())),
        roles=entry.get("roles", {}),
    )
