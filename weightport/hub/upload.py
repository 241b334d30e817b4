"""To the Hub, through `huggingface_hub`: one commit with everything in it, or none at all."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypedDict, Unpack, cast

CARD = "README.md"


class PushOptions(TypedDict, total=False):
    """Where on the Hub something goes, and how.

    Attributes:
        subfolder: the folder in the repo; by default its top.
        commit_message: by default `Upload` and the name of the class.
        private: of a repo that is made.
        token: instead of `HF_TOKEN` or the one of `hf auth login`.
        create_pr: open a pull request instead.
        revision: the branch; made from `main` if it is not there.
    """

    subfolder: str | None
    commit_message: str | None
    private: bool | None
    token: str | bool | None
    create_pr: bool
    revision: str | None


class PushToHub:
    """Adds `push_to_hub` to what has `save_pretrained(save_directory, ...)`, and its arguments to
    `save_pretrained`:

    `push_to_hub=True` uploads the folder when it is written, to `repo_id` or a repo of its name;
    see `PushOptions`.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "save_pretrained" in cls.__dict__:
            cls.save_pretrained = _with_push(cls.__dict__["save_pretrained"])  # type: ignore[attr-defined]

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Save into a repo on the Hub, in one commit; makes the repo, and a model card if it has
        none.

        Args:
            repo_id: `owner/name`, or `name` for one of your own.
            options: see `PushOptions`; others go to `save_pretrained`, such as `variant`.

        Returns:
            The address of the commit or the pull request.

        Raises:
            OSError: it could not be done; the repo is as it was, or empty if it was just made.
        """
        place = {key: options.pop(key) for key in PushOptions.__annotations__ if key in options}
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, **options)  # type: ignore[attr-defined]
            return self.push_folder(folder, repo_id, **cast(PushOptions, place))

    def push_folder(
        self,
        folder: str | os.PathLike[str],
        repo_id: str | None = None,
        **options: Unpack[PushOptions],
    ) -> str:
        """Upload what was saved into a folder; by default to a repo of the folder's name. See
        `push_to_hub`."""
        subfolder = options.get("subfolder")
        paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        prefix = f"{subfolder.strip('/')}/" if subfolder else ""
        return upload(
            {prefix + path.relative_to(folder).as_posix(): path for path in paths},
            repo_id or Path(folder).absolute().name,
            {CARD: _card(type(self).__name__).encode()},
            message=options.get("commit_message") or f"Upload {type(self).__name__}",
            private=options.get("private"),
            token=options.get("token"),
            create_pr=options.get("create_pr", False),
            revision=options.get("revision"),
        )


def _with_push(save: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(save)
    def save_pretrained(
        self: PushToHub,
        save_directory: str | os.PathLike[str],
        *arguments: Any,
        push_to_hub: bool = False,
        **options: Any,
    ) -> None:
        names = ("repo_id", *PushOptions.__annotations__)
        place = {key: options.pop(key) for key in names if key in options}
        save(self, save_directory, *arguments, **options)
        if push_to_hub:
            self.push_folder(Path(save_directory).expanduser(), **place)

    return save_pretrained


def upload(
    files: Mapping[str, Path | bytes],
    repo_id: str,
    defaults: Mapping[str, bytes] | None = None,
    *,
    message: str,
    private: bool | None = None,
    token: str | bool | None = None,
    create_pr: bool = False,
    revision: str | None = None,
) -> str:
    """Put files into a repo on the Hub, in one commit; the repo and the branch are made if they are
    not there.

    Contents go up first, large ones in parts that are not sent again by a second try; the commit
    comes last. `huggingface_hub.upload_folder` is not used because it may split its work into
    several commits.

    Args:
        files: path in the repo -> a local file, or the content.
        defaults: the same, for files that are written only where the repo has none.
        private: of a repo that is made.
        token: instead of `HF_TOKEN` or the one of `hf auth login`.

    Returns:
        The address of the commit or the pull request.

    Raises:
        OSError: in one line, what went wrong and what to do.
    """
    try:
        from huggingface_hub import CommitOperationAdd, HfApi
    except ImportError:
        raise OSError(
            f"{repo_id}: the Hub needs huggingface_hub; run `pip install 'weightport[hub]'`"
        ) from None
    api = HfApi(token=token, library_name="weightport")
    with _explained(repo_id), silent_in_a_pipe():
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision and not create_pr and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        for path, content in (defaults or {}).items():
            if path not in files and not api.file_exists(repo_id, path, revision=revision):
                files = {**files, path: content}
        additions = [
            CommitOperationAdd(path, str(content) if isinstance(content, Path) else content)
            for path, content in files.items()
        ]
        commit = api.create_commit(
            repo_id,
            additions,
            commit_message=message,
            revision=revision,
            create_pr=create_pr or None,
        )
    return commit.pr_url or commit.commit_url


@contextlib.contextmanager
def silent_in_a_pipe() -> Iterator[None]:
    """The client's progress bars are for a terminal, and what it logs is said in our words."""
    import huggingface_hub.utils

    utils: Any = huggingface_hub.utils
    hidden, verbosity = utils.are_progress_bars_disabled(), utils.logging.get_verbosity()
    if not sys.stderr.isatty():
        utils.disable_progress_bars()
    utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        utils.logging.set_verbosity(verbosity)
        if not hidden:
            utils.enable_progress_bars()


