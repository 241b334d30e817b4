"""Folders and globs: which of the files and folders in them are checkpoints, and which Keras files
make one model together."""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath

from ..api import inspect
from ..converters.layouts.folders import beside, is_hub_cache, located
from ..converters.outputs.ldm_residue import residue_path
from ..converters.readers.bundles import find_bundle
from ..converters.readers.sniff import INDEX, file_names, folder_names, is_model, sniff
from ..errors import ConversionError
from ..io.weight_files import index_suffix, is_shard
from ..mappings.facts import facts
from ..mappings.families import component_names
from .jobs import HIDDEN, Entry
from .lists import stem

_WILD = re.compile(r"[*?\[]")
_KERAS_SHARD = re.compile(r"_\d{5}\.weights\.h5$")
_KERAS_INDEX = ".weights.json"
_RESIDUE = residue_path(Path("x")).name.removeprefix("x")
_PARTS = {"hdf5", "zip", "json", "tensorflow"}  # kinds of files that hold one part of a model each


@dataclass
class Shelf:
    """The checkpoints that were found.

    Attributes:
        results: a folder that is not looked into.
        entries: a job for each.
        left: what holds none.
        seen: what was met, by the path behind all links.
    """

    results: Path
    entries: list[Entry] = field(default_factory=list)
    left: list[Path] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)

    def search(self, texts: Sequence[str]) -> None:
        """Take what paths and patterns name, or what lies below it.

        Raises:
            ConversionError: nothing has such a name.
        """
        named = []
        shelves: list[tuple[Path, Path]] = []  # and what their names are paths in
        for text in texts:
            path = Path(text).expanduser()
            if _WILD.search(text) and not os.path.lexists(path):
                found = _matching(str(path))
                root = _common(found)
                shelves += [(one, root) for one in found if _is_shelf(one)]
                named += [one for one in found if not _is_shelf(one) and _is_weights(one)]
            elif _is_shelf(path):
                shelves.append((path, path))
            else:
                named.append(path)
        if named:
            self._take(named, _common(named))
        for folder, root in shelves:
            self._walk(folder, root)

    def _walk(self, folder: Path, root: Path) -> None:
        """Take what lies in a folder, and in the folders in it, each once."""
        waiting = [folder]
        while waiting:
            place = waiting.pop()
            if not self._is_new(place):
                continue
            shelves = []
            weights = []
            for path in _inside(place):
                if _is_shelf(path):
                    shelves.append(path)
                elif _is_weights(path):
                    weights.append(path)
                else:
                    self.left.append(path)
            self._take(weights, root)
            waiting += reversed(shelves)

    def _is_new(self, path: Path) -> bool:
        """Whether a path was not met before, by whatever links to folders."""
        whole = path.absolute()
        real = os.path.realpath(path)
        if not path.is_dir():
            real = os.path.join(os.path.realpath(whole.parent), whole.name)  # noqa: PTH118
        if real in self.seen or real == os.path.realpath(self.results):
            return False
        self.seen.add(real)
        return True

    def _take(self, paths: Sequence[Path], root: Path) -> None:
        """Make jobs of checkpoints; Keras files that belong together are one.

        Args:
            root: their names are paths in it.
        """
        by_folder: dict[Path, list[_Weights]] = {}
        for path in filter(self._is_new, map(_whole, paths)):
            by_folder.setdefault(path.absolute().parent, []).append(_Weights(path))
        for folder, found in by_folder.items():
            inner = PurePosixPath(folder.relative_to(root.absolute()).as_posix())
            for name, group in _grouped(found, folder, is_root=not inner.parts):
                first = group[0].path
                names = dict.fromkeys((name, stem(first.name), first.name))
                if name == folder.name and inner.parts:  # the folder is the model
                    places = (str(inner), *(str(inner / other) for other in names))
                else:
                    places = tuple(str(inner / other) for other in names)
                sources = tuple(str(one.path.absolute()) for one in group)
                self.entries.append(Entry(str(first), sources, places))


def _common(paths: Sequence[Path]) -> Path:
    """The folder in which all lie."""
    return Path(os.path.commonpath([path.absolute().parent for path in paths]))


def _whole(path: Path) -> Path:
    """A path, or what the several files of a TensorFlow checkpoint have in common."""
    return find_bundle(path) or path if path.is_file() else path


def _matching(pattern: str) -> list[Path]:
    found = sorted(Path(name) for name in glob.iglob(pattern, recursive=True))  # noqa: PTH207 - anywhere
    if not found:
        raise ConversionError(f"{pattern}: nothing has such a name")
    return found


def _inside(folder: Path) -> list[Path]:
    """The files and folders in a folder, in order."""
    try:
        names = sorted([*file_names(folder), *folder_names(folder)])
    except OSError as error:
        raise ConversionError(f"{folder}: cannot be read ({error.strerror})") from None
    return [folder / name for name in dict.fromkeys(names) if not name.startswith(HIDDEN)]


# --- what a path is -------------------------------------------------------------------------------


