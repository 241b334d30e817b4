"""`model_index.json`: which pipeline a repo is, and what it is made of."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping
from typing import Any

from ...io.config_files import DIFFUSERS_VERSION
from ...mappings.families import Family
from ..planning.plan import PlannedComponent

Components = Mapping[str, PlannedComponent]

_ADVICE = "(give its file, or a --base that has it)"


def is_extension(family: Family, components: Components) -> bool:
    """Whether these are no pipeline or piece of one, but models that extend others.

    A ControlNet alone is one.
    """
    return all(family.components[name].extends for name in components)


def lacking(family: Family, components: Components) -> list[str]:
    """What a complete repo of the family has and this one does not, in words."""
    if is_extension(family, components):
        return []
    gaps = []
    for name, component in family.components.items():
        if name not in components:
            if not component.extends:
                gaps.append(f"{name} {_ADVICE}")
            continue
        missing = component.manifest().keys() - components[name].tensors.keys()
        if missing:
            half = component.half_of(next(iter(missing))).replace("_", " ")
            gaps.append(f"the {half} half of the {name}, {len(missing)} tensors {_ADVICE}")
    denoiser = components.get(family.denoiser)
    if denoiser is not None:
        gaps += family.needs.get(denoiser.config["in_channels"], [])
    return gaps


def model_index(family: Family, components: Components, scheduler: str) -> dict[str, Any]:
    """The pipeline's index.

    An absent or incomplete component is not named, so that nothing loads it by mistake.

    Args:
        scheduler: the class of the denoiser's scheduler.
    """
    index: dict[str, Any] = {
        "_class_name": _pipeline(family, components),
        "_diffusers_version": DIFFUSERS_VERSION,
        "scheduler": ["diffusers", scheduler],
    }
    for name, config in family.schedulers.items():
        index[name] = ["diffusers", config["_class_name"]]
    for name, tokenizer in family.tokenizers.items():
        index[name] = ["transformers", tokenizer.class_name]
    for name, value in family.index.items():
        index[name] = value if value != [] else [None, None]
    for name in _whole(family, components):
        component = family.components[name]
        index[name] = [component.library, component.class_name]
    return index


def _whole(family: Family, components: Components) -> list[str]:
    """The components that have every tensor."""
    return [
        name
        for name, component in family.components.items()
        if name in components and components[name].tensors.keys() >= component.manifest().keys()
    ]


def _pipeline(family: Family, components: Components) -> str:
    """The class of the pipeline."""
    whole = [family.components[name] for name in _whole(family, components)]
    extended = [component.pipelines for component in whole if component.extends]
    pipelines = ChainMap(*extended, family.pipelines)
    denoiser = components.get(family.denoiser)
    channels = denoiser.config["in_channels"] if denoiser else min(family.pipelines)
    return pipelines[channels]
