"""diffusers' own layout: a repository, a folder of one, or a file under its names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ...errors import ConversionError
from ...io.weight_files import MAIN_STEMS, find_main_weights
from ...mappings.facts import facts
from ...mappings.families import component_names
from ..checkpoint import Checkpoint
from ..readers.sniff import file_names
from .folders import inside, left_beside
from .foreign import refuse_folder
from .ldm_extras import stated, without_extras
from .source import Source


def reads(source: Source) -> bool:
    """Whether this is a repository, a folder of one, or a bare file of tensors."""
    return source.kind in ("repo", "model") or source.raw is not None


def parts(source: Source) -> list[Checkpoint]:
    """The models of a repository, or the one of a folder or file.

    Raises:
        ConversionError: no weights are there, or they lie elsewhere.
    """
    if source.raw is not None:
        return [_file(source.raw)]
    if source.kind == "model":
        return [_model(source.path, "")]
    repo = source.path
    folders = {name: folder for name in component_names() if (folder := _folder(source, name))}
    if not folders:
        refuse_folder(repo)
        known = "/, ".join(component_names())
        raise ConversionError(f"{repo}: a diffusers repo without weights in {known}/")
    models = {name: _model(repo, folder) for name, folder in folders.items()}
    for name, model in models.items():
        average = _average(name)
        if model.root == name and _weights(repo / average):
            reason = facts("containers")["averages"]["reason"]
            model.skipped[f"{average}/"] = reason.replace("{folder}", name)
    first = next(iter(models.values()))
    first.skipped.update(left_beside(repo))
    return list(models.values())


def is_average(checkpoint: Checkpoint) -> bool:
    """Whether it was taken from a folder that holds the moving average of another one's model."""
    return checkpoint.root.endswith(_average(""))


def _average(name: str) -> str:
    """The folder of the moving average of a component."""
    return name + str(facts("containers")["averages"]["suffix"])


def _folder(source: Source, name: str) -> str | None:
    """The folder of a repository in which a component lies; that of its average, where asked."""
    wanted = (_average(name), name) if source.ema else (name, _average(name))
    return next((folder for folder in wanted if _weights(source.path / folder)), None)


def _file(raw: Checkpoint) -> Checkpoint:
    """A file of one part; what is not the model is left out, markers become metadata."""
    skipped = dict(raw.skipped)
    tensors = without_extras(raw.tensors, skipped)
    return replace(raw, layout="diffusers", tensors=tensors, skipped=skipped, metadata=stated(raw))


def _model(repo: Path, folder: str) -> Checkpoint:
    """The model in one folder of a repo, or in the repo itself."""
    file = _weights(repo / folder)
    if file is None:
        stems = [f"{stem}.{suffix}" for suffix, stems in MAIN_STEMS.items() for stem in stems]
        raise ConversionError(f"{repo}: no weights named {' or '.join(stems)}")
    checkpoint = Source(inside(repo, file)).raw
    if checkpoint is None:
        raise ConversionError(f"{file}: holds no tensors, whatever its name says")
    for opened in checkpoint.files:
        inside(repo, opened.path)
    pickles = "" if checkpoint.format.endswith("safetensors") else f", {checkpoint.format}"
    checkpoint.layout = "diffusers"
    checkpoint.path = repo
    checkpoint.root = folder
    checkpoint.format = ("diffusers repo" if folder else "diffusers model") + pickles
    return checkpoint


def _weights(folder: Path) -> Path | None:
    """The main variant of the weights in one folder of a repo."""
    if not folder.is_dir():
        return None
    name = find_main_weights(file_names(folder))
    return folder / name if name else None
