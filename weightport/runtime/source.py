"""Where the files of a repository come from: a local folder, or one commit on the Hub, through `huggingface_hub`.

A `Source` lists names and hands out local paths; everything that loads goes through it. For a local folder nothing
touches the network, nor imports what could.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypedDict, Unpack

from ..upload import explain

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", re.ASCII)
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


def split_options(options: Mapping[str, Any], kind: type) -> tuple[dict[str, Any], dict[str, Any]]:
    """The keyword arguments that a class of options names, such as `HubOptions`, and the others."""
    named = {key: value for key, value in options.items() if key in kind.__annotations__}
    return named, {key: value for key, value in options.items() if key not in named}


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

    def __init__(self, root: Path, name: str | None = None) -> None:
        self.root, self.name = root, name or str(root)

    @property
    def names(self) -> Collection[str]:
        """Names of the regular files directly in the folder, links to them included."""
        return [path.name for path in sorted(self.root.iterdir()) if path.is_file()] if self.root.is_dir() else []

    def folder(self, name: str) -> LocalFolder:
        """A folder in this one."""
        return LocalFolder(self.root / name, f"{self.name}/{name}")

    def fetch(self, names: Iterable[str]) -> Path:
        """The folder itself: its files are here already."""
        return self.root


class HubFolder(Source):
    """A folder of one commit of a repository on the Hub; files are downloaded into the Hub's cache when asked for."""

    def __init__(self, repo_id: str, files: Collection[str], download: Callable[[str], str], prefix: str = "") -> None:
        self._repo_id, self._files, self._download, self._prefix = repo_id, files, download, prefix
        self.name = f"{repo_id}/{prefix}".rstrip("/")

    @property
    def names(self) -> Collection[str]:
        """Names of the files directly in the folder."""
        inside = (name.removeprefix(self._prefix) for name in self._files if name.startswith(self._prefix))
        return [name for name in inside if "/" not in name]

    def folder(self, name: str) -> HubFolder:
        """A folder in this one."""
        return HubFolder(self._repo_id, self._files, self._download, f"{self._prefix}{name.strip('/')}/")

    def fetch(self, names: Iterable[str]) -> Path:
        """Download what is not in the cache, several files at a time."""
        names = list(names)
        with ThreadPoolExecutor(8) as pool:
            paths = list(pool.map(self._download, [self._prefix + name for name in names]))
        return Path(paths[0]).parents[names[0].count("/")]


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
    elif (path := Path(name_or_path).expanduser()).is_dir():
        source = LocalFolder(path)
    elif path.exists():
        raise OSError(f"{path}: a file, not a folder; `weightport convert` makes a repository of a checkpoint")
    elif path.is_absolute() or str(name_or_path).startswith((".", "~")):
        raise OSError(f"{path}: there is no such folder")
    elif not _HUB_ID.fullmatch(str(name_or_path)):
        raise ValueError(f"{name_or_path}: neither a folder nor the id of a repository, `name` or `owner/name`")
    else:
        source = _open_hub(str(name_or_path), hub)
    inner = source.folder(subfolder) if subfolder else source
    return inner if inner.names else source


def _open_hub(repo_id: str, options: HubOptions) -> Source:
    try:
        import huggingface_hub as hub
        from huggingface_hub import constants, errors
    except ImportError:
        raise OSError(
            f"{repo_id}: there is no such folder; an id on the Hub needs `pip install 'weightport[hub]'`"
        ) from None
    revision, cache_dir, token = options.get("revision"), options.get("cache_dir"), options.get("token")

    def cached(reason: str) -> Source:
        """What is in the cache; `allow_patterns=[]` asks for the place alone, whatever is there."""
        place: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir, "local_files_only": True}
        try:
            folder = Path(hub.snapshot_download(repo_id, **place, allow_patterns=[]))
        except (OSError, ValueError):
            raise OSError(f"{repo_id}: {reason}, and it has not been downloaded before") from None
        return LocalFolder(folder, f"{repo_id} (as downloaded)")

    if options.get("local_files_only") or constants.HF_HUB_OFFLINE:
        return cached("the Hub may not be asked (local_files_only or HF_HUB_OFFLINE)")
    try:
        info = hub.HfApi(token=token).model_info(repo_id, revision=revision)
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:  # gated ones too
        where = f"{repo_id}@{revision}" if revision else repo_id
        raise OSError(f"{where}: there is no such folder; on the Hub: {explain(error)}") from None
    except Exception as error:  # no connection, or an error of the server: the classes differ between versions
        source = cached(f"the Hub cannot be reached ({type(error).__name__})")
        warnings.warn(f"{repo_id}: the Hub cannot be reached; what was downloaded before is used", stacklevel=4)
        return source
    commit = str(info.sha)
    cache = Path(cache_dir or constants.HF_HUB_CACHE).expanduser()
    _remember(cache / f"models--{repo_id.replace('/', '--')}" / "refs", revision or constants.DEFAULT_REVISION, commit)
    place: dict[str, Any] = {"revision": commit, "cache_dir": cache_dir, "token": token}
    place["force_download"] = options.get("force_download", False)
    fetched: dict[str, str] = {}

    def download(name: str) -> str:
        if name not in fetched:
            try:
                fetched[name] = hub.hf_hub_download(repo_id, name, **place)
            except Exception as error:
                raise OSError(f"{repo_id}: {name}: {explain(error)}") from None
        return fetched[name]

    return HubFolder(repo_id, [file.rfilename for file in info.siblings or ()], download)


def _remember(refs: Path, revision: str, commit: str) -> None:
    """Note in the Hub's cache what commit a branch is at, as `huggingface_hub` does, so that it is found offline."""
    if revision == commit:
        return
    place = refs / revision
    with contextlib.suppress(OSError):  # a cache that others own is used, not written
        if not place.is_file() or place.read_text() != commit:
            place.parent.mkdir(parents=True, exist_ok=True)
            beside = place.with_name(f"{place.name}.{os.getpid()}.partial")
            beside.write_text(commit)
            beside.replace(place)
