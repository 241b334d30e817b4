"""Folders in which a model lies somewhere inside: the Hub's cache, what training programs leave.

What their files are called is data: `mappings/facts/containers.toml`.
"""

from __future__ import annotations

import fnmatch
import os
import re
from pathlib import Path

from ...errors import ConversionError, printable
from ...io.weight_files import index_suffix, is_shard
from ...mappings.facts import facts
from ..readers.sniff import CONFIG, file_names, folder_names, sniff

_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)*", re.ASCII)
_REFERENCE = 250  # bytes of a file that names another folder
_BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_CACHED = "models--"  # how the Hub's client begins the folder of a model


def located(path: Path, revision: str | None = None) -> Path:
    """Where the weights of a path lie: the snapshot of a Hub cache, the file of a training run.

    Any other path is itself.

    Args:
        revision: of the Hub: a branch, a tag or a commit; by default `main`, or the newest.

    Raises:
        ConversionError: the folder holds none, or not the revision.
    """
    if is_hub_cache(path):
        return _snapshot(path, revision)
    if path.is_dir() and sniff(path) == "folder":
        return _deepspeed(path) or _preset(path) or path
    return path


# --- the Hub's cache ------------------------------------------------------------------------------


def is_hub_cache(path: Path) -> bool:
    """Whether a folder is what the Hub's client keeps of one repository."""
    return (path / "snapshots").is_dir() and any((path / n).is_dir() for n in ("refs", "blobs"))


def is_blob(real: Path) -> bool:
    """Whether a file is one that the Hub's client put into its cache."""
    folder = real.parent
    is_cached = folder.name == "blobs" and folder.parent.name.startswith(_CACHED)
    return is_cached and _BLOB.fullmatch(real.name) is not None


def _snapshot(cache: Path, revision: str | None) -> Path:
    """The folder of a revision in a Hub cache."""
    snapshots = cache / "snapshots"
    known = folder_names(snapshots)
    commit = _commit(cache, revision or "main")
    if commit in known:
        return snapshots / commit
    if revision is not None:
        raise ConversionError(
            f"{cache}: no revision {printable(revision)} in this cache; there are"
            f" {', '.join([*_references(cache), *known]) or 'none'}"
        )
    if not known:
        raise ConversionError(f"{cache}: a Hub cache without a snapshot; download the model again")
    return max((snapshots / name for name in known), key=lambda path: path.stat().st_mtime_ns)


def _commit(cache: Path, revision: str) -> str:
    """The commit that a revision names."""
    reference = cache / "refs" / revision
    if _is_name(revision) and reference.is_file():
        return _first_line(reference)
    return revision


def _references(cache: Path) -> list[str]:
    refs = cache / "refs"
    return file_names(refs) if refs.is_dir() else []


def _is_name(text: str) -> bool:
    """Whether a text names something in a folder, or in the folders in it."""
    return len(text) <= _REFERENCE and _NAME.fullmatch(text) is not None


def _first_line(path: Path) -> str:
    """The one name that a small file holds."""
    with path.open("rb") as file:
        return file.read(_REFERENCE).decode("utf-8", "replace").strip()


# --- training programs ----------------------------------------------------------------------------


def _deepspeed(folder: Path) -> Path | None:
    """The file with the weights of a DeepSpeed run, or of one step of it; None for other folders.

    Raises:
        ConversionError: they lie in shards.
    """
    known = facts("containers")["deepspeed"]
    newest = folder / known["newest"]
    run = folder if newest.is_file() else folder.parent
    step = folder
    if newest.is_file():
        name = _first_line(newest)
        step = folder / name if _is_name(name) and (folder / name).is_dir() else folder
    names = file_names(step)
    shards = fnmatch.filter(names, known["shards"])
    if not shards and not fnmatch.filter(names, known["others"]):
        return None
    for place in dict.fromkeys((folder, step)):
        for name in known["gathered"]:
            if (place / name).is_file():
                return place / str(name)
    if shards == [known["whole"]]:
        return step / str(shards[0])
    advice = known["advice"].replace("{run}", str(run))
    lie = f"lie in {len(shards)} shards" if shards else "are in the optimizer's shards only"
    raise ConversionError(f"{folder}: a DeepSpeed checkpoint whose weights {lie}; {advice}")


def _preset(folder: Path) -> Path | None:
    """The weights in the folder of a preset; None for other folders."""
    weights = folder / str(facts("containers")["preset"]["weights"])
    return weights if weights.is_file() and (folder / CONFIG).is_file() else None


def weight_files(folder: Path) -> list[Path]:
    """The files of a folder that may hold weights, an index in place of its shards."""
    known = facts("containers")
    names = [name for name in file_names(folder) if beside(name) is None]
    indexed = {suffix for name in names if (suffix := index_suffix(name))}
    suffixes = tuple(known["weights"]["suffixes"])
    found = [
        name
        for name in names
        if index_suffix(name)
        or (name.endswith(suffixes) and not (is_shard(name) and _suffix(name) in indexed))
    ]
    return [folder / name for name in found]


def _suffix(name: str) -> str:
    return name.rpartition(".")[2]


def left_beside(folder: Path) -> dict[str, str]:
    """What training programs left in a folder: name -> what it is."""
    found = {name: beside(name) for name in file_names(folder)}
    return {name: meaning for name, meaning in found.items() if meaning is not None}


def beside(name: str) -> str | None:
    """What a file is that training programs leave beside weights; None for others."""
    for pattern, meaning in facts("containers")["beside"].items():
        if fnmatch.fnmatchcase(name, pattern):
            return str(meaning)
    return None


# --- links ----------------------------------------------------------------------------------------


def inside(repo: Path, file: Path) -> Path:
    """The file, if it lies in the repo or among the blobs of a Hub cache.

    Raises:
        ConversionError: the file is a link to elsewhere, whose content would end up in the output,
            or to nothing.
    """
    root = Path(os.path.realpath(repo))
    real = Path(os.path.realpath(file))
    if not real.exists():
        raise ConversionError(
            f"{file}: a link to {real}, which is not there; of a Hub cache, copy blobs/ too"
        )
    snapshots = next((path for path in root.parents if path.name == "snapshots"), None)
    blobs = snapshots.parent / "blobs" if snapshots else root
    if not {root, blobs} & set(real.parents) and not is_blob(real):
        raise ConversionError(
            f"{file}: a link that leads out of the repo; put the file itself there"
        )
    return file
