"""What a repo takes over, as it is, from the one that its denoiser comes from, or from a base: the
index with the pipeline's class and settings, and the folders that we do not convert."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import ConversionError, printable
from ...io.weight_files import find_main_weights
from ...mappings.families import Family
from ..checkpoint import SourceFile
from ..layouts.diffusers_repo import read_index
from ..layouts.folders import inside, located
from ..planning.plan import PlannedComponent
from ..readers.listed import read_listed
from ..readers.signatures import is_torch
from ..readers.sniff import INDEX, folder_names
from .base import base_file

Components = Mapping[str, PlannedComponent]
_CHUNK = 1 << 20  # bytes copied at once
_CLASS = "_class_name"


@dataclass(frozen=True)
class Carried:
    """What is taken over from a repository.

    Attributes:
        repo: where it lies.
        index: what its `model_index.json` says, less what is not so any more.
        folders: names of those that are copied.
        code: names of files with code of the repository's own.
        absent: components that its index names and it does not have.
    """

    repo: Path
    index: dict[str, Any]
    folders: tuple[str, ...]
    code: tuple[str, ...]
    absent: tuple[str, ...]

    @property
    def notes(self) -> list[str]:
        """What the user should know of it, one sentence each."""
        notes = []
        if self.folders:
            listed = ", ".join(f"{printable(name)}/" for name in self.folders)
            notes.append(f"taken over as they are, not converted: {listed}")
        if self.code:
            listed = ", ".join(map(printable, self.code))
            notes.append(f"code of the repo's own is taken over, and was not run: {listed}")
        if self.absent:
            listed = ", ".join(map(printable, self.absent))
            notes.append(f"the repo's index names {listed}, which it does not have: left out")
        return notes

    @property
    def nbytes(self) -> int:
        """Bytes that are copied."""
        return sum(file.stat().st_size for file, _ in self.files())

    def files(self) -> Iterator[tuple[Path, Path]]:
        """Each file that is copied, and its place in a repo.

        Pickles are left out where the same weights are there as safetensors.

        Raises:
            ConversionError: one is a link that leads elsewhere.
        """
        for name in self.folders:
            for folder, folders, names in os.walk(self.repo / name):
                folders[:] = sorted(one for one in folders if not one.startswith("."))
                main = find_main_weights(names) or ""
                for file in sorted(names):
                    is_second = file.endswith((".bin", ".msgpack")) and "safetensors" in main
                    if not is_second and not file.startswith("."):
                        path = inside(self.repo, Path(folder, file))
                        yield path, path.relative_to(self.repo)
        for name in self.code:
            yield inside(self.repo, self.repo / name), Path(name)

    def write(self, folder: Path) -> None:
        """Copy the files into a repo.

        Raises:
            ConversionError: a pickle among them is damaged or harmful.
        """
        for path, place in self.files():
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            _copy(path, folder / place)


def carried_from(
    family: Family, components: Components, whole: bool, base: Path | None = None
) -> Carried | None:
    """What a repo of these components takes over, if its denoiser comes from a repository.

    Where it comes from a file, what its pipeline needs and is not converted comes from the base.

    Args:
        whole: also the folders that are not converted; otherwise the index alone.
        base: what the components are filled up from.

    Raises:
        ConversionError: the index of the repository cannot be read, or names what it cannot have.
    """
    denoiser = components.get(family.denoiser)
    if base_file(denoiser, INDEX) is None:
        return _copied_from(family, base) if whole and base is not None else None
    assert denoiser is not None
    repo = denoiser.parts[0].checkpoint.path
    index = read_index(repo)
    if any(_extends_elsewhere(family, name, repo, one) for name, one in components.items()):
        index.pop(_CLASS, None)  # a ControlNet was given: that asks for another pipeline
    made = {*components, *family.tokenizers, *family.schedulers, "scheduler"}
    present = set(folder_names(repo))
    folders = []
    absent = []
    for name, entry in list(index.items()):
        if name in made or not isinstance(entry, list) or name == _CLASS:
            continue
        if whole and _is_entry(entry) and name in present:
            folders.append(name)
        elif any(entry):
            absent.append(name)
            del index[name]
    code = _code(repo, index) if whole else []
    return Carried(repo, index, tuple(folders), tuple(code), tuple(absent) if whole else ())


def _copied_from(family: Family, base: Path) -> Carried | None:
    """What a pipeline needs and is not converted, from a base that has it."""
    repo = located(base)
    index = read_index(repo)
    present = set(folder_names(repo)) if index else set()
    folders = [name for name in family.copied if name in present and _is_entry(index.get(name))]
    if not folders:
        return None
    taken = {name: index[name] for name in (_CLASS, *folders) if name in index}
    return Carried(repo, taken, tuple(folders), (), ())


def _extends_elsewhere(family: Family, name: str, repo: Path, component: PlannedComponent) -> bool:
    """Whether a component extends the pipeline and does not come from its repository."""
    is_theirs = all(part.checkpoint.path == repo for part in component.parts)
    return family.components[name].extends and not is_theirs


def _is_entry(entry: Any) -> bool:
    """Whether a value of an index names a component: its library and its class."""
    is_pair = isinstance(entry, list) and len(entry) == 2
    return is_pair and all(isinstance(word, str) for word in entry)


def _code(repo: Path, index: Mapping[str, Any]) -> list[str]:
    """The file with the pipeline's class, where it is the repository's own."""
    entry = index.get(_CLASS)
    if not isinstance(entry, list):
        return []
    name = f"{entry[0]}.py" if _is_entry(entry) and str(entry[0]).isidentifier() else ""
    if not name or not (repo / name).is_file():
        raise ConversionError(
            f"{repo / INDEX}: `{_CLASS}` is {printable(str(entry)[:80])}, of which there is no file"
        )
    return [name]


def _copy(path: Path, target: Path) -> None:
    """Copy a file; a pickle is looked through first, for it would end up in the output."""
    file = SourceFile(path)
    try:
        if is_torch(file):
            for opened in read_listed(path, "torch").files:
                opened.close()
        with target.open("wb") as written:
            for offset in range(0, file.size, _CHUNK):
                written.write(file.read(offset, min(_CHUNK, file.size - offset)))
        file.check_unchanged()
    finally:
        file.close()
