"""`DiffusionPipeline`: the base of the pipelines, which holds components and knows how to load and save them."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Self

import torch
from torch import nn
from tqdm.auto import tqdm

from .config import DIFFUSERS_VERSION, Config
from .registry import component_class, public_class
from .saving import placed, write_json
from .source import HubOptions, Source, open_source

INDEX = "model_index.json"


class DiffusionPipeline:
    """A pipeline is made of components: models, a scheduler, a tokenizer.

    A subclass takes its components as arguments of `__init__`, hands them to `register_modules` and does its work in
    `__call__`. Each component is an attribute, and a folder of the same name in the repository.
    """

    config_name: ClassVar[str] = INDEX
    _optional_components: ClassVar[list[str]] = []

    _components: dict[str, Any]
    _options: dict[str, Any]
    _progress_bar_config: Mapping[str, Any] = {}

    def register_modules(self, **components: Any) -> None:
        """Make these the components of the pipeline, as attributes of the same names."""
        self.__dict__.setdefault("_components", {}).update(components)

    def register_to_config(self, **options: Any) -> None:
        """Remember options of the constructor that are no components; they are saved in `model_index.json`."""
        self.__dict__.setdefault("_options", {}).update(options)

    def __getattr__(self, name: str) -> Any:
        components = self.__dict__.get("_components", {})
        if name in components:
            return components[name]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("_components", {}):
            self._components[name] = value
        else:
            super().__setattr__(name, value)

    @property
    def components(self) -> dict[str, Any]:
        """Name -> component, in the order of the constructor; `None` where there is none."""
        return dict(self._components)

    @property
    def config(self) -> Config:
        """What `model_index.json` says of this pipeline: the class of each component, and options."""
        entries = {name: _entry(component) for name, component in self._components.items()}
        return Config(
            {"_class_name": type(self).__name__, "_diffusers_version": DIFFUSERS_VERSION}
            | entries
            | self.__dict__.get("_options", {})
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__} {json.dumps(self.config, indent=2, sort_keys=True)}\n"

    # --- devices ------------------------------------------------------------------------------------------------------

    def _models(self) -> list[nn.Module]:
        return [component for component in self._components.values() if isinstance(component, nn.Module)]

    @property
    def device(self) -> torch.device:
        """Where the first model is."""
        return next((p.device for model in self._models() for p in model.parameters()), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first model."""
        return next((p.dtype for model in self._models() for p in model.parameters()), torch.float32)

    def to(
        self,
        *arguments: torch.device | torch.dtype | str | int,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Move and cast every model: `to(device)`, `to(dtype)`, `to(device, dtype)`.

        Raises:
            ValueError: the arguments are something else.
        """
        given = [*arguments, *(value for value in (device, dtype) if value is not None)]
        kinds = [isinstance(value, torch.dtype) for value in given]
        if kinds not in ([], [False], [True], [False, True]):
            raise ValueError(f"to() takes a device, a dtype, or a device and a dtype, not {given}")
        for model in self._models():
            model.to(*given)  # type: ignore[call-overload]
        return self

    # --- progress -----------------------------------------------------------------------------------------------------

    def progress_bar(self, iterable: Iterable[Any] | None = None, total: int | None = None) -> Any:
        """A tqdm bar over `iterable`, or for `total` steps; shown on a terminal only."""
        return tqdm(iterable, total=total, **{"disable": None, **self._progress_bar_config})

    def set_progress_bar_config(self, **options: Any) -> None:
        """Arguments of tqdm for `progress_bar`, such as `disable=True`."""
        self._progress_bar_config = options

    # --- loading and saving -------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str] | Source,
        *,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> Self:
        """The pipeline in a folder."""
        hub = {key: options.pop(key) for key in HubOptions.__annotations__ if key in options}
        source = open_source(name_or_path, **hub)
        index = source.json(INDEX)
        target: Any = public_class(index["_class_name"]) if cls is DiffusionPipeline else cls
        parameters = inspect.signature(target.__init__).parameters
        arguments: dict[str, Any] = {}
        for name in parameters:
            entry = index.get(name)
            if name in options:
                arguments[name] = options.pop(name)
            elif isinstance(entry, list) and entry != [None, None]:
                component = component_class(*entry)
                if component is None:
                    raise ValueError(f"{source.name}: there is no {entry[1]} in the runtime")
                extra = {"dtype": dtype} if issubclass(component, nn.Module) else {}
                arguments[name] = component.from_pretrained(source, subfolder=name, **extra)
            elif isinstance(entry, list):
                arguments[name] = None
            elif entry is not None:
                arguments[name] = entry
        pipeline: Self = target(**arguments)
        return pipeline

    def save_pretrained(self, folder: str | os.PathLike[str], *, variant: str | None = None) -> None:
        """Write every component into a folder of its name, and `model_index.json`."""
        with placed(folder) as staging:
            for name, component in self._components.items():
                if component is not None:
                    extra = {"variant": variant} if isinstance(component, nn.Module) else {}
                    component.save_pretrained(staging / name, **extra)
            write_json(staging / INDEX, self.config)


def _entry(component: Any) -> list[str | None]:
    """The library and class of a component, as `model_index.json` has them."""
    if component is None:
        return [None, None]
    kind = type(component)
    return [getattr(kind, "library", None) or kind.__module__.split(".")[0], kind.__name__]
