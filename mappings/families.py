"""The model families: what the repository of a stock model holds.

And how a model of other widths differs from it.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from .facts import facts

NAMES = ("sd1", "sd2", "sdxl", "sdxl_refiner", "upscaler")
"""Every family, the preferred ones first where a file fits several; each has its file."""

FOLDER = Path(__file__).resolve().parent

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Component:
    """One model of a repository.

    Attributes:
        family: the name of its family.
        name: the name of its folder, `unet`.
        library: the library that `model_index.json` names, `diffusers` or `transformers`.
        class_name: the class that `model_index.json` names.
        config: the stock `config.json`, less class name, versions and paths.
        sizes: option -> the tensor axes, `"key axis"`, that tell its value; see
            `facts/classes.toml`.
        own: option -> `"key axis"`, the axis of the one tensor that it changes; these are among the
            sizes.
        derive: option -> `"other // divisor"`, for options that follow from another.
        halves: parts that may lie in a file without the rest -> the beginnings of their keys.
        pipelines: of a model that extends others (a ControlNet): input channels of the denoiser ->
            the class of a pipeline that has it. Empty for a component that every pipeline of the
            family has.
    """

    family: str
    name: str
    library: str
    class_name: str
    config: dict[str, Any]
    sizes: dict[str, list[str]]
    own: dict[str, str]
    derive: dict[str, str]
    halves: dict[str, list[str]]
    pipelines: dict[int, str]

    @property
    def extends(self) -> bool:
        """Whether it is no piece of a pipeline, but a model that extends others: a ControlNet."""
        return bool(self.pipelines)

    @property
    def open_axes(self) -> frozenset[str]:
        """Keys of the tensors of which a model may have more rows or input channels than stock."""
        return frozenset(place.split()[0] for place in self.own.values())

    def half_of(self, key: str) -> str:
        """The half that a tensor belongs to.

        Raises:
            KeyError: to none.
        """
        for half, fronts in self.halves.items():
            if any(key == front or key.startswith(f"{front}.") for front in fronts):
                return half
        raise KeyError(key)

    def manifest(self, config: Mapping[str, Any] | None = None) -> dict[str, Shape]:
        """Key -> shape of every tensor of the stock model, in the order of its state dict.

        With a config, `own` axes are as long as it says: token rows added by textual inversion,
        input channels.
        """
        config = config or self.config
        shapes = dict(_stock_shapes(self.family, self.name))
        for option, place in self.own.items():
            key, axis = place.split()
            shape = list(shapes[key])
            shape[int(axis)] = config[option]
            shapes[key] = tuple(shape)
        return shapes


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer of a repository.

    Attributes:
        encoder: the text encoder that it serves.
        pad_token: what fills a prompt up.
    """

    class_name: str
    encoder: str
    pad_token: str


@dataclass(frozen=True)
class Family:
    """Models of one architecture.

    Attributes:
        denoiser: the component that predicts noise.
        autoencoder: the component that turns images into latents and back.
        components: by folder name.
        pipelines: input channels of the denoiser -> the pipeline class that such a model is for.
        index: what else `model_index.json` says.
        scheduler: the stock `scheduler_config.json`.
        schedulers: folder -> the stock `scheduler_config.json` of further schedulers.
        tokenizers: by folder name.
        v_prediction: component -> how its config differs in a model that predicts v.
        needs: input channels of the denoiser -> what its pipeline needs besides, in words.
    """

    name: str
    title: str
    denoiser: str
    autoencoder: str
    components: dict[str, Component]
    pipelines: dict[int, str]
    index: dict[str, Any]
    scheduler: dict[str, Any]
    schedulers: dict[str, dict[str, Any]]
    tokenizers: dict[str, Tokenizer]
    v_prediction: dict[str, dict[str, Any]]
    needs: dict[int, list[str]]

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """The components that tokenizers serve, in order."""
        return tuple(tokenizer.encoder for tokenizer in self.tokenizers.values())

    @property
    def latent_scale(self) -> int:
        """Pixels of an image along a side for each latent pixel."""
        stages = self.components[self.autoencoder].config["block_out_channels"]
        return int(2 ** (len(stages) - 1))


@cache
def families() -> dict[str, Family]:
    """Every known family by name. Treat as read-only."""
    return {name: _family(name) for name in NAMES}


@cache
def component_names() -> tuple[str, ...]:
    """The components of all families: text encoders, then denoisers, then the rest."""
    known = families().values()
    encoders = [name for family in known for name in family.text_encoders]
    denoisers = [family.denoiser for family in known]
    rest = [name for family in known for name in family.components]
    return tuple(dict.fromkeys([*encoders, *denoisers, *rest]))


