"""From the Hugging Face Hub: the files that a reference names, through the Hub's own cache."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .errors import ConversionError, printable
from .hub.client import guard
from .hub.download import find_commit
from .hub.errors import explain, silent_in_a_pipe
from .hub.secrets import remember
from .mappings.families import component_names

# What a conversion can use of a diffusers repo: main safetensors files, configs and tokenizers,
# nothing that runs.
_REPO = (
    "model_index.json",
    "*scheduler/*.json",
    "tokenizer*/*.json",
    "tokenizer*/merges.txt",
    *(f"{model}/*.safetensors" for model in component_names()),
    *(f"{model}/*.index.json" for model in component_names()),
    *(f"{model}/config.json" for model in component_names()),
)
_VARIANTS = ("*.*.safetensors", "*.safetensors.index.*.json", "*.safetensors.*.index.json")
_LISTS = (".json", ".index")  # files that name others beside them


@dataclass(frozen=True)
class Reference:
    """`owner/name`, `owner/name@revision`, or `owner/name@revision/path/in/it`."""

    repo_id: str
    revision: str | None
    path: str

    @classmethod
    def parse(cls, text: str) -> Reference | None:
        """What a text refers to, `hub:` in front or not; None if it cannot be a reference."""
        name = r"[A-Za-z0-9][\w.-]*"
        pattern = rf"(?:hub:)?({name}/{name})(?:@(refs/pr/\d+|[^/@]+))?(?:/(.+))?"
        match = re.fullmatch(pattern, text.rstrip("/"), re.ASCII)
        if match is None or ".." in text.split("/"):
            return None
        return cls(match[1], match[2], match[3] or "")

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"hub:{self.repo_id}{revision}" + (f"/{self.path}" if self.path else "")


def at_commit(text: str) -> Reference:
    """What a reference names now, at its commit; where the Hub may not be asked, at the one that
    was downloaded.

    Raises:
        ConversionError: it is no reference, or the Hub and its cache do not know it.
    """
    reference = _parsed(text)
    try:
        found = find_commit(reference.repo_id, {"revision": reference.revision})
    except OSError as error:
        raise ConversionError(f"{reference}: {error}") from error
    sha = found.name if isinstance(found, Path) else found.sha
    return replace(reference, revision=sha)


def fetch(text: str) -> Path:
    """The local path of what a reference names.

    That is a file, a folder with all below it, or a whole diffusers repo.

    Raises:
        ConversionError: it is no reference, or the Hub and its cache do not give it.
    """
    reference = _parsed(text)
    path = reference.path
    if not path:
        return _snapshot(reference, _REPO, _VARIANTS)
    wanted = [path, f"{path}/*"]
    if path.endswith(_LISTS):
        wanted.append(f"{path.rpartition('/')[0]}/*".lstrip("/"))
    place = _snapshot(reference, wanted) / path
    if not place.exists():
        raise ConversionError(f"{reference}: there is no such file in the repo")
    return place


def _parsed(text: str) -> Reference:
    reference = Reference.parse(text)
    if reference is None:
        raise ConversionError(
            f"{printable(text)}: not a reference to the Hub; write hub:owner/name@revision/file"
        )
    return reference


def _snapshot(reference: Reference, wanted: Sequence[str], unwanted: Sequence[str] = ()) -> Path:
    try:
        from huggingface_hub import get_token, snapshot_download
    except ImportError:
        raise ConversionError(
            f'{reference}: the Hub needs huggingface_hub; run `pip install "weightport[hub]"`'
        ) from None
    guard()
    remember(get_token())
    options: dict[str, Any] = {"allow_patterns": list(wanted), "ignore_patterns": list(unwanted)}
    try:
        with silent_in_a_pipe():
            folder = snapshot_download(
                reference.repo_id, revision=reference.revision, library_name="weightport", **options
            )
        return Path(folder)
    except Exception as error:  # classes of network errors differ between versions of the client
        raise ConversionError(f"{reference}: {explain(error)}") from error
