"""How a pipeline is loaded: which components it takes, of which class, from which files; then all
of them."""

from __future__ import annotations

import inspect
import itertools
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from ...io.weight_files import find_variants, find_weights
from ..registry import component_class
from ..single_file import PlannedRepo
from .config import Config
from .custom_code import custom_file, load_class
from .model import CONFIG, LoadOptions, Model, find_files
from .source import Source


def correct_sample_size(unet: Any) -> None:
    """Set `sample_size` to 64 in a config in which a diffusers before 0.9 wrote less, which was a
    mistake."""
    if not isinstance(config := getattr(unet, "config", None), Config):
        return
    version, size = (
        re.match(r"0\.(\d+)\.", str(config.get("_diffusers_version", ""))),
        config.get("sample_size"),
    )
    if version and int(version[1]) < 9 and isinstance(size, int) and size < 64:
        unet.config = Config({**config, "sample_size": 64})


@dataclass
class Component:
    """A component that is to be loaded, or one of several ControlNets that are one component."""

    name: str
    kind: Any
    folder: str
    place: Source
    variant: str | None = None
    files: list[str] = field(default_factory=list)


def read_signature(kind: Any) -> tuple[list[str], list[str]]:
    """Names of the components and of the options that the constructor of a pipeline takes."""
    plain = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = [
        p for p in inspect.signature(kind.__init__).parameters.values() if p.kind in plain
    ][1:]
    options = [
        p.name
        for p in parameters
        if p.default is not p.empty and p.name not in kind._optional_components
    ]
    return [p.name for p in parameters if p.name not in options], options


def load_arguments(
    kind: Any,
    source: Source,
    index: Mapping[str, Any],
    given: Mapping[str, Any],
    wanted: LoadOptions,
    trust: bool,
) -> dict[str, Any]:
    """The arguments of a pipeline's constructor: components, loaded or given, and options.

    Args:
        kind: the class of the pipeline.
        source: the repository.
        index: the content of its `model_index.json`.
        given: components and options of the constructor that the user gave.
        wanted: how weights are loaded.
        trust: whether code in the repository may run.

    Raises:
        OSError: a file is missing.
        ValueError: a component is missing or of a wrong kind, no component has the variant, or
            weights do not fit.
    """
    wanted, dtypes = replace(wanted, device_map=wanted.device()), wanted.dtypes()
    names, options = read_signature(kind)
    if unknown := ", ".join(sorted(dtypes.keys() - {"default", *names})):
        warnings.warn(f"dtype: {kind.__name__} has no {unknown}: ignored", stacklevel=3)
    known = {name: index[name] for name in options if name in index}
    components: list[Component] = []
    for name in names:
        library, class_name = _read_entry(index.get(name))
        if name in given:
            _check_kind(name, given[name], component_class(library, class_name))
        elif class_name:
            found = _find_components(source, name, library, class_name, trust)
            if not found and name not in kind._optional_components:
                advice = f"pass {name}=, or {name}=None"
                raise ValueError(
                    f"{source.name}: the runtime has no {class_name} of {library}; {advice}"
                )
            if not found:
                warnings.warn(
                    f"{source.name}: {name} is left out: no {class_name} in the runtime",
                    stacklevel=3,
                )
            components += found
        if name in index:
            known[name] = None  # until it is loaded
    arguments = choose_arguments(kind, f"{source.name}:", known, given)
    _choose_files(source, components, wanted)
    loaded: dict[str, list[Any]] = {}
    for component in components:
        dtype = dtypes.get(component.name, dtypes["default"]) or "auto"
        loaded.setdefault(component.name, []).append(
            _load(component, replace(wanted, dtype=dtype, torch_dtype=None))
        )
    return arguments | {
        name: parts if len(parts) > 1 else parts[0] for name, parts in loaded.items()
    }


def fetch_components(
    kind: Any,
    source: Source,
    index: Mapping[str, Any],
    given: Mapping[str, Any],
    wanted: LoadOptions,
    trust: bool,
) -> None:
    """Fetch the files of the components that `load_arguments` would load."""
    components: list[Component] = []
    for name in read_signature(kind)[0]:
        library, class_name = _read_entry(index.get(name))
        if class_name and name not in given:
            components += _find_components(source, name, library, class_name, trust)
    _choose_files(source, components, wanted)


def planned_arguments(
    kind: Any, repo: PlannedRepo, given: Mapping[str, Any], wanted: LoadOptions
) -> dict[str, Any]:
    """As `load_arguments`, of a planned repository.

    Raises:
        ValueError: a component is missing or of a wrong kind, or weights do not fit.
    """
    dtypes = wanted.dtypes()
    names, options = read_signature(kind)
    index = repo.index
    known = {name: index[name] for name in (*names, *options) if name in index}
    absent = [name for name in names if _read_entry(index.get(name)) == ("", "")]
    known |= dict.fromkeys([name for name in absent if name in index])
    for name in names:
        if name in given and name in index:
            _check_kind(name, given[name], component_class(*_read_entry(index[name])))
    gaps = f" lacks {'; '.join(repo.lacks)}, and" if repo.lacks else ""
    arguments = choose_arguments(kind, f"{repo.name}{gaps}", known, given)
    for name in names:
        if name in given or name in absent:
            continue
        component = component_class(*_read_entry(index[name]))
        assert component is not None  # the index is ours
        dtype = dtypes.get(name, dtypes["default"]) or "auto"
        if issubclass(component, Model):
            each = replace(wanted, dtype=dtype, torch_dtype=None)
            arguments[name] = component.from_planned(repo, name, each)
        elif name in repo.schedulers:
            arguments[name] = component.from_config(repo.configs[repo.schedulers[name]])
        else:
            arguments[name] = repo.tokenizer(name, component)
    return arguments


