"""To the Hub, through `huggingface_hub`: one commit with everything in it, or none at all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from ..errors import printable
from .client import guard
from .errors import explain, silent_in_a_pipe
from .secrets import hide, remember

CARD = "README.md"
_LONGEST_ADDRESS = 1000


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
        from huggingface_hub import CommitOperationAdd, HfApi, get_token
    except ImportError:
        raise OSError(
            f"{repo_id}: the Hub needs huggingface_hub; run `pip install 'weightport[hub]'`"
        ) from None
    guard()
    remember(token)
    remember(get_token())
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
    return printable(hide(str(commit.pr_url or commit.commit_url)), _LONGEST_ADDRESS)


def commit_address(repo_id: str, commit: str) -> str:
    """Where people see a commit."""
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{repo_id}/commit/{commit}"


@contextlib.contextmanager
def _explained(repo_id: str) -> Iterator[None]:
    try:
        yield
    except (
        Exception
    ) as error:  # the classes of network errors differ between versions of the client
        raise OSError(f"{repo_id}: {explain(error)}") from error
