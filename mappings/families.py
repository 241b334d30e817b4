"""The model families: what the repository of a stock model holds.

And how a model of other widths differs from it.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .classes import ModelClass, model_class, spread_alike
from .reading import Options

if TYPE_CHECKING:
    from .table import Table

NAMES = (
    "sd1",
    "sd2",
    "sdxl",
    "sdxl_refiner",
    "upscaler",
    "sd3",
    "sd35_medium",
    "sd35_large",
    "flux",
    "flux_schnell",
    "chroma",
    "chroma_base",
    "chroma_flash",
    "zimage_turbo",
    "zimage",
    "flux2",
    "flux2_klein_4b",
    "flux2_klein_base_4b",
    "flux2_klein_9b",
    "flux2_klein_base_9b",
)
"""Every family, the preferred ones first where a file fits several; each has its file."""

FOLDER = Path(__file__).resolve().parent

Shape = tuple[int, ...]


class Component(NamedTuple):
    """One model of a repository.

    Attributes:
        family: the name of its family.
        name: the name of its folder, `unet`.
        class_name: the class that `model_index.json` names.
        config: the stock `config.json`, less class name, versions and paths.
        derive: option -> `"other // divisor"` or `"number of other"`, for options that follow from
            another, and that no tensor tells.
        halves: parts that may lie in a file without the rest -> the beginnings of their keys.
        pipelines: of a model that extends others (a ControlNet): input channels of the denoiser ->
            the class of a pipeline that has it. Empty for a component that every pipeline of the
            family has.
        instead: the classes that the model may be of in its place -> what the component is then.
    """

    family: str
    name: str
    class_name: str
    config: dict[str, Any]
    derive: dict[str, str]
    halves: dict[str, list[str]]
    pipelines: dict[int, str]
    instead: dict[str, Component]

    @property
    def model(self) -> ModelClass:
        """Its class."""
        return model_class(self.class_name)

    @property
    def extends(self) -> bool:
        """Whether it is no piece of a pipeline, but a model that extends others: a ControlNet."""
        return bool(self.pipelines)

    def half_of(self, key: str) -> str:
        """The half that a tensor belongs to.

        Raises:
            KeyError: to none.
        """
        for half, fronts in self.halves.items():
            if any(key == front or key.startswith(f"{front}.") for front in fronts):
                return half
        raise KeyError(key)

    @property
    def library(self) -> str:
        """The library that `model_index.json` names, `diffusers` or `transformers`."""
        return self.model.library

    def unusual(self, config: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """What tensors tell of a config, or follows from that, and is not as in stock.

        Returns:
            option -> (its value, the stock one), as options stand in the stock config.
        """
        told = [*self.model.options, *self.derive]
        options = [option for option in dict.fromkeys([*self.config, *told]) if option in told]
        pairs = {option: self.model.both(option, config, self.config) for option in options}
        return {option: pair for option, pair in pairs.items() if not spread_alike(*pair)}

    def completed(self, stated: Mapping[str, Any]) -> dict[str, Any]:
        """A stated config with what it leaves out, as its class has it, or else the stock model."""
        return {**self.config, **self.model.defaults, **stated}

    def manifest(self) -> dict[str, Shape]:
        """Key -> shape of every tensor of the stock model, in the order of its state dict."""
        return dict(_stock(self.family, self.name, self.class_name))

    def of_class(self, name: str | None) -> Component:
        """The component with a model of a class; None for the usual one.

        Raises:
            KeyError: it has no such model.
        """
        return self if name in (None, self.class_name) else self.instead[name]

    def config_for(self, told: Options, stated: Options | None = None) -> dict[str, Any]:
        """The stock config with what the tensors of a model tell.

        Args:
            told: see `ModelClass.read`.
            stated: options that no tensor tells, from elsewhere.
        """
        stated = stated or {}
        config = self.model.merged(deepcopy(self.config) | stated, told)
        for option, rule in self.derive.items():
            if option not in stated:
                config[option] = _derived(rule, config)
        return config


class Tokenizer(NamedTuple):
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
        copied: folder -> the library and the class of a component that is not converted, and that
            a pipeline needs.
        scheduler: the stock `scheduler_config.json`.
        schedulers: folder -> the stock `scheduler_config.json` of further schedulers.
        tokenizers: by folder name.
        v_prediction: component -> how its config differs in a model that predicts v.
        needs: input channels of the denoiser -> what its pipeline needs besides, in words.
        optional: components that a pipeline may do without, and their tokenizers.
        asks: whether it must be named where parts fit other families too and are configured
            otherwise there.
        runs: whether our runtime has its pipelines.
        adapted: whether files of adapters are told to be of it.
        tag: what cards call such models.
    """

    name: str
    title: str
    denoiser: str
    autoencoder: str
    components: dict[str, Component]
    pipelines: dict[int, str]
    index: dict[str, Any]
    copied: dict[str, list[str]]
    scheduler: dict[str, Any]
    schedulers: dict[str, dict[str, Any]]
    tokenizers: dict[str, Tokenizer]
    v_prediction: dict[str, dict[str, Any]]
    needs: dict[int, list[str]]
    optional: tuple[str, ...]
    asks: bool
    runs: bool
    adapted: bool
    tag: str

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """The components that tokenizers serve, in order."""
        return tuple(tokenizer.encoder for tokenizer in self.tokenizers.values())

    def filled_by(self, table: Table) -> Component:
        """The component that a table fills, with a model of the class that it is for."""
        name = table.of_family("component", self.name)
        return self.components[name].of_class(table.about.get("class"))

    def kind(self, config: Mapping[str, Any]) -> int:
        """Which denoiser of the family one of this config is: the input channels of the stock one.

        Latents may have another width: what comes in beside them tells.
        """
        stock = _output_channels(self.components[self.denoiser].config)
        added: int = config["in_channels"] - _output_channels({"out_channels": stock, **config})
        return stock + added

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


