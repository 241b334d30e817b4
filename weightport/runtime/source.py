"""Where the files of a repository come from: a local folder, or one commit on the Hub, through `huggingface_hub`.

A `Source` lists names and hands out local paths; everything that loads goes through it. For a local folder nothing
touches the network, nor imports what could.
"""

from __future__ import annotations

import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, TypedDict, Unpack

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_MAX_JSON = 100_000_000  # bytes; a tokenizer.json has 3 million


class HubOptions(TypedDict, total=False):
    """How to reach the Hub; of no effect on local folders.

    Attributes:
        revision: branch, tag or commit; looked up once, all files are of that commit.
        cache_dir: the cache of downloads, instead of `HF_HUB_CACHE`.
        token: for private and gated repositories, instead of `HF_TOKEN`; False sends none.
        local_files_only: use only what has been downloaded, as with `HF_HUB_OFFLINE=1`.
        force_download: download again what has been downloaded.
    """

    revision: str | None
    cache_dir: str | Path | None
    token: str | bool | None
    local_files_only: bool
    force_download: bool


class Source(ABC):
    """A folder of a repository. `name` is for messages; `names` are those of the files directly in it."""

    name: str

    @property
    @abstractmethod
    def names(self) -> Collection[str]:
        """Names of the files directly in the folder."""

    @abstractmethod
    def folder(self, name: str) -> Source:
        """A folder in this one; without files if there is none of that name."""

    @abstractmethod
    def fetch(self, names: Iterable[str]) -> Path:
        """The local folder in which the files of these names are, once this returns."""

    def path(self, name: str) -> Path:
        """The local path of one file.

        Raises:
            OSError: there is no such file.
        """
        if name not in self.names:
            raise OSError(f"{self.name}: there is no {name} in it")
        return self.fetch([name]) / name

    def json(self, name: str) -> dict[str, Any]:
        """The JSON object in a file.

        Raises:
            OSError: there is no such file.
            ValueError: it is not a JSON object.
        """
        path = self.path(name)
        try:
            if path.stat().st_size > _MAX_JSON:
                raise ValueError("too large")
            content = json.loads(path.read_bytes())
        except (ValueError, RecursionError):
            raise ValueError(f"{self.name}: the JSON in {name} cannot be read; is the file damaged?") from None
        if not isinstance(content, dict):
            raise ValueError(f"{self.name}: {name} does not hold a JSON object")
        return content


class LocalFolder(Source):
    """A folder on the disk."""

    def __init__(self, root: Path) -> None:
        self.root, self.name = root, str(root)

    @property
    def names(self) -> Collection[str]:
        """Names of the regular files directly in the folder, links to them included."""
        return [path.name for path in sorted(self.root.iterdir()) if path.is_file()] if self.root.is_dir() else []

    def folder(self, name: str) -> LocalFolder:
        """A folder in this one."""
        return LocalFolder(self.root / name)

    def fetch(self, names: Iterable[str]) -> Path:
        """The folder itself: its files are here already."""
        return self.root


def open_source(
    name_or_path: str | os.PathLike[str] | Source, subfolder: str | None = None, **hub: Unpack[HubOptions]
) -> Source:
    """The folder that a user means: a local path if it exists, a Hub id otherwise; a `Source` stays as it is.

    Args:
        name_or_path: what the user gave.
        subfolder: the folder in it; where there is no such folder, the files at the top are meant.
        hub: see `HubOptions`.

    Raises:
        OSError: it is neither a folder nor a repository that can be reached.
        ValueError: it cannot be the name of a repository.
    """
    if isinstance(name_or_path, Source):
        source = name_or_path
    elif Path(name_or_path).expanduser().is_dir():
        source = LocalFolder(Path(name_or_path).expanduser())
    else:
        raise OSError(f"{name_or_path}: there is no such folder")
    inner = source.folder(subfolder) if subfolder else source
    return inner if inner.names else source
