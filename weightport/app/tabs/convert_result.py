"""Where the result of a conversion goes: a download, a folder of this machine, or the Hub."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import ConversionError
from ..desk import Desk, output_name
from ..framework import gr
from ..sessions import RESULTS, Session
from ..widgets import EVENT, explained

DOWNLOAD = "Download"
FOLDER = "Folder on this machine"
HUB = "Hugging Face Hub"


@dataclass(frozen=True)
class Wanted:
    """Where a result is to go.

    Attributes:
        name: of the result.
        kind: one of the three.
        folder: on this machine.
        push: what `push` takes, but for the repo.
        token: of the visitor, for the Hub.
    """

    name: str
    kind: str
    folder: str | None
    push: Mapping[str, Any]
    token: str | None

    def arguments(self, session: Session, folder: Path) -> dict[str, Any]:
        """What the task takes beside the conversion's own; paths are seen from the uploads.

        Args:
            folder: where a result is made that does not stay.

        Raises:
            ConversionError: the name is none, or a place is lacking.
        """
        name = output_name(self.name)
        if self.kind == FOLDER:
            if not (self.folder or "").strip():
                raise ConversionError("name the folder that the result is to go to")
            output = os.fspath(Path(str(self.folder)).expanduser().absolute() / name)
            return {"output": output, "pack": None, "push": None}
        folder.mkdir()
        output = os.path.relpath(folder / name, session.uploads)
        if self.kind == HUB:
            if not self.push["repo_id"]:
                raise ConversionError("name the repository on the Hub, as owner/name")
            return {"output": output, "pack": None, "push": dict(self.push)}
        session.forget(RESULTS)
        return {"output": output, "pack": os.fspath(session.fresh(RESULTS)), "push": None}


class ResultFields:
    """The fields that say where a result goes."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        kinds = [DOWNLOAD, HUB] if desk.public else [DOWNLOAD, FOLDER, HUB]
        self._name = gr.Textbox(
            value="converted",
            label="Name of the result",
            info="Its ending is added if it needs one.",
            elem_id="convert-name",
        )
        self._kind = gr.Radio(
            kinds, value=DOWNLOAD, label="Where the result goes", elem_id="convert-where"
        )
        with gr.Group(visible=False) as folder:
            self._folder = gr.Textbox(
                label="Folder on this machine",
                info="The result is written into it; nothing in it is replaced.",
                elem_id="convert-folder",
            )
        with gr.Group(visible=False) as hub:
            explained(
                "Uploads the result in one commit, after checking every file. Your token is used"
                " for this push alone: it is not stored and stands in no result."
            )
            self._repo_id = gr.Textbox(label="Repository, owner/name", elem_id="convert-repo")
            self._private = gr.Checkbox(
                label="If it is made, make it private", value=True, elem_id="convert-private"
            )
            self._pull_request = gr.Checkbox(
                label="Open a pull request instead of committing", elem_id="convert-pr"
            )
            self._unverified = gr.Checkbox(
                label="Push although parity has not been run", elem_id="convert-unverified"
            )
            self.token = gr.Textbox(
                label="Token with write access",
                info=_token_info(desk),
                type="password",
                elem_id="convert-token",
            )
        self._kind.change(
            lambda kind: [gr.update(visible=kind == FOLDER), gr.update(visible=kind == HUB)],
            [self._kind],
            [folder, hub],
            **EVENT,
        )

    @property
    def components(self) -> list[Any]:
        """The inputs of an event, in the order that `wanted` takes them."""
        return [
            self._name,
            self._kind,
            self._folder,
            self._repo_id,
            self._private,
            self._pull_request,
            self._unverified,
            self.token,
        ]

    def wanted(self, values: Sequence[Any], logged_in: str | None) -> Wanted:
        """What the fields say.

        Args:
            logged_in: the token of a visitor who logged in to the Hub.
        """
        name, kind, folder, repo_id, private, pull_request, unverified, token = values
        push = {
            "repo_id": (repo_id or "").strip(),
            "private": bool(private),
            "create_pr": bool(pull_request),
            "allow_unverified": bool(unverified),
        }
        kind = DOWNLOAD if kind == FOLDER and self._desk.public else kind
        return Wanted(name or "", kind, folder, push, (token or "").strip() or logged_in)


def _token_info(desk: Desk) -> str:
    if desk.logs_in:
        return "Not needed if you are logged in, at the top of the page."
    return "" if desk.public else "Left empty, the login of this machine is used."
