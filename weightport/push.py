"""To the Hugging Face Hub: a converted repo in one commit, after checking every file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .converters.adapter_description import Loose, loose
from .converters.outputs.diffusers import pipeline_class
from .converters.repo.adapter_card import adapter_card
from .converters.repo.card import (
    body,
    check_base_model,
    check_license,
    metadata,
    model_card,
    refresh,
)
from .errors import ConversionError, printable
from .hub.errors import silent_in_a_pipe
from .hub.front_matter import check_front_matter
from .hub.upload import CARD, upload
from .io.documents import read_json, read_text
from .mappings.families import families, halves, halves_of
from .mappings.layouts import CANONICAL
from .pull import Reference

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

REPORT = "conversion.json"
PARITY = "parity.json"
_MAX_CARD = 4 << 20  # bytes of a README


@dataclass(frozen=True)
class Push:
    """What was pushed.

    Attributes:
        url: of the commit or the pull request.
        files: their paths in the repo.
        warnings: what the user should know, one sentence each.
    """

    url: str
    files: list[str]
    warnings: list[str] = field(default_factory=list)


def push(
    repo: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
    license: str | None = None,
    base_model: str | None = None,
    allow_unverified: bool = False,
    token: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Push:
    """Upload a converted repo to the Hub in one commit, after checking every file; its model card
    is renewed.

    Args:
        repo: what `convert` wrote; or an adapter or an embedding, which gets a card.
        repo_id: `owner/name`; made if it is not there.
        private: of a repo that is made.
        revision: the branch, made if it is not there; by default `main`.
        create_pr: open a pull request instead.
        message: of the commit.
        license: for the model card, as the Hub names it; by default what `convert` was given.
        base_model: the same, the Hub id of the model that this one was fine-tuned from.
        allow_unverified: push although no `parity.json` in the repo proves the conversion.
        token: instead of `HF_TOKEN` or the one of `hf auth login`.
        progress: called with (bytes just checked, bytes in all).

    Raises:
        ConversionError: in one line, what is wrong and what to do; nothing of the repo is visible
            on the Hub.
    """
    repo = Path(repo)
    reference = Reference.parse(repo_id)
    if reference is None or reference.revision or reference.path:
        raise ConversionError(f"{printable(repo_id)}: not a Hub id; write it as owner/name")
    given = {
        "license": license and check_license(license),
        "base_model": base_model and check_base_model(base_model),
    }
    target = _Target(private, revision, create_pr, message, token)
    alone = None if (repo / REPORT).is_file() else loose(repo)
    if alone is not None:
        return _push_alone(alone, repo_id, given, target)
    report = read_report(repo)
    if report is None:
        raise ConversionError(
            f"{repo}: has no {REPORT}, so it is not what `weightport convert` writes"
        )
    files = _checked(repo, report, progress or (lambda done, total: None))
    parity = read_parity(repo)
    doubt = unverified(report, parity)
    if doubt and not allow_unverified:
        raise ConversionError(
            f"{repo}: {doubt}; run `weightport parity`, or push it with --allow-unverified"
        )
    branch = None if create_pr else revision
    card = _card(repo, report, body(report, pipeline_class(repo), repo_id, branch, parity), given)
    written = {CARD: str(card).encode()}
    # what somebody else's repo says of itself is not for a pull request to replace
    files.pop(CARD, None)
    try:
        url = upload(
            files if create_pr else {**files, **written},
            repo_id,
            written if create_pr else None,
            message=message
            or f"Upload {report['family']} converted by weightport {report['weightport_version']}",
            private=private,
            token=token,
            create_pr=create_pr,
            revision=revision,
        )
    except OSError as error:
        raise ConversionError(str(error)) from error
    warnings = [f"unverified: {doubt}"] if doubt else []
    if not _license(card):
        warnings.append("the model card names no license; --license sets it")
    return Push(url, sorted({*files, CARD}), warnings)


class _Target(NamedTuple):
    """How a commit is to be made."""

    private: bool | None
    revision: str | None
    create_pr: bool
    message: str | None
    token: str | None


def _push_alone(
    alone: Loose, repo_id: str, given: Mapping[str, str | None], target: _Target
) -> Push:
    """Upload an adapter or an embedding with a card; one that the repo has stays."""
    card = adapter_card(
        alone.described,
        repo_id,
        alone.sha256,
        license=given["license"],
        base_model=given["base_model"],
    )
    names = ", ".join(alone.files)
    try:
        url = upload(
            dict(alone.files),
            repo_id,
            {CARD: card.encode()},
            message=target.message or f"Upload {names} with weightport",
            private=target.private,
            token=target.token,
            create_pr=target.create_pr,
            revision=target.revision,
        )
    except OSError as error:
        raise ConversionError(str(error)) from error
    warnings = [
        f"the model card names no {what}; --{option} sets it"
        for what, option in (("license", "license"), ("base model", "base-model"))
        if not given[option.replace("-", "_")]
    ]
    return Push(url, sorted({*alone.files, CARD}), warnings)


def has_license(repo: str | os.PathLike[str]) -> bool:
    """Whether the license of a converted repo is known, from the conversion or its card."""
    report = read_report(Path(repo))
    return report is not None and _license(_card(Path(repo), report, "", {})) is not None


def _license(card: ModelCard) -> Any:
    return getattr(card.data, "license", None)


def unverified(report: Mapping[str, Any], parity: Mapping[str, Any] | None) -> str | None:
    """Why `parity.json` is no proof of this conversion; None if it is one. What a base brings is
    only copied."""
    if parity is None:
        return "parity has not been run"
    if not parity["passed"]:
        return "parity has failed"
    sources = report["sources"]
    parts = [source["part"] for source in sources if not source["format"].startswith(CANONICAL)]
    parts = parts or [source["part"] for source in sources]
    copied = report["components"].keys() - {halves().get(part, part) for part in parts}
    files = {
        name: file for name, file in report["files"].items() if name.split("/")[0] not in copied
    }
    weights = {file["sha256"] for name, file in files.items() if name.endswith(".safetensors")}
    if not weights <= {file["sha256"] for file in parity["files"]}:
        return f"{PARITY} is of other weights"
    wanted = {check for part in parts for check in halves_of(part) or [part]}
    if missing := sorted(wanted - {check["name"] for check in parity["checks"]}):
        return f"parity has not been run for {', '.join(missing)}"
    return None


def _checked(
    repo: Path, report: Mapping[str, Any], progress: Callable[[int, int], None]
) -> dict[str, Path | bytes]:
    """Every file to upload; those of the conversion must be what its report says.

    Raises:
        ConversionError: one is missing or another one, or lies between them without being of the
            conversion.
    """
    listed = report["files"]
    there = {
        path.relative_to(repo).as_posix(): path
        for path in sorted(repo.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(repo).parts)
    }
    total = sum(file["nbytes"] for file in listed.values())
    for name, file in listed.items():
        if "sha256" not in file:
            raise ConversionError(
                f"{repo}: was converted with --no-hash, so it cannot be checked; convert it again"
            )
        if name not in there:
            raise ConversionError(f"{repo / name}: is missing; convert it again")
        with there[name].open("rb") as opened:
            if hashlib.file_digest(opened, "sha256").hexdigest() != file["sha256"]:
                raise ConversionError(
                    f"{repo / name}: is not the file that {REPORT} describes; convert it again"
                )
        progress(file["nbytes"], total)
    folders = {name.split("/")[0] for name in listed if "/" in name}
    for name, path in there.items():
        if name in listed:
            continue
        if (
            name.split("/")[0] in folders
            or name.endswith((".safetensors", ".bin", ".ckpt", ".py"))
            or path.is_symlink()
        ):
            raise ConversionError(f"{repo / name}: is not in {REPORT}; move it out of the repo")
    return dict(there)


def _card(
    repo: Path, report: Mapping[str, Any], new_body: str, given: Mapping[str, Any]
) -> ModelCard:
    """The repo's card with weightport's part renewed, and metadata added; the user's words stay,
    except for `given`."""
    try:
        from huggingface_hub import ModelCard
    except ImportError:
        raise ConversionError(
            f'{repo}: the Hub needs huggingface_hub; run `pip install "weightport[hub]"`'
        ) from None
    class_name = pipeline_class(repo)
    path = repo / CARD
    text = read_text(path, _MAX_CARD) if path.exists() else model_card(report, class_name)
    check_front_matter(text, path)
    with silent_in_a_pipe():
        card = ModelCard(refresh(text, new_body), ignore_metadata_errors=True)
    data: Any = card.data
    wanted = metadata(report, class_name)
    tags = wanted.pop("tags")
    wanted |= {key: value for key, value in given.items() if value}
    for key, value in wanted.items():
        setattr(data, key, given.get(key) or getattr(data, key, None) or value)
    data.tags = sorted({*(data.tags or ()), *tags})
    return card


def read_report(repo: Path) -> dict[str, Any] | None:
    """The `conversion.json` of a repo; None if it has none.

    Raises:
        ConversionError: it is damaged, or of a family that is not known.
    """
    report = _read(repo, REPORT)
    if report is not None and report["family"] not in families():
        family = printable(report["family"])
        raise ConversionError(f"{repo / REPORT}: `family` is {family}, which is not known")
    return report


def read_parity(repo: Path) -> dict[str, Any] | None:
    """The `parity.json` of a repo; None if it has none.

    Raises:
        ConversionError: it is damaged.
    """
    return _read(repo, PARITY)


def _read(repo: Path, name: str) -> dict[str, Any] | None:
    """A JSON file of ours in the repo; None if it is not there."""
    path = repo / name
    return read_json(path, path.stem) if path.exists() else None