@cache
def halves() -> dict[str, str]:
    """Parts that may lie in a file without the rest of their component -> the component."""
    components = [
        component for family in families().values() for component in family.components.values()
    ]
    return {half: component.name for component in components for half in component.halves}


def halves_of(component: str) -> list[str]:
    """The parts of a component that may lie in a file without the rest."""
    return [half for half, whole in halves().items() if whole == component]


def config_for(component: Component, shapes: Mapping[str, Shape]) -> dict[str, Any]:
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
            config[option] = _sizes(places, stock, shapes)
        else:
            config[option] = _size(places, stock, shapes)
    for option, rule in component.derive.items():
        config[option] = _derived(rule, config)
    return config


def read_manifest(path: Path) -> dict[str, Shape]:
    """The tensors that a manifest file lists, `key 320x4x3x3` a line; a # begins a comment."""
    shapes = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            key, sides = line.split()
            shapes[key] = tuple(map(int, sides.split("x")))
    return shapes


@cache
def _stock_shapes(family: str, component: str) -> dict[str, Shape]:
    """The manifest of a component, read once."""
    return read_manifest(FOLDER / "manifests" / f"{family}_{component}.txt")


@cache
def _document(family: str) -> dict[str, Any]:
    """The file of a family."""
    path = FOLDER / "families" / f"{family}.toml"
    return tomllib.loads(path.read_text(encoding="utf-8"))


def _family(name: str) -> Family:
    document = _document(name)
    tokenizers = document["tokenizers"].items()
    return Family(
        name=name,
        title=document["title"],
        denoiser=document["denoiser"],
        autoencoder=document["autoencoder"],
        components={key: _component(name, key) for key in document["components"]},
        pipelines=_by_channels(document["pipelines"]),
        index=document["index"],
        scheduler=document["scheduler"],
        schedulers=document.get("schedulers", {}),
        tokenizers={folder: _tokenizer(entry) for folder, entry in tokenizers},
        v_prediction=document.get("v_prediction", {}),
        needs=_by_channels(document.get("needs", {})),
    )


def _tokenizer(entry: Mapping[str, str]) -> Tokenizer:
    return Tokenizer(entry["class"], entry["encoder"], entry["pad_token"])


def _component(family: str, name: str) -> Component:
    entry = _merged(family, name)
    known = facts("classes")[entry["class"]]
    own = known.get("own", {})
    sizes = known["sizes"] | own
    return Component(
        family=family,
        name=name,
        library=known["library"],
        class_name=entry["class"],
        config=entry["config"],
        sizes={option: _listed(places) for option, places in sizes.items()},
        own=own,
        derive=entry.get("derive", {}),
        halves=entry.get("halves", {}),
        pipelines=_by_channels(entry.get("pipelines", {})),
    )


def _merged(family: str, name: str) -> dict[str, Any]:
    """The entry of a component, on top of the one it is `like`."""
    entry: dict[str, Any] = _document(family)["components"][name]
    if "like" not in entry:
        return entry
    base = _merged(*entry["like"].split("."))
    config = base["config"] | entry.get("config", {})
    return {**base, **entry, "config": config}


def _by_channels(entry: Mapping[str, Any]) -> dict[int, Any]:
    return {int(channels): value for channels, value in entry.items()}


def _listed(places: str | list[str]) -> list[str]:
    return [places] if isinstance(places, str) else places


def _sizes(places: list[str], stock: list[int], shapes: Mapping[str, Shape]) -> list[int]:
    """A size for each stage of a model; `{i}` counts from the front, `{j}` from the back."""
    sizes = []
    for i, default in enumerate(stock):
        numbered = [place.format(i=i, j=len(stock) - 1 - i) for place in places]
        sizes.append(_size(numbered, default, shapes))
    return sizes


def _size(places: list[str], default: int, shapes: Mapping[str, Shape]) -> int:
    """The size at the first of the places, `"key axis"`, that is there."""
    for place in places:
        key, axis = place.split()
        if len(shapes.get(key, ())) > int(axis):
            return shapes[key][int(axis)]
    return default


def _derived(rule: str, config: dict[str, Any]) -> Any:
    """The value of `"other // divisor"`, for each element of a list.

    A narrow model has one head, not none.
    """
    other, divisor = rule.split(" // ")
    value = config[other]
    if isinstance(value, list):
        return [max(1, width // int(divisor)) for width in value]
    return max(1, value // int(divisor))
