"""`model_index.json`: which pipeline a repo is, and what it is made of."""

from __future__ import annotations

from collections import ChainMap
from typing import Any

from ...io.config_files import DIFFUSERS_VERSION
from ...mappings.families import Family
from ..layouts.diffusers_repo import class_name
from .carried import Carried, Components
from .tokenizers import unfit

_ADVICE = "(give its file, or a --base that has it)"
_COPIED = "which is not converted, but copied from a --base that has it"


def is_extension(family: Family, components: Components) -> bool:
    """Whether these are no pipeline or piece of one, but models that extend others.

    A ControlNet alone is one.
    """
    return all(family.components[name].extends for name in components)


def lacking(family: Family, components: Components, carried: Carried | None = None) -> list[str]:
    """What a complete repo of the family has and this one does not, in words.

    What the repository of another pipeline does without is not lacking.
    """
    if is_extension(family, components):
        return []
    gaps = []
    folders = carried.folders if carried else ()
    spared = (*folders, *family.optional)
    is_ours = carried is None or class_name(carried.index) in _pipelines(family)
    for name, component in family.components.items():
        if name not in components:
            if is_ours and not component.extends and name not in spared:
                gaps.append(f"{name} {_ADVICE}")
            continue
        missing = components[name].missing
        if missing:
            half = components[name].described.half_of(missing[0]).replace("_", " ")
            gaps.append(f"the {half} half of the {name}, {len(missing)} tensors {_ADVICE}")
    for name, (library, kind) in family.copied.items():
        if is_ours and name not in folders:
            gaps.append(f"{name} ({kind} of {library}, {_COPIED})")
    for name, rows in unfit(family, components).items():
        gaps.append(f"{name} (its text encoder has {rows} token rows, fewer than CLIP's tokens)")
    denoiser = components.get(family.denoiser)
    if denoiser is not None:
        needs = family.needs.get(family.kind(denoiser.config), [])
        gaps += [need for need in needs if not need.startswith(folders or "\0")]
    return gaps


def _pipelines(family: Family) -> set[str]:
    """The classes of the pipelines that are the family's."""
    extended = [component.pipelines for component in family.components.values()]
    return {name for classes in [family.pipelines, *extended] for name in classes.values()}


def _is_left_out(name: str, family: Family, components: Components) -> bool:
    """Whether a component is one that a pipeline may do without, and is not there."""
    return name in family.optional and name not in components


def model_index(
    family: Family, components: Components, scheduler: str, carried: Carried | None = None
) -> dict[str, Any]:
    """The pipeline's index.

    An absent or incomplete component is not named, so that nothing loads it by mistake. What a
    repository's own index says stays, where the conversion does not change it.

    Args:
        scheduler: the class of the denoiser's scheduler.
        carried: what is taken over from the repository of the denoiser.
    """
    index: dict[str, Any] = {
        "_class_name": _pipeline(family, components),
        "_diffusers_version": DIFFUSERS_VERSION,
        "scheduler": ["diffusers", scheduler],
    }
    for name, config in family.schedulers.items():
        index[name] = ["diffusers", config["_class_name"]]
    for name in tokenizers(family, components, carried):
        index[name] = ["transformers", family.tokenizers[name].class_name]
    for name, tokenizer in family.tokenizers.items():
        if _is_left_out(tokenizer.encoder, family, components):
            index[name] = [None, None]
            index[tokenizer.encoder] = [None, None]
    for name, value in family.index.items():
        index[name] = value if value != [] else [None, None]
    if carried is not None:
        if family.index.keys() & carried.index.keys():
            index = {name: entry for name, entry in index.items() if name not in family.index}
        made = {"scheduler", *components}
        index |= {name: entry for name, entry in carried.index.items() if name not in made}
    for name in _whole(family, components):
        described = components[name].described
        index[name] = [described.library, described.class_name]
    return index


def tokenizers(family: Family, components: Components, carried: Carried | None) -> list[str]:
    """The tokenizers that a repo has: those of its text encoders, as far as they fit.

    A part of a repo has all of its family, a repository of another pipeline those that it names.
    """
    without = unfit(family, components)
    return [
        name
        for name, tokenizer in family.tokenizers.items()
        if name not in without
        and not _is_left_out(tokenizer.encoder, family, components)
        and (carried is None or tokenizer.encoder in components or name in carried.index)
    ]


def _whole(family: Family, components: Components) -> list[str]:
    """The components that have every tensor."""
    return [
        name for name in family.components if name in components and not components[name].missing
    ]


def _pipeline(family: Family, components: Components) -> str:
    """The class of the pipeline."""
    whole = [family.components[name] for name in _whole(family, components)]
    extended = [component.pipelines for component in whole if component.extends]
    pipelines = ChainMap(*extended, family.pipelines)
    denoiser = components.get(family.denoiser)
    usual = min(family.pipelines)
    channels = family.kind(denoiser.config) if denoiser else usual
    return pipelines.get(channels, pipelines[usual])
