"""Classes of models: what their tensors tell of a config, and which tensors a config asks for.

`classes/<class>.toml`, see `classes/UNet2DConditionModel.toml`.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from .expressions import Scope, agree, evaluate, same
from .modules import Module, Shape, parse_modules, tensors
from .reading import Options, Rule, ShapeOf, read

FOLDER = Path(__file__).resolve().parent / "classes"

_ALWAYS = "True"  # where an option matters that always does

_HEADER = (
    "extends",
    "library",
    "signs",
    "marks",
    "sizes",
    "own",
    "defaults",
    "known",
    "nested",
    "heads",
    "let",
    "read",
    "untold",
)


class Heads(NamedTuple):
    """Where a config says the heads of attention, which no tensor tells.

    Attributes:
        option: their number, or one for each width.
        width: the option that they divide.
    """

    option: str
    width: str


@dataclass(frozen=True, eq=False)
class ModelClass:
    """A class of models.

    Attributes:
        library: who has it, `diffusers` or `transformers`.
        signs: tensors of which every such model has one.
        marks: options that tell the families apart, whatever the sizes are.
        sizes: options that change sizes of tensors only.
        own: the sizes that are those of one tensor or layer alone.
        defaults: of options that a config may leave out.
        known: option -> the values, or elements of a list, that the modules describe.
        nested: an option of a larger model's config that holds these.
        heads: where a config says the heads of attention; None if there is one head.
        lets: names for expressions over options.
        rules: option -> how tensors tell it.
        untold: options that no tensor tells and that matter -> where they do.
        modules: what a model holds.
    """

    name: str
    library: str
    signs: tuple[str, ...]
    marks: tuple[str, ...]
    sizes: tuple[str, ...]
    own: tuple[str, ...]
    defaults: Mapping[str, Any]
    known: Mapping[str, list[Any]]
    nested: str | None
    heads: Heads | None
    lets: Mapping[str, str]
    rules: Mapping[str, Rule]
    untold: Mapping[str, str]
    modules: Mapping[str, Module]

    @property
    def options(self) -> list[str]:
        """The options that tensors tell."""
        return [option for option in self.rules if not option.startswith("_")]

    @property
    def own_tensors(self) -> frozenset[str]:
        """The tensors that tell the `own` sizes, in which a stock model may differ."""
        places = [place for option in self.own for place in self.rules[option].size]
        return frozenset(place.rpartition(" ")[0] for place in places)

    def stated(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """The options in the content of a `config.json`, which may be a larger model's."""
        inner = config.get(self.nested) if self.nested else None
        return inner if isinstance(inner, dict) else config

    def names(self, config: Mapping[str, Any]) -> Scope:
        """What expressions may use: the options of a config, completed, and the `let`."""
        return Scope({**dict.fromkeys(self.options), **self.defaults, **config}, self.lets)

    def describes(self, config: Mapping[str, Any]) -> bool:
        """Whether the modules describe a model with a config; else it is taken at its word."""
        return all(
            _elements(config.get(option)) <= {None, *values}
            for option, values in self.known.items()
        )

    def tensors(self, config: Mapping[str, Any]) -> Mapping[str, Shape]:
        """Key -> shape of every tensor of a model with a config.

        Raises:
            MappingError: the config makes no sense.
        """
        return _tensors(self, json.dumps(dict(config)))

    def read(self, shape_of: ShapeOf) -> Options:
        """What tensors tell of the config.

        Raises:
            MappingError: they are those of no such model.
        """
        return read(self.rules, self.lets, shape_of)

    def merged(self, base: Mapping[str, Any], told: Options) -> dict[str, Any]:
        """A config with what tensors tell; where that is the same, as the base spells it."""
        config = dict(base)
        for option, value in told.items():
            before = base.get(option, self.defaults.get(option))
            if not _says(before, value):
                config[option] = self._filled(option, before, value)
        return config

    def differing(self, config: Mapping[str, Any], other: Mapping[str, Any]) -> Options:
        """The options of a config that matter and that another one has otherwise.

        And those that matter in such a model, but not in others.
        """
        names = self.names(config)
        matters = {option: where for option, where in self.untold.items() if evaluate(where, names)}
        return {
            option: config[option]
            for option in dict.fromkeys([*self.options, *matters])
            if option in config
            and (
                matters.get(option, _ALWAYS) != _ALWAYS
                or config[option] != other.get(option, self.defaults.get(option))
            )
        }

    def likeness(self, config: Mapping[str, Any], other: Mapping[str, Any]) -> float:
        """How like another config is in what tensors tell, 0 to 1."""
        pairs = [self.both(option, config, other) for option in self.options]
        told = [pair for pair in pairs if pair != (None, None)]
        return sum(_likeness(*pair) for pair in told) / len(told)

    def marked_alike(self, config: Mapping[str, Any], other: Mapping[str, Any]) -> int:
        """How many marks another config has as well; of numbers and lists whether there are any."""
        pairs = [self.both(option, config, other) for option in self.marks]
        return sum(_kind(one) == _kind(two) for one, two in pairs)

    def built_alike(self, config: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
        """Whether a model of another config has the same tensors, though perhaps of other sizes."""
        pairs = [self.both(option, config, other) for option in self.options]
        built = [
            pair for option, pair in zip(self.options, pairs, strict=True) if self._builds(option)
        ]
        alike = all(spread_alike(one, two) for one, two in built)
        return alike and self.marked_alike(config, other) == len(self.marks)

    def unlike(self, config: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
        """The first option of a config that tensors tell and that another one has otherwise."""
        given = [option for option in self.options if option in config]
        pairs = [self.both(option, config, other) for option in given]
        found = zip(given, pairs, strict=True)
        return next((option for option, pair in found if not spread_alike(*pair)), None)

    def _builds(self, option: str) -> bool:
        return option not in self.sizes

    def both(
        self, option: str, config: Mapping[str, Any], other: Mapping[str, Any]
    ) -> tuple[Any, Any]:
        """The values of an option in two configs."""
        default = self.defaults.get(option)
        return config.get(option, default), other.get(option, default)

    def _filled(self, option: str, before: Any, told: Any) -> Any:
        """A value in which nothing is left open."""
        if not isinstance(told, list):
            return told
        known = [value for value in told if value is not None]
        one = same(known)
        is_list = isinstance(self.defaults.get(option, []), list)
        if known and not is_list and (one is not known or len(known) == 1):
            return one
        stock = before if isinstance(before, list) else [before] * len(told)
        padded = [*stock, *(known or stock)[:1] * len(told)]
        return [padded[i] if value is None else value for i, value in enumerate(told)]


@lru_cache(maxsize=64)
def _tensors(model: ModelClass, config: str) -> Mapping[str, Shape]:
    """Those of a config as JSON: the same few models are asked for again and again."""
    return tensors(model.modules, model.names(json.loads(config)))


def is_known(name: str) -> bool:
    """Whether there is a class of a name."""
    return name in model_classes()


@cache
def model_classes() -> tuple[str, ...]:
    """The names of all known classes."""
    return tuple(sorted(path.stem for path in FOLDER.glob("[A-Z]*.toml")))


@cache
def model_class(name: str) -> ModelClass:
    """The class of a name, which is read when it is first asked for.

    Raises:
        FileNotFoundError: it is not known.
    """
    document = tomllib.loads((FOLDER / f"{name}.toml").read_text(encoding="utf-8"))
    base = model_class(document["extends"]) if "extends" in document else _EMPTY
    sections = {key: value for key, value in document.items() if key not in _HEADER}
    rules = {option: Rule.parse(entry) for option, entry in document.get("read", {}).items()}
    return ModelClass(
        name=name,
        library=document.get("library", base.library),
        signs=tuple(document.get("signs", base.signs)),
        marks=tuple(document.get("marks", base.marks)),
        sizes=(*base.sizes, *document.get("sizes", ())),
        own=(*base.own, *document.get("own", ())),
        defaults={**base.defaults, **document.get("defaults", {})},
        known={**base.known, **document.get("known", {})},
        nested=document.get("nested", base.nested),
        heads=Heads(**document["heads"]) if "heads" in document else base.heads,
        lets={**base.lets, **document.get("let", {})},
        rules={**base.rules, **rules},
        untold={**base.untold, **document.get("untold", {})},
        modules=parse_modules(sections, base.modules),
    )


_EMPTY = ModelClass("", "", (), (), (), (), {}, {}, None, None, {}, {}, {}, {})


def _says(before: Any, told: Any) -> bool:
    """Whether a value of a config says what tensors tell; one value may stand for a whole list."""
    if told is None:
        return before is None
    if isinstance(told, list) and not isinstance(before, list):
        return before is not None and all(agree(before, value) for value in told)
    return before is not None and agree(before, told)


def spread_alike(one: Any, two: Any) -> bool:
    """Whether two values are the same; one may stand for a whole list."""
    if isinstance(one, list) and not isinstance(two, list):
        return all(value == two for value in one)
    if isinstance(two, list) and not isinstance(one, list):
        return spread_alike(two, one)
    return bool(one == two)


def _likeness(one: Any, two: Any) -> float:
    """How like two values are, 0 to 1: numbers by their ratio, lists by their elements."""
    if isinstance(one, list) or isinstance(two, list):
        first = one if isinstance(one, list) else [one] * len(two)
        second = two if isinstance(two, list) else [two] * len(one)
        total = sum(map(_likeness, first, second))
        return float(total) / max(len(first), len(second), 1)
    if type(one) is int and type(two) is int:
        return min(one, two) / max(one, two, 1)
    return float(one == two)


def _kind(value: Any) -> Any:
    if isinstance(value, list):
        return bool(value)
    return True if type(value) is int else value


def _elements(value: Any) -> set[Any]:
    """The values in an option, which may be a list."""
    values: Iterable[Any] = value if isinstance(value, list) else [value]
    return {value if isinstance(value, (str, bool, int, float)) else None for value in values}
