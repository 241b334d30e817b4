"""The `scheduler_config.json`: which options a scheduler has, and what passes on when one is swapped for another."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar, Self, cast

from ...upload import PushToHub
from ..config import DIFFUSERS_VERSION, Config
from ..saving import placed, write_json
from ..source import HubOptions, Source, open_source

FILE = "scheduler_config.json"
COMPATIBLE = (  # with one another; in this order
    "DDIMScheduler",
    "DDPMScheduler",
    "PNDMScheduler",
    "LMSDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
    "DPMSolverSDEScheduler",
    "EDMEulerScheduler",
)


class Configured(PushToHub):
    """Something made from a `scheduler_config.json`.

    Attributes:
        config: the options complete with defaults, and, hidden, those of other schedulers that a file or a swap
            brought, so that swapping back restores them. `_use_default_values` names those that nobody has set: a
            swap drops them, and the next scheduler takes its own defaults.
        library: the library that `model_index.json` says it is of.
        defaults: the options of the class.
        choices: the values that an option can take; the first is the usual one.
        aliases: values of other schedulers' options, and what they mean here.
        has_compatibles: whether `COMPATIBLE` schedulers take its config.
    """

    library: ClassVar[str] = "diffusers"
    defaults: ClassVar[dict[str, Any]] = {}
    choices: ClassVar[dict[str, tuple[Any, ...]]] = {}
    aliases: ClassVar[dict[str, dict[str, str]]] = {}
    has_compatibles: ClassVar[bool] = True
    config: Config

    def __init__(self, **options: Any) -> None:
        """Make one.

        Raises:
            TypeError: an option that the scheduler does not have.
            ValueError: a value that it cannot serve.
        """
        name = type(self).__name__
        if unknown := sorted(options.keys() - self.defaults.keys()):
            raise TypeError(f"{name} has no option {', '.join(unknown)}")
        unset = [key for key in self.defaults if key not in options]
        options = {key: self.aliases.get(key, {}).get(_key(value), value) for key, value in options.items()}
        self.config = Config({**self.defaults, **options, "_use_default_values": unset})
        for key, allowed in self.choices.items():
            if self.config[key] not in allowed:
                raise ValueError(f"{name}: {key} = {self.config[key]!r} must be {' or '.join(map(repr, allowed))}")

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **options: Any) -> Self:
        """A scheduler with the config of another one, or of a file; `options` take precedence.

        Keys that no scheduler knows, and options that this one does not have, warn by name.
        """
        given = {key: value for key, value in config.items() if key not in config.get("_use_default_values", ())}
        given.pop("_use_default_values", None)
        unknown = [key for key in given if not key.startswith("_") and key not in _all_options()]
        if ignored := unknown + [key for key in options if key not in cls.defaults]:
            warnings.warn(f"{cls.__name__} has no use for {', '.join(ignored)}", stacklevel=2)
        own = {key: value for key, value in (given | options).items() if key in cls.defaults}
        scheduler = cls(**own)
        hidden = {key: value for key, value in given.items() if key not in own}
        scheduler.config.update(hidden | ({"_class_name": cls.__name__} if "_class_name" in hidden else {}))
        return scheduler

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str] | Source,
        *,
        subfolder: str | None = None,
        **options: Any,
    ) -> Self:
        """The config in a folder or on the Hub, of any class; `options` as in `from_config`, or `HubOptions`."""
        hub = {key: options.pop(key) for key in HubOptions.__annotations__ if key in options}
        return cls.from_config(open_source(name_or_path, subfolder, **cast(HubOptions, hub)).json(FILE), **options)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write `scheduler_config.json`, defaults included; may also push, see `PushToHub`."""
        with placed(folder) as staging:
            write_json(staging / FILE, self._saved_config())

    def _saved_config(self) -> dict[str, Any]:
        options = {key: value for key, value in self.config.items() if not key.startswith("_")}
        if callables := [key for key, value in options.items() if callable(value)]:
            raise ValueError(f"{callables[0]} is a function, which a JSON file cannot hold")
        return options | {"_class_name": type(self).__name__, "_diffusers_version": DIFFUSERS_VERSION}

    @property
    def compatibles(self) -> list[type[Configured]]:
        """The classes that `from_config` can swap to, in a fixed order."""
        from . import SCHEDULERS

        own = type(self).__name__
        names = COMPATIBLE if self.has_compatibles else ()
        return [SCHEDULERS[name] for name in names if name in SCHEDULERS] + ([] if own in names else [type(self)])

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self._saved_config()}"


def _key(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _all_options() -> set[str]:
    from . import SCHEDULERS

    return {key for scheduler in SCHEDULERS.values() for key in scheduler.defaults}