def _is_shelf(path: Path) -> bool:
    """Whether a path is a folder of checkpoints, and not one itself."""
    if not path.is_dir():
        return False
    try:
        kind = sniff(path)
        if kind == "folder":
            return not is_hub_cache(path) and located(path) == path
    except ConversionError:  # a damaged one; of several TensorFlow checkpoints each is one
        return len([name for name in file_names(path) if name.endswith(".index")]) > 1
    if kind == "repo":
        models = [name for name in folder_names(path) if is_model(path / name)]
        return not (path / INDEX).is_file() and not set(models) & set(component_names())
    if kind == "model":
        return False
    return _holds_others(path, kind)


def _holds_others(folder: Path, kind: str) -> bool:
    """Whether files lie in a folder that are not of the one checkpoint that makes it one."""
    if (folder / "saved_model.pb").is_file():
        return False
    names = [name for name in file_names(folder) if name.endswith(_suffixes())]
    if kind == "json":
        names = [name for name in names if not _KERAS_SHARD.search(name)]
        return names != [name for name in names if name.endswith(_KERAS_INDEX)][:1]
    return bool(names)


def _suffixes() -> tuple[str, ...]:
    known = facts("containers")["weights"]
    return (*known["suffixes"], *known["keras"])


def _is_weights(path: Path) -> bool:
    """Whether a path is a checkpoint, damaged or not: by its name, or else by its content."""
    if path.is_dir():
        return True
    name = path.name
    if beside(name) is not None or _is_piece(path):
        return False
    if name.endswith(_suffixes()) or index_suffix(name):
        return True
    try:
        return sniff(path) in facts("containers")["weights"]["kinds"]
    except (ConversionError, OSError):
        return False


def _is_piece(path: Path) -> bool:
    """Whether a file is read with another one: a shard beside its index, a repo's residue."""
    name = path.name
    if name.endswith(_RESIDUE):
        return path.with_name(name.removesuffix(_RESIDUE)).is_dir()
    if shard := _KERAS_SHARD.search(name):
        return path.with_name(name[: shard.start()] + _KERAS_INDEX).is_file()
    if not is_shard(name):
        return False
    suffix = path.suffix.removeprefix(".")
    return any(index_suffix(other) == suffix for other in file_names(path.parent))


# --- which Keras files are one model --------------------------------------------------------------


@dataclass(frozen=True)
class _Weights:
    """A checkpoint, or one part of one."""

    path: Path

    @cached_property
    def is_part(self) -> bool:
        """Whether other files may belong to it."""
        known = facts("containers")["weights"]["keras"]
        if self.path.name.endswith(tuple(known)):
            return True
        try:
            return sniff(self.path) in _PARTS
        except (ConversionError, OSError):
            return False

    @cached_property
    def held(self) -> tuple[frozenset[str], frozenset[str]]:
        """Its parts and the families they may be of; of a damaged one what its name says."""
        try:
            found = inspect(self.path).parts
        except (ConversionError, OSError):
            found = ()
        named = frozenset(part for part in [_word(self.path.name)[1]] if part)
        parts = frozenset(part.part for part in found if part.families)
        families = [frozenset(part.families) for part in found if part.families]
        return parts or named, frozenset.intersection(*families) if families else frozenset()

    @property
    def stem(self) -> str:
        """Its name without format and part: what it has in common with the others of a model."""
        return _word(self.path.name)[0]


def _word(name: str) -> tuple[str, str]:
    """The name of a file without format and part, and the part; empty where it names none."""
    rest = stem(name)
    words = facts("kerascv")["part_names"]
    for word in sorted(words, key=len, reverse=True):
        spelled = word.replace("_", r"[\W_]?")
        found = re.search(rf"(?<![^\W_]){spelled}(?![^\W_])", rest, re.IGNORECASE)
        if found:
            left = (rest[: found.start()].rstrip("-_. "), rest[found.end() :].lstrip("-_. "))
            return "-".join(filter(None, left)), words[word]
    return rest, ""


def _grouped(
    found: Sequence[_Weights], folder: Path, *, is_root: bool
) -> Iterator[tuple[str, list[_Weights]]]:
    """The models that checkpoints of one folder make: name -> the files of each.

    Args:
        is_root: whether the folder is what the user named; of the others each may be a model.
    """
    parts = [one for one in found if one.is_part]
    for one in found:
        if not one.is_part:
            yield stem(one.path.name), [one]
    stems = {one.stem for one in parts} - {""}
    if len(parts) > 1 and _fit(parts) and (not is_root or len(stems) < 2):
        name = folder.name if not is_root or not stems else stems.pop()
        yield name, parts
        return
    by_stem: dict[str, list[_Weights]] = {}
    for one in parts:
        by_stem.setdefault(one.stem, []).append(one)
    for name, group in by_stem.items():
        if len(group) > 1 and _fit(group):
            yield name or folder.name, group
        else:
            yield from ((stem(one.path.name), [one]) for one in group)


def _fit(group: Sequence[_Weights]) -> bool:
    """Whether no part is there twice, and one family has them all."""
    parts = Counter(part for one in group for part in one.held[0])
    families = [one.held[1] for one in group if one.held[1]]
    is_one_family = not families or bool(frozenset.intersection(*families))
    return all(one.held[0] for one in group) and max(parts.values()) == 1 and is_one_family