@contextlib.contextmanager
def _explained(repo_id: str) -> Iterator[None]:
    try:
        yield
    except (
        Exception
    ) as error:  # the classes of network errors differ between versions of the client
        raise OSError(f"{repo_id}: {explain(error)}") from error


def explain(error: Exception) -> str:
    """What an error of the Hub or its client means and what to do, in one line."""
    from huggingface_hub import errors

    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if isinstance(error, errors.LocalEntryNotFoundError):
        offline = "the Hub may not be asked, because HF_HUB_OFFLINE is set"
        cause = error.__cause__
        return (
            "not downloaded before, and"
            f" {explain(cause) if isinstance(cause, Exception) else offline}"
        )
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "the Hub may not be asked, because HF_HUB_OFFLINE is set"
    if isinstance(error, errors.GatedRepoError):
        return (
            "gated; ask for access on its page at the Hub, and give the token of that account"
            " (HF_TOKEN)"
        )
    if status == 401:
        return (
            "the Hub does not know you, or there is no such repo; set HF_TOKEN or run `hf auth"
            " login`"
        )
    if status == 403:
        return (
            f"not allowed ({_said(error)}); use a token with write access, or open a pull request"
            " with create_pr"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return "there is no such branch, tag or commit"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "there is no such repo, or this token may not see it; check the name and HF_TOKEN"
    if status == 429:
        return "the Hub asks to wait (429, too many requests); run it again later"
    if status is not None and status >= 500:
        return f"the Hub has a problem ({status}); nothing was changed, run it again later"
    if status is not None or isinstance(error, ValueError):
        return _said(error)
    if type(error) is OSError:  # a body of the wrong size, or a full disk
        return f"{str(error).splitlines()[0]}; nothing of it was kept, run it again"
    cause = error.__cause__ or error
    if isinstance(cause, Exception) and cause is not error:
        return f"{_said(error)} {explain(cause)}"
    return (
        f"the connection failed ({type(error).__name__}); nothing was changed, run it again to"
        " go on"
    )


def _said(error: Exception) -> str:
    """What the Hub said, or the client."""
    words = getattr(error, "server_message", None) or str(error) or type(error).__name__
    return " ".join(words.split())[:300]


def _card(class_name: str) -> str:
    tag = "pipeline_tag: text-to-image\n" if class_name.endswith("Pipeline") else ""
    return (
        f"---\nlibrary_name: diffusers\n{tag}tags:\n- weightport\n---\n\n# {class_name}\n\nWritten"
        " by `push_to_hub` of weightport; weightport and diffusers load it with"
        " `from_pretrained`.\n"
    )
