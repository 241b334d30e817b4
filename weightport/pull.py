"""From the Hugging Face Hub: the files that a reference names, through the Hub's own cache."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .errors import ConversionError, printable
from .hub.client import guard
from .hub.download import find_commit
from .hub.errors import explain, silent_in_a_pipe
from .hub.glance import Glance
from .hub.secrets import remember
from .io.weight_files import find_main_weights
from .mappings.facts import facts
from .mappings.families import component_names

# What a conversion can use of a diffusers repo: main safetensors files, configs and tokenizers,
# nothing that runs; `.bin` files of models that have no others.
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


def at_commit(text: str) -> list[Reference]:
    """What a reference names now, at its commit; where the Hub may not be asked, at the one that
    was downloaded. A repo that is no diffusers repo is the weights in it.

    Raises:
        ConversionError: it is no reference, the Hub and its cache do not know it, or there are
            several to choose from.
    """
    reference = _parsed(text)
    try:
        found = find_commit(reference.repo_id, {"revision": reference.revision})
    except OSError as error:
        raise ConversionError(f"{reference}: {error}") from error
    if isinstance(found, Path):
        sha = found.name
        names = [path.relative_to(found).as_posix() for path in found.rglob("*") if path.is_file()]
    else:
        sha = found.sha
        names = [*found.files]
    pinned = replace(reference, revision=sha)
    if reference.path or _is_repo(names):
        return [pinned]
    return [replace(pinned, path=name) for name in _weights_among(names, reference)]


def _is_repo(names: Sequence[str]) -> bool:
    """Whether the files of a repo are those of a diffusers repo."""
    models = {f"{model}/config.json" for model in component_names()}
    return "model_index.json" in names or bool(models.intersection(names))


def _weights_among(names: Sequence[str], reference: Reference) -> list[str]:
    """The files of one model: all Keras files, or the one checkpoint.

    Raises:
        ConversionError: there is none, or more than one.
    """
    known = facts("containers")["weights"]
    outer = sorted(name for name in names if "/" not in name)
    keras = [name for name in outer if name.endswith(tuple(known["keras"]))]
    if keras:
        return keras
    for suffix in known["suffixes"]:  # the first one of those that hold the same
        found = [name for name in outer if name.endswith(suffix)]
        if len(found) == 1:
            return found
        if found:
            raise ConversionError(
                f"{reference}: holds {', '.join(map(printable, found[:5]))}; name one, as in"
                f" {reference}/{printable(found[0])}"
            )
    raise ConversionError(f"{reference}: holds no weights")


_glance: ContextVar[Glance | None] = ContextVar("glance", default=None)


@contextmanager
def glancing() -> Iterator[Glance]:
    """While this lasts, what is fetched is only looked at: of large files those bytes come that are
    read, and nothing is kept. Where the Hub may not be asked it is what was downloaded before."""
    with tempfile.TemporaryDirectory(prefix="weightport-glance-") as folder:
        glance = Glance(Path(folder))
        token = _glance.set(glance)
        try:
            with glance.lasting():
                yield glance
        except ConversionError as error:
            raise ConversionError(glance.named(str(error))) from error
        finally:
            _glance.reset(token)


def fetch(text: str) -> Path:
    """The local path of what a reference names.

    That is a file, a folder with all below it, or a whole diffusers repo.

    Raises:
        ConversionError: it is no reference, or the Hub and its cache do not give it.
    """
    reference = _parsed(text)
    path = reference.path
    if not path:
        return _whole(reference)
    wanted = [path, f"{path}/*"]
    if path.endswith(_LISTS):
        wanted.append(f"{path.rpartition('/')[0]}/*".lstrip("/"))
    place = _snapshot(reference, wanted) / path
    if not place.exists():
        raise ConversionError(f"{reference}: there is no such file in the repo")
    return place


def fetch_all(repo_id: str) -> Path:
    """A folder with every file of a repo on the Hub, which is named as its commit.

    Raises:
        ConversionError: the Hub and its cache do not give it.
    """
    return _snapshot(_parsed(repo_id), ["*"])


def _whole(reference: Reference) -> Path:
    """A diffusers repo; `.bin` files only of models that have no others."""
    folder = _snapshot(reference, _REPO, _VARIANTS)
    bare = [model for model in component_names() if _is_bare(folder / model)]
    if not bare:
        return folder
    wanted = [*_REPO, *(f"{model}/*.bin" for model in bare)]
    return _snapshot(reference, wanted, (*_VARIANTS, "*.*.bin"))


def _is_bare(model: Path) -> bool:
    """Whether a model has a config and no weights beside it."""
    if not (model / "config.json").is_file():
        return False
    return find_main_weights([path.name for path in model.iterdir()]) is None


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
    glance = _glance.get()
    if glance is not None and (place := _looked_at(glance, reference, wanted, unwanted)):
        return place
    options: dict[str, Any] = {"allow_patterns": list(wanted), "ignore_patterns": list(unwanted)}
    try:
        with silent_in_a_pipe():
            folder = snapshot_download(
                reference.repo_id, revision=reference.revision, library_name="weightport", **options
            )
        return Path(folder)
    except Exception as error:  # classes of network errors differ between versions of the client
        raise ConversionError(f"{reference}: {explain(error)}") from error


def _looked_at(
    glance: Glance, reference: Reference, wanted: Sequence[str], unwanted: Sequence[str]
) -> Path | None:
    """The same as a snapshot, only to be looked at; None where the Hub cannot be asked."""
    from huggingface_hub import utils

    client: Any = utils
    try:
        found = find_commit(reference.repo_id, {"revision": reference.revision})
        if isinstance(found, Path):
            return None
        names = client.filter_repo_objects(
            found.files, allow_patterns=list(wanted), ignore_patterns=list(unwanted)
        )
        with silent_in_a_pipe():
            return glance.lay(reference.repo_id, found.sha, names)
    except OSError as error:
        raise ConversionError(f"{reference}: {error}") from error
