"""What a diffusers repository says of itself, and what it holds beside the models we convert."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ...errors import printable
from ...io.documents import MAX_CONFIG, read_json
from ...mappings.facts import facts
from ...mappings.families import families
from ..readers.sniff import CONFIG, INDEX, file_names, folder_names, is_model
from .folders import beside, inside
from .unsupported import class_of, described, refuse_pipeline_of


def read_config(repo: Path, folder: str) -> dict[str, Any]:
    """The `config.json` in a folder of a repository; empty without one.

    Raises:
        ConversionError: it cannot be read, or lies elsewhere.
    """
    return _read(repo, Path(folder, CONFIG))


def read_index(repo: Path) -> dict[str, Any]:
    """The `model_index.json` of a repository; empty without one.

    Raises:
        ConversionError: it cannot be read, or lies elsewhere.
    """
    return _read(repo, Path(INDEX), "model_index")


def _read(repo: Path, name: Path, schema: str | None = None) -> dict[str, Any]:
    path = repo / name
    if not path.is_file():
        return {}
    return read_json(inside(repo, path), schema, limit=MAX_CONFIG)


def other_models(repo: Path) -> dict[str, str]:
    """Folder -> class of the models in a repository that are no components of ours."""
    ours = {name for family in families().values() for name in family.components}
    averages = facts("containers")["averages"]["suffix"]
    found = {}
    for name in folder_names(repo):
        if name.removesuffix(averages) not in ours and is_model(repo / name):
            found[name] = class_of(read_config(repo, name)) or "a model"
    return found


def refuse_pipeline(repo: Path, models: Collection[str], others: Mapping[str, str]) -> None:
    """Refuse a repository whose images another model makes than ours.

    Args:
        models: the components that are converted.
        others: the folders of those that are not -> their classes.

    Raises:
        ConversionError: it is one.
    """
    denoisers = {family.denoiser for family in families().values()}
    strange = {name: kind for name, kind in others.items() if not _is_accessory(repo, name)}
    if strange and not denoisers & set(models):
        name, kind = next(iter(strange.items()))
        refuse_pipeline_of(repo, class_name(read_index(repo)), name, kind)


def _is_accessory(repo: Path, name: str) -> bool:
    """Whether a model of another class is one of transformers', which makes no images."""
    return "_class_name" not in read_config(repo, name)


def class_name(index: Mapping[str, Any]) -> str | None:
    """The class of a pipeline; one of the repo's own is a list of its module and its name."""
    entry = index.get("_class_name")
    if isinstance(entry, list) and entry:
        entry = entry[-1]
    return printable(entry) if isinstance(entry, str) else None


def not_converted(repo: Path, others: Mapping[str, str], taken: Collection[str]) -> dict[str, str]:
    """What is left out of a repository: name -> why.

    Args:
        others: the folders of models that are not converted -> their classes.
        taken: the folders that are.
    """
    index = read_index(repo)
    known = {*taken, *_kept()}
    left = {}
    for name in folder_names(repo):
        if name in known or name.startswith("."):
            continue
        shown = printable(name)
        if name in others:
            what = described(others[name])
            said = f"{what} ({others[name]})" if what else others[name]
            left[f"{shown}/"] = f"{shown}/ is not converted: {said}"
        elif name in index:
            entry = index[name]
            kind = entry[-1] if isinstance(entry, list) and entry else "a component"
            left[f"{shown}/"] = f"{shown}/ is not converted: {printable(str(kind))}"
        else:
            left[f"{shown}/"] = f"{shown}/ is no component of the repo"
    own = facts("diffusers")["own_files"]
    for name in file_names(repo):
        if name not in own and not name.startswith(".") and beside(name) is None:
            left[printable(name)] = "a file beside the folders of the repo"
    return left


def _kept() -> set[str]:
    """The folders of tokenizers and schedulers, which a conversion keeps or writes."""
    names = set(facts("diffusers")["schedulers"])
    for family in families().values():
        names |= {*family.tokenizers, *family.schedulers}
    return names
