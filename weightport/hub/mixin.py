"""`push_to_hub`, for everything that has `save_pretrained`."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict, Unpack, cast

from .upload import CARD, upload


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


def _card(class_name: str) -> str:
    tag = "pipeline_tag: text-to-image\n" if class_name.endswith("Pipeline") else ""
    return (
        f"---\nlibrary_name: diffusers\n{tag}tags:\n- weightport\n---\n\n# {class_name}\n\nWritten"
        " by `push_to_hub` of weightport; weightport and diffusers load it with"
        " `from_pretrained`.\n"
    )