def choose_arguments(
    kind: Any, owner: str, known: Mapping[str, Any], given: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of a pipeline's constructor: what the user gave, else what is known, else None
    if it is optional.

    Raises:
        ValueError: a component is missing; `owner` is who lacks it.
    """
    names, options = read_signature(kind)
    everything = {**dict.fromkeys(kind._optional_components), **known, **given}
    arguments = {name: everything[name] for name in (*names, *options) if name in everything}
    if ignored := [
        name for name, value in given.items() if name not in arguments and value is not None
    ]:
        warnings.warn(f"{kind.__name__} takes no {', '.join(ignored)}: ignored", stacklevel=3)
    if missing := [name for name in names if name not in arguments]:
        raise ValueError(
            f"{owner} has no {', '.join(missing)} for {kind.__name__}; pass what is missing"
        )
    return arguments


def _find_components(
    source: Source, name: str, library: str, class_name: str, trust: bool
) -> list[Component]:
    """What an entry of the index stands for: of our class, or of one in a module in the component's
    own folder.

    Several ControlNets are in the folders `name`, `name_1`, `name_2` and so on.
    """
    place, kind = source.folder(name), component_class(library, class_name)
    if (
        kind is not None and class_name == "MultiControlNetModel"
    ):  # is not a model with files of its own
        folders = (f"{name}_{i}" if i else name for i in itertools.count())
        places = itertools.takewhile(
            lambda one: one[1].names, ((folder, source.folder(folder)) for folder in folders)
        )
        return [
            Component(name, component_class(library, "ControlNetModel"), *one) for one in places
        ]
    if kind is None and f"{library}.py" in place.names:
        kind = load_class(place, library, class_name, trust)
    return [] if kind is None else [Component(name, kind, name, place)]


def _read_entry(entry: object) -> tuple[str, str]:
    """Library and class of an entry of `model_index.json`; empty if it stands for no component."""
    if isinstance(entry, list) and len(entry) == 2 and all(isinstance(part, str) for part in entry):
        return entry[0], entry[1]
    return "", ""


def _check_kind(name: str, value: Any, expected: Any) -> None:
    """Raise ValueError if a component that the user gave cannot take the place of a class: a
    scheduler for a UNet."""
    if value is None or expected is None or isinstance(value, list | tuple):
        return
    models = isinstance(value, Model) and issubclass(expected, Model)
    related = bool(set(type(value).__mro__) & set(expected.__mro__) - set(Model.__mro__))
    if not (related if models else _shape(type(value)) == _shape(expected)):
        raise ValueError(
            f"{name}: a {type(value).__name__} is given, but a {expected.__name__} is expected"
        )


def _shape(kind: type) -> str:
    """What a class of any library is by its looks."""
    if issubclass(kind, nn.Module):
        return "model"
    return "scheduler" if hasattr(kind, "set_timesteps") else "processor"


def _choose_files(source: Source, components: list[Component], wanted: LoadOptions) -> None:
    """Decide the files of every component, its own variant and format, and fetch all of them."""
    variant, models = (
        wanted.variant,
        [component for component in components if issubclass(component.kind, Model)],
    )
    for component in models:
        names, library = component.place.names, component.kind.library
        if variant and find_weights(names, library, variant, wanted.use_safetensors):
            component.variant = variant
        component.files = find_files(
            component.place, library, component.variant, wanted.use_safetensors
        )
    without = [component.folder for component in models if component.variant != variant]
    if without and len(without) == len(models):
        known = {
            v
            for component in models
            for v in find_variants(component.place.names, component.kind.library)
            if v
        }
        have = f"there are {', '.join(sorted(known))}" if known else "there are none"
        raise ValueError(f"{source.name}: no component has variant={variant!r}; {have}")
    if without:
        message = f"no {variant} of {', '.join(without)}; the main weights are loaded"
        warnings.warn(f"{source.name}: {message}", stacklevel=4)
    names_of = {component.folder: _needed(component) for component in components}
    if paths := [f"{folder}/{name}" for folder, names in names_of.items() for name in names]:
        source.fetch(paths)


def _needed(component: Component) -> list[str]:
    """The names of the files that loading a component takes: all of them for a class of any
    library."""
    if component.files:
        return [CONFIG, *component.files]
    return [
        name
        for name in component.place.names
        if custom_file(component.kind) or name.endswith((".json", ".txt"))
    ]


def _load(component: Component, wanted: LoadOptions) -> Any:
    if issubclass(component.kind, Model):
        return component.kind.from_pretrained(
            component.place, **vars(replace(wanted, variant=component.variant))
        )
    if custom_file(component.kind):  # of any library, so it gets a path
        return component.kind.from_pretrained(str(component.place.fetch(component.place.names)))
    return component.kind.from_pretrained(component.place)
