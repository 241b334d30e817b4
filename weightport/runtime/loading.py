"""How a pipeline is loaded: which components it takes, of which class, from which files; then all of them."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .config import Config
from .custom_code import custom_file, load_class
from .files import find_variants, find_weights
from .model import CONFIG, Model, find_files, one_dtype
from .registry import component_class
from .source import Source


def correct_sample_size(unet: Any) -> None:
    """Set `sample_size` to 64 in a config in which a diffusers before 0.9 wrote less, which was a mistake."""
    if not isinstance(config := getattr(unet, "config", None), Config):
        return
    version, size = re.match(r"0\.(\d+)\.", str(config.get("_diffusers_version", ""))), config.get("sample_size")
    if version and int(version[1]) < 9 and isinstance(size, int) and size < 64:
        config["sample_size"] = 64


@dataclass(frozen=True)
class Request:
    """What a user asked for, beside the repository; see `DiffusionPipeline.from_pretrained`."""

    dtypes: Mapping[str, torch.dtype | None]  # component, or "default" -> dtype
    variant: str | None
    use_safetensors: bool | None
    trust: bool
    options: Mapping[str, Any]  # of `Model.from_pretrained`, the same for all
    given: Mapping[str, Any]  # components and options of the constructor

    def dtype(self, component: str) -> torch.dtype | None:
        """What to cast a component to; None leaves it as it is."""
        return self.dtypes.get(component, self.dtypes["default"])


@dataclass
class Component:
    """A component that is to be loaded."""

    name: str
    kind: Any
    folder: Source
    variant: str | None = None
    files: list[str] = field(default_factory=list)


def read_signature(kind: Any) -> tuple[list[str], list[str]]:
    """Names of the components and of the options that the constructor of a pipeline takes."""
    plain = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = [p for p in inspect.signature(kind.__init__).parameters.values() if p.kind in plain][1:]
    options = [p.name for p in parameters if p.default is not p.empty and p.name not in kind._optional_components]
    return [p.name for p in parameters if p.name not in options], options


def read_dtypes(dtype: object, torch_dtype: object) -> dict[str, torch.dtype | None]:
    """Component -> dtype, and `default`, from what the user gave.

    Raises:
        ValueError: both are given, or weights cannot be of a dtype.
    """
    wanted = torch_dtype if dtype is None else dtype
    if isinstance(wanted, Mapping) and (dtype is None or torch_dtype is None):
        return {"default": torch.float32} | {str(name): one_dtype(value) for name, value in wanted.items()}
    return {"default": one_dtype(dtype, torch_dtype)}


def load_arguments(kind: Any, source: Source, index: Mapping[str, Any], request: Request) -> dict[str, Any]:
    """The arguments of a pipeline's constructor: components, loaded or given, and options.

    Raises:
        OSError: a file is missing.
        ValueError: a component is missing or of a wrong kind, no component has the variant, or weights do not fit.
    """
    names, options = read_signature(kind)
    arguments: dict[str, Any] = {name: index[name] for name in options if name in index}
    arguments |= {name: value for name, value in request.given.items() if name in (*names, *options)}
    ignored = sorted(request.given.keys() - arguments.keys())
    if ignored:
        warnings.warn(f"{kind.__name__} takes no {', '.join(ignored)}: ignored", stacklevel=4)
    missing, components = [], []
    for name in names:
        library, class_name = _read_entry(index.get(name))
        if name in request.given:
            _check_kind(name, request.given[name], component_class(library, class_name))
        elif class_name:
            found = _find_kind(source.folder(name), library, class_name, request.trust)
            if found is not None:
                components.append(Component(name, found, source.folder(name)))
            elif name in kind._optional_components:
                warnings.warn(f"{source.name}: {name} is left out: no {class_name} in the runtime", stacklevel=4)
                arguments[name] = None
            else:
                raise ValueError(
                    f"{source.name}: the runtime has no {class_name} of {library}; pass {name}=, or {name}=None"
                )
        elif name in index or name in kind._optional_components:
            arguments[name] = None
        else:
            missing.append(name)
    if missing:
        raise ValueError(f"{source.name}: has no {', '.join(missing)} for {kind.__name__}; pass what is missing")
    _choose_files(source, components, request)
    return arguments | {component.name: _load(component, request) for component in components}


def _read_entry(entry: object) -> tuple[str, str]:
    """Library and class of an entry of `model_index.json`; empty if it stands for no component."""
    if isinstance(entry, list) and len(entry) == 2 and all(isinstance(part, str) for part in entry):
        return entry[0], entry[1]
    return "", ""


def _find_kind(folder: Source, library: str, class_name: str, trust: bool) -> Any:
    """Our class, or that of a module in the component's own folder."""
    ours = component_class(library, class_name)
    if ours is None and f"{library}.py" in folder.names:
        return load_class(folder, library, class_name, trust)
    return ours


def _check_kind(name: str, value: Any, expected: Any) -> None:
    """Raise ValueError if a component that the user gave cannot take the place of a class: a scheduler for a UNet."""
    if value is None or expected is None or isinstance(value, list | tuple):
        return
    if isinstance(value, Model) and issubclass(expected, Model):
        fits = bool(set(type(value).__mro__) & set(expected.__mro__) - set(Model.__mro__))
    else:
        fits = _shape(type(value)) == _shape(expected)
    if not fits:
        raise ValueError(f"{name}: a {type(value).__name__} is given, but a {expected.__name__} is expected")


def _shape(kind: type) -> str:
    """What a class of any library is by its looks."""
    if issubclass(kind, nn.Module):
        return "model"
    return "scheduler" if hasattr(kind, "set_timesteps") else "processor"


def _choose_files(source: Source, components: list[Component], request: Request) -> None:
    """Decide the files of every component, its own variant and format, and fetch all of them."""
    models = [component for component in components if issubclass(component.kind, Model)]
    for component in models:
        names, library = component.folder.names, component.kind.library
        if request.variant and find_weights(names, library, request.variant, request.use_safetensors):
            component.variant = request.variant
        component.files = find_files(component.folder, library, component.variant, request.use_safetensors)
    without = [component.name for component in models if component.variant is None]
    if request.variant and models and len(without) == len(models):
        known = {v for component in models for v in find_variants(component.folder.names, component.kind.library) if v}
        have = f"there are {', '.join(sorted(known))}" if known else "there are none"
        raise ValueError(f"{source.name}: no component has variant={request.variant!r}; {have}")
    if request.variant and without:
        warnings.warn(
            f"{source.name}: no {request.variant} of {', '.join(without)}; the main weights are loaded", stacklevel=5
        )
    wanted = []
    for component in components:
        names = component.folder.names
        if component.files:
            names = [CONFIG, *component.files]
        elif custom_file(component.kind) is None:
            names = [name for name in names if name.endswith((".json", ".txt"))]
        wanted += [f"{component.name}/{name}" for name in names]
    if wanted:
        source.fetch(wanted)


def _load(component: Component, request: Request) -> Any:
    if issubclass(component.kind, Model):
        return component.kind.from_pretrained(
            component.folder,
            variant=component.variant,
            dtype=request.dtype(component.name) or "auto",
            use_safetensors=request.use_safetensors,
            **request.options,
        )
    if custom_file(component.kind):  # of any library, so it gets a path
        return component.kind.from_pretrained(str(component.folder.fetch(component.folder.names)))
    return component.kind.from_pretrained(component.folder)
