"""From the Hub, only what is looked at: of large files the bytes that are read, of others all."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ..io.partial import PartialFile
from .client import guard
from .errors import explain

_SMALL = 1 << 16  # bytes of a file that comes as a whole
_TEXTS = (".json", ".txt", ".model")  # read as a whole, however large


class Glance:
    """A folder for what is looked at; it is nobody's cache.

    Attributes:
        folder: a new one; a context manager that forgets what it holds.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = ExitStack()

    @contextmanager
    def lasting(self) -> Iterator[Glance]:
        """Its time."""
        with self._files:
            yield self

    def named(self, text: str) -> str:
        """A text with the names of the Hub in place of paths in the folder."""
        path = rf"{re.escape(str(self.folder))}/([^/\s]+?)--([^/\s]+)/([0-9a-f]+)"
        return re.sub(path, r"hub:\1/\2@\3", text)

    def lay(self, repo_id: str, commit: str, names: Iterable[str]) -> Path:
        """The folder of a commit, with files of these names in it.

        Raises:
            OSError: in one line, why they do not come.
        """
        place = self.folder / repo_id.replace("/", "--") / commit
        place.mkdir(parents=True, exist_ok=True)
        wanted = [name for name in names if not (place / name).exists()]
        try:
            for about in _described(repo_id, commit, wanted):
                self._lay_one(repo_id, commit, about, place / about.path)
        except Exception as error:  # the classes of network errors differ between versions
            raise OSError(f"{repo_id}: {explain(error)}") from error
        return place

    def _lay_one(self, repo_id: str, commit: str, about: Any, path: Path) -> None:
        import huggingface_hub as hub

        path.parent.mkdir(parents=True, exist_ok=True)
        if about.lfs is None or about.size <= _SMALL or path.suffix in _TEXTS:
            shutil.copyfile(hub.hf_hub_download(repo_id, about.path, revision=commit), path)
            return
        address = hub.hf_hub_url(repo_id, about.path, revision=commit)

        def fetch(offset: int, nbytes: int) -> bytes:
            return _range(address, offset, nbytes, f"{repo_id}: {about.path}")

        file = PartialFile(path, about.size, about.lfs.sha256, fetch)
        self._files.callback(file.close)


def _described(repo_id: str, commit: str, names: list[str]) -> list[Any]:
    """What the Hub says of files: path, size, and the sha256 of large ones."""
    import huggingface_hub as hub

    guard()
    if not names:
        return []
    found = hub.HfApi(library_name="weightport").get_paths_info(repo_id, names, revision=commit)
    return [one for one in found if hasattr(one, "size")]


def _range(address: str, offset: int, nbytes: int, what: str) -> bytes:
    """Bytes of a file on the Hub.

    Raises:
        OSError: they do not come.
    """
    from huggingface_hub import utils

    asked: Any = utils
    headers = asked.build_hf_headers(library_name="weightport")
    headers["Range"] = f"bytes={offset}-{offset + nbytes - 1}"
    headers["Accept-Encoding"] = "identity"
    try:
        answer = asked.http_backoff("GET", address, headers=headers, **_RETRIED)
        asked.hf_raise_for_status(answer)
    except Exception as error:
        raise OSError(f"{what}: {explain(error)}") from error
    content = bytes(answer.content)
    if len(content) != nbytes:
        raise OSError(f"{what}: the Hub sent {len(content)} bytes, not the {nbytes} asked for")
    return content


_RETRIED: dict[str, Any] = {"max_retries": 3, "base_wait_time": 0.5, "timeout": 30}
