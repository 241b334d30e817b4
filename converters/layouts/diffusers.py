"""diffusers' own layout: a repository, a folder of one, or a file under its names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ...errors import ConversionError
from ...io.weight_files import MAIN_STEMS, find_main_weights
from ...mappings.classes import is_known
from ...mappings.facts import facts
from ...mappings.families import component_names
from ..checkpoint import Checkpoint, StatedConfig
from ..readers.sniff import CONFIG, file_names
from .diffusers_repo import not_converted, other_models, read_config, refuse_pipeline
from .folders import inside, left_beside
from .foreign import refuse_contents, refuse_folder
from .single_file import parts_of
from .source import Source
from .unsupported import (
    class_of,
    other_class,
    refuse_config,
    refuse_quantised,
    refuse_unsupported,
)


def reads(source: Source) -> bool:
    """Whether this is a repository, a folder of one, or a bare file of tensors."""
    return source.kind in ("repo", "model") or source.raw is not None


def parts(source: Source) -> list[Checkpoint]:
    """The models of a repository, or the one of a folder or file.

    Raises:
        ConversionError: no weights are there, or they lie elsewhere.
    """
    if source.raw is not None:
        return parts_of(source)
    if source.kind == "model":
        refuse_config(source.path, read_config(source.path, ""))
        return [_model(source, "")]
    return _models(source)


def _average(name: str) -> str:
    """The folder of the moving average of a component."""
    return name + str(facts("containers")["averages"]["suffix"])


def _models(source: Source) -> list[Checkpoint]:
    """The models of a repository; what else it holds is named as left out.

    Raises:
        ConversionError: there are none, or it is one of another kind.
    """
    repo = source.path
    models: dict[str, Checkpoint] = {}
    others = other_models(repo)
    for name in component_names():
        folder = _folder(source, name)
        if folder is None:
            continue
        config = read_config(repo, folder)
        other = other_class(config)
        if other is not None:
            others[name] = other
            continue
        refuse_quantised(repo / folder, config)
        models[name] = _model(source, folder)
        if folder == name and _weights(repo / _average(name)):
            reason = facts("containers")["averages"]["reason"]
            models[name].skipped[f"{_average(name)}/"] = reason.replace("{folder}", name)
    refuse_pipeline(repo, models, others)
    if not models:
        refuse_folder(repo)
        known = "/, ".join(component_names())
        raise ConversionError(f"{repo}: a diffusers repo without weights in {known}/")
    first = next(iter(models.values()))
    first.skipped.update(left_beside(repo))
    averages = {_average(name) for name in models}
    first.skipped.update(not_converted(repo, others, {*models, *averages}))
    return list(models.values())


def _folder(source: Source, name: str) -> str | None:
    """The folder of a repository in which a component lies; that of its average, where asked."""
    wanted = (_average(name), name) if source.ema else (name, _average(name))
    return next((folder for folder in wanted if _weights(source.path / folder)), None)


def _model(source: Source, folder: str) -> Checkpoint:
    """The model in one folder of a repo, or in the repo itself."""
    repo = source.path
    file = _weights(repo / folder)
    if file is None:
        stems = [f"{stem}.{suffix}" for suffix, stems in MAIN_STEMS.items() for stem in stems]
        raise ConversionError(f"{repo}: no weights named {' or '.join(stems)}")
    weights = Source(inside(repo, file), source.lora_alpha)
    raw = weights.raw
    if raw is None:
        raise ConversionError(f"{file}: holds no tensors, whatever its name says")
    for opened in raw.files:
        inside(repo, opened.path)
    refuse_contents(raw, repo / folder)
    config = _config(repo, folder)
    refuse_unsupported(raw, repo / folder, configured=config is not None)
    pickles = "" if raw.format.endswith("safetensors") else f", {raw.format}"
    part, *others = parts_of(weights)
    all_of_it = not others and part.skipped == raw.skipped  # nothing else belongs in the folder
    return replace(
        part if all_of_it else raw,
        layout="diffusers",
        path=repo,
        root=folder,
        format=("diffusers repo" if folder else "diffusers model") + pickles,
        metadata=raw.metadata,
        config=config,
        whole=None,
        average=folder.endswith(_average("")),
    )


def _config(repo: Path, folder: str) -> StatedConfig | None:
    """The config of a model, unless it names a class that is not known."""
    options = read_config(repo, folder)
    kind = class_of(options)
    if not options or (kind is not None and not is_known(kind)):
        return None
    return StatedConfig(repo / folder / CONFIG, kind, options)


def _weights(folder: Path) -> Path | None:
    """The main variant of the weights in one folder of a repo."""
    if not folder.is_dir():
        return None
    name = find_main_weights(file_names(folder))
    return folder / name if name else None
