"""From the Hub, through `huggingface_hub`: the files of one commit, each downloaded when it is
asked for."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from ..io import atomic
from .client import UntrustedAnswer, guard
from .errors import explain
from .secrets import remember


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


@dataclass(frozen=True)
class Commit:
    """A commit of a repository: its hash, the paths of its files, and what gives one's local path
    once it is there."""

    sha: str
    files: Collection[str]
    download: Callable[[str], str]


def find_commit(repo_id: str, options: HubOptions) -> Commit | Path:
    """What a revision of a repository is; where the Hub may not or cannot be asked, the folder of
    what is in the cache.

    Raises:
        OSError: in one line, why there is neither.
    """
    try:
        import huggingface_hub as hub
        from huggingface_hub import constants, errors
    except ImportError:
        raise OSError(
            f"{repo_id}: there is no such folder; an id on the Hub needs `pip install"
            " 'weightport[hub]'`"
        ) from None
    revision, cache_dir, token = (
        options.get("revision"),
        options.get("cache_dir"),
        options.get("token"),
    )

    def cached(reason: str) -> Path:
        """What is in the cache; `allow_patterns=[]` asks for the place alone, whatever is there."""
        place: dict[str, Any] = {
            "revision": revision,
            "cache_dir": cache_dir,
            "local_files_only": True,
        }
        try:
            return Path(hub.snapshot_download(repo_id, **place, allow_patterns=[]))
        except (OSError, ValueError):
            raise OSError(
                f"{repo_id}: there is no such folder; {reason}, and it has not been downloaded"
                " before"
            ) from None

    guard()
    remember(token)
    remember(hub.get_token())
    if options.get("local_files_only") or constants.HF_HUB_OFFLINE:
        return cached("the Hub may not be asked (local_files_only or HF_HUB_OFFLINE)")
    try:
        timeout = constants.HF_HUB_ETAG_TIMEOUT
        info = hub.HfApi(token=token).model_info(repo_id, revision=revision, timeout=timeout)
    except (
        errors.RepositoryNotFoundError,
        errors.RevisionNotFoundError,
        UntrustedAnswer,
    ) as error:  # gated ones too
        where = f"{repo_id}@{revision}" if revision else repo_id
        raise OSError(f"{where}: there is no such folder; on the Hub: {explain(error)}") from None
    except (
        Exception
    ) as error:  # no connection, or an error of the server: the classes differ between versions
        folder = cached(f"the Hub cannot be reached ({type(error).__name__})")
        warnings.warn(
            f"{repo_id}: the Hub cannot be reached; what was downloaded before is used",
            stacklevel=5,
        )
        return folder
    sha = str(info.sha)
    cache = Path(cache_dir or constants.HF_HUB_CACHE).expanduser()
    _remember(
        cache / f"models--{repo_id.replace('/', '--')}" / "refs",
        revision or constants.DEFAULT_REVISION,
        sha,
    )
    place: dict[str, Any] = {"revision": sha, "cache_dir": cache_dir, "token": token}
    place["force_download"] = options.get("force_download", False)
    fetched: dict[str, str] = {}

    def download(name: str) -> str:
        if name not in fetched:
            try:
                fetched[name] = hub.hf_hub_download(repo_id, name, **place)
            except Exception as error:
                raise OSError(f"{repo_id}: {name}: {explain(error)}") from None
        return fetched[name]

    return Commit(sha, [file.rfilename for file in info.siblings or ()], download)


def _remember(refs: Path, revision: str, sha: str) -> None:
    """Note in the Hub's cache what commit a branch is at, so that it is found offline.

    `huggingface_hub` does the same.
    """
    if revision == sha:
        return
    place = refs / revision
    with contextlib.suppress(OSError):  # a cache that others own is used, not written
        if not place.is_file() or place.read_text(encoding="utf-8") != sha:
            place.parent.mkdir(parents=True, exist_ok=True)
            atomic.text(place, sha)