@cache
def _stock(family: str, component: str, class_name: str) -> Mapping[str, Shape]:
    described = families()[family].components[component].of_class(class_name)
    return described.model.tensors(described.config)


@cache
def _document(family: str) -> dict[str, Any]:
    """The file of a family."""
    path = FOLDER / "families" / f"{family}.toml"
    document = tomllib.loads(path.read_text(encoding="utf-8"))
    if "like" not in document:
        return document
    base = _document(document.pop("like"))
    components = base["components"] | document.get("components", {})
    return {**base, **document, "components": components}


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
        copied=document.get("copied", {}),
        scheduler=document["scheduler"],
        schedulers=document.get("schedulers", {}),
        tokenizers={folder: _tokenizer(entry) for folder, entry in tokenizers},
        v_prediction=document.get("v_prediction", {}),
        needs=_by_channels(document.get("needs", {})),
        optional=tuple(document.get("optional", ())),
        asks=document.get("asks", False),
        runs=document.get("runs", True),
        adapted=document.get("adapted", True),
        tag=document.get("tag", "stable-diffusion"),
    )


def _tokenizer(entry: Mapping[str, str]) -> Tokenizer:
    return Tokenizer(entry["class"], entry["encoder"], entry["pad_token"])


def _component(family: str, name: str) -> Component:
    entry = _merged(family, name)
    return _of_class(family, name, entry["class"], entry)


def _of_class(family: str, name: str, class_name: str, entry: Mapping[str, Any]) -> Component:
    """A component, as the entry for one class of its model describes it."""
    others = entry.get("instead", {})
    return Component(
        family=family,
        name=name,
        class_name=class_name,
        config=entry["config"],
        derive=entry.get("derive", {}),
        halves=entry.get("halves", {}),
        pipelines=_by_channels(entry.get("pipelines", {})),
        instead={other: _of_class(family, name, other, one) for other, one in others.items()},
    )


def _merged(family: str, name: str) -> dict[str, Any]:
    """The entry of a component, on top of the one it is `like`."""
    entry: dict[str, Any] = _document(family)["components"][name]
    if "like" not in entry:
        return entry
    base = _merged(*entry["like"].split("."))
    config = base["config"] | entry.get("config", {})
    return {**base, **entry, "config": config}


def _output_channels(config: Mapping[str, Any]) -> int:
    """The channels that come out of a denoiser; null means as many as go in."""
    return int(config.get("out_channels") or config["in_channels"])


def _by_channels(entry: Mapping[str, Any]) -> dict[int, Any]:
    return {int(channels): value for channels, value in entry.items()}


def _derived(rule: str, config: dict[str, Any]) -> Any:
    """The value of `"other // divisor"`, for each element of a list, or of `"number of other"`,
    or of several others with `and` between them.

    A narrow model has one head, not none; and what is split into heads or groups must be divisible.
    """
    if " of " in rule:
        number, _, others = rule.partition(" of ")
        widths = [width for other in others.split(" and ") for width in config[other]]
        return _divisor(int(number), widths)
    other, _, divisor = rule.partition(" // ")
    value = config[other]
    if isinstance(value, list):
        return [_divisor(width // int(divisor), [width]) for width in value]
    return _divisor(value // int(divisor), [value])


def _divisor(most: int, widths: Sequence[int]) -> int:
    """The largest number up to `most` that divides all widths."""
    return next((n for n in range(most, 1, -1) if not any(width % n for width in widths)), 1)
