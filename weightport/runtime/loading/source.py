"""Where the files of a repository come from: a local folder, or one commit on the Hub.

A `Source` lists names and hands out local paths; everything that loads goes through it. For a local
folder nothing touches the network, nor imports what could.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Unpack

from ...errors import ConversionError
from ...hub.download import Commit, HubOptions, find_commit
from ...io.documents import MAX_BYTES, parse_json, read_text
from ...io.regular import read_regular

StrPath = str | os.PathLike[str]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", re.ASCII)


def split_options(options: Mapping[str, Any], kind: type) -> tuple[dict[str, Any], dict[str, Any]]:
    """The keyword arguments that a class of options names, such as `HubOptions`, and the others."""
    named = {key: value for key, value in options.items() if key in kind.__annotations__}
    return named, {key: value for key, value in options.items() if key not in named}


class PlaceOptions(HubOptions, total=False):
    """Where in a repository something is: in its folder `subfolder`, or else at its top; and
    `HubOptions`."""

    subfolder: str | None


class Source:
    """A folder of a repository, here one on the disk.

    Attributes:
        name: for messages.
        commit: the hash of the commit on the Hub, if it is of one.
    """

    commit: str | None = None

    def __init__(self, root: Path, name: str | None = None) -> None:
        self.root, self.name = root, name or str(root)

    @property
    def names(self) -> Collection[str]:
        """Names of the regular files directly in the folder, links to them included."""
        return (
            [path.name for path in sorted(self.root.iterdir()) if path.is_file()]
            if self.root.is_dir()
            else []
        )

    def folder(self, name: str) -> Source:
        """A folder in this one; without files if there is none of that name."""
        return Source(self.root / name, f"{self.name}/{name}")

    def fetch(self, names: Iterable[str]) -> Path:
        """The local folder in which the files of these names are, once this returns."""
        return self.root

    def path(self, name: str) -> Path:
        """The local path of one file.

        Raises:
            OSError: there is no such file.
        """
        if name not in self.names:
            raise OSError(f"{self.name}: there is no {name} in it")
        return self.fetch([name]) / name

    def json(self, name: str, schema: str | None = None) -> dict[str, Any]:
        """The JSON object in a file, which follows a schema of `io.documents`.

        Raises:
            OSError: there is no such file.
            ValueError: it is none, or does not follow the schema.
        """
        path = self.path(name)
        try:
            return parse_json(read_regular(path, MAX_BYTES), f"{self.name}/{name}", schema)
        except ConversionError as error:
            raise ValueError(str(error)) from None

    def text(self, name: str) -> str:
        """The text in a file.

        Raises:
            OSError: there is no such file.
            ValueError: it is too large, or no UTF-8.
        """
        try:
            return read_text(self.path(name), MAX_BYTES)
        except ConversionError as error:
            raise ValueError(str(error)) from None


class HubFolder(Source):
    """A folder of one commit of a repository on the Hub; files are downloaded into the Hub's cache
    when asked for."""

    def __init__(self, repo_id: str, commit: Commit, prefix: str = "") -> None:
        self._repo_id, self._commit, self._prefix = repo_id, commit, prefix
        self.name, self.commit = f"{repo_id}/{prefix}".rstrip("/"), commit.sha

    @property
    def names(self) -> Collection[str]:
        """Names of the files directly in the folder."""
        files, prefix = self._commit.files, self._prefix
        inside = (name.removeprefix(prefix) for name in files if name.startswith(prefix))
        return [name for name in inside if "/" not in name]

    def folder(self, name: str) -> HubFolder:
        """A folder in this one."""
        return HubFolder(self._repo_id, self._commit, f"{self._prefix}{name.strip('/')}/")

    def fetch(self, names: Iterable[str]) -> Path:
        """Download what is not in the cache, several files at a time."""
        names = list(names)
        with ThreadPoolExecutor(8) as pool:
            paths = list(pool.map(self._commit.download, [self._prefix + name for name in names]))
        return Path(paths[0]).parents[names[0].count("/")]


Place = StrPath | Source


def open_source(
    name_or_path: Place, subfolder: str | None = None, **hub: Unpack[HubOptions]
) -> Source:
    """The folder that a user means: a local path if it exists, a Hub id otherwise; a `Source` stays
    as it is.

    Args:
        name_or_path: what the user gave.
        subfolder: the folder in it; where there is no such folder, the files at the top are meant.
        hub: see `HubOptions`.

    Raises:
        OSError: it is neither a folder nor a repository that can be reached.
        ValueError: it cannot be the name of a repository.
    """
    source = name_or_path if isinstance(name_or_path, Source) else _open(str(name_or_path), hub)
    inner = source.folder(subfolder) if subfolder else source
    return inner if inner.names else source


def _open(name: str, hub: HubOptions) -> Source:
    path = Path(name).expanduser()
    if path.is_dir():
        return Source(path)
    if path.exists():
        raise OSError(
            f"{path}: a file, not a folder; `weightport convert` makes a repository of a checkpoint"
        )
    if path.is_absolute() or name.startswith((".", "~")):
        raise OSError(f"{path}: there is no such folder")
    if not _HUB_ID.fullmatch(name):
        raise ValueError(
            f"{name}: neither a folder nor the id of a repository, `name` or `owner/name`"
        )
    found = find_commit(name, hub)
    return (
        HubFolder(name, found)
        if isinstance(found, Commit)
        else Source(found, f"{name} (as downloaded)")
    )
