"""The model families: what the repository of a stock model holds, and how a model of other widths
differs from it."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

_FACTS = (
    "index",
    "scheduler",
    "schedulers",
    "tokenizers",
    "v_prediction",
    "pipelines",
    "needs",
)  # no components

FOLDER = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Component:
    """One model of a repository.

    Attributes:
        family: the name of its family.
        name: the name of its folder, `unet`.
        library: the library that `model_index.json` names, `diffusers` or `transformers`.
        class_name: the class that `model_index.json` names.
        config: the stock `config.json`, less class name, versions and paths.
        sizes: option -> the tensor axes, `"key axis"`, that tell its value; see `families.toml`.
        own: option -> `"key axis"`, the axis of the one tensor that it changes; these are among the
            sizes.
        derive: option -> `"other // divisor"`, for options that follow from another.
        pipelines: of a model that extends others (a ControlNet): input channels of the UNet -> the
            class of a pipeline that has it. Empty for a component that every pipeline of the family
            has.
    """

    family: str
    name: str
    library: str
    class_name: str
    config: dict[str, Any]
    sizes: dict[str, list[str]]
    own: dict[str, str]
    derive: dict[str, str]
    pipelines: dict[int, str]

    def manifest(self, config: Mapping[str, Any] | None = None) -> dict[str, tuple[int, ...]]:
        """Key -> shape of every tensor of the stock model, in the order of its state dict.

        With a config, `own` axes are as long as it says: token rows added by textual inversion,
        input channels.
        """
        shapes = read_manifest(FOLDER / "manifests" / f"{self.family}_{self.name}.txt")
        for option, place in self.own.items():
            key, axis = place.split()
            shape = list(shapes[key])
            shape[int(axis)] = (config or self.config)[option]
            shapes[key] = tuple(shape)
        return shapes


@dataclass(frozen=True)
class Family:
    """Models of one architecture.

    Attributes:
        components: by folder name.
        pipelines: input channels of the UNet -> the pipeline class that such a model is for.
        index: what else `model_index.json` says.
        scheduler: the stock `scheduler_config.json`.
        schedulers: folder -> the stock `scheduler_config.json` of further schedulers.
        tokenizers: folder -> the token it pads with.
        v_prediction: component -> how its config differs in a model that predicts v.
        needs: input channels of the UNet -> what its pipeline needs besides, in words.
    """

    name: str
    title: str
    components: dict[str, Component]
    pipelines: dict[int, str]
    index: dict[str, Any]
    scheduler: dict[str, Any]
    schedulers: dict[str, dict[str, Any]]
    tokenizers: dict[str, str]
    v_prediction: dict[str, dict[str, Any]]
    needs: dict[int, list[str]]


@cache
def families() -> dict[str, Family]:
    """Every known family by name, from `families.toml`. Treat as read-only."""
    document = tomllib.loads((FOLDER / "families.toml").read_text(encoding="utf-8"))
    own = document.pop("own")
    sizes = {name: (table, own.get(name, {})) for name, table in document.pop("sizes").items()}
    return {name: _family(name, table, document, sizes) for name, table in document.items()}


def config_for(component: Component, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The stock config with the sizes that a model of these shapes has.

    Args:
        component: the stock component.
        shapes: target key -> shape, of all tensors or of some; a size that no tensor tells stays as
            in stock.
    """
    config = deepcopy(component.config)
    for option, places in component.sizes.items():
        stock = config[option]
        if isinstance(stock, list):
            last = len(stock) - 1
            numbered = [
                [place.format(i=i, j=last - i) for place in places] for i in range(len(stock))
            ]
            config[option] = [_size(*pair, shapes) for pair in zip(numbered, stock, strict=True)]
        else:
            config[option] = _size(places, stock, shapes)
    for option, rule in component.derive.items():
        config[option] = _derived(rule, config)
    return config


def read_manifest(path: Path) -> dict[str, tuple[int, ...]]:
    """The tensors a manifest file lists, one `key 320x4x3x3` a line; lines that begin with # are
    comments."""
    lines = [
        line.split()
        for line in path.read_text(encoding="utf-8").splitlines()
        if not line.startswith("#")
    ]
    return {key: tuple(map(int, shape.split("x"))) for key, shape in lines}


def _family(
    name: str, table: dict[str, Any], document: dict[str, Any], sizes: dict[str, Any]
) -> Family:
    """A family from its table in the document."""
    components = {
        key: _component(name, key, _merged(value, document), sizes)
        for key, value in table.items()
        if isinstance(value, dict) and key not in _FACTS
    }
    facts: dict[str, Any] = {fact: dict(table.get(fact, {})) for fact in _FACTS}
    facts |= {fact: _by_channels(table, fact) for fact in ("pipelines", "needs")}
    return Family(name=name, title=table["title"], components=components, **facts)


def _by_channels(table: dict[str, Any], fact: str) -> dict[int, Any]:
    return {int(channels): value for channels, value in table.get(fact, {}).items()}


def _merged(table: dict[str, Any], document: dict[str, Any]) -> dict[str, Any]:
    """The table of a component, on top of the one it is `like`."""
    if "like" not in table:
        return table
    family, name = table["like"].split(".")
    base = _merged(document[family][name], document)
    return {**base, **table, "config": {**base["config"], **table.get("config", {})}}


def _component(family: str, name: str, table: dict[str, Any], sizes: dict[str, Any]) -> Component:
    """A component from its merged table."""
    class_name = table["class"]
    axes, own = sizes[class_name]
    places = {
        option: [place] if isinstance(place, str) else place
        for option, place in (axes | own).items()
    }
    facts = table["library"], class_name, table["config"], places, own, table.get("derive", {})
    return Component(family, name, *facts, _by_channels(table, "pipelines"))


def _size(places: list[str], default: int, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """The size at the first of the places, `"key axis"`, that is there."""
    for place in places:
        key, axis = place.split()
        if len(shapes.get(key, ())) > int(axis):
            return shapes[key][int(axis)]
    return default


def _derived(rule: str, config: dict[str, Any]) -> Any:
    """The value of `"other // divisor"`, element by element for a list; a narrow model has one
    head, not none."""
    other, divisor = rule.split(" // ")
    value = config[other]
    if isinstance(value, list):
        return [max(1, width // int(divisor)) for width in value]
    return max(1, value // int(divisor))
