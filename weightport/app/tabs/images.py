"""*Try it*: an image of a prompt, with its settings in the PNG."""

from __future__ import annotations

import os
import secrets
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from ...errors import ConversionError
from ...reports.page import render
from ..desk import Desk
from ..framework import gr
from ..gate import address
from ..sessions import RESULTS, Session
from ..sources import SourceField
from ..widgets import EVENT, Shown, Tab, action, explained, live, whole_number

_STEPS = 150
_GUIDANCE = 7.5


class ImagesTab:
    """The fields of the tab, and what its buttons do."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        explained(
            "Makes one image with a diffusers repository: one on the Hub, or an archive that a"
            " conversion gave. The PNG holds its settings, from which it can be made again."
        )
        self.model = SourceField(desk, "Model", "images", most=1)
        self._prompt = gr.Textbox(label="Prompt", elem_id="images-prompt")
        self._negative = gr.Textbox(label="What not to draw", elem_id="images-negative")
        with gr.Row():
            self._scheduler = gr.Textbox(
                label="Scheduler",
                info="Such as ddim, euler or dpm++2m-karras; left empty, the model's own.",
                elem_id="images-scheduler",
            )
            self._steps = gr.Slider(
                1, _STEPS, value=30, step=1, label="Steps", elem_id="images-steps"
            )
        with gr.Row():
            self._seed = gr.Textbox(
                label="Seed", info="Left empty, one is drawn.", elem_id="images-seed"
            )
            self._guidance = gr.Number(value=_GUIDANCE, label="Guidance", elem_id="images-guidance")
            self._size = gr.Textbox(
                label="Size in pixels",
                info="Of both sides; left empty, the model's own.",
                elem_id="images-size",
            )
        action(desk, "images", "Make the image", self._make, [*self.model.components, *self._told])
        explained("Or take the settings out of a PNG that was made here: tick it below.")
        self.png = SourceField(desk, "PNG", "settings", most=1)
        take = gr.Button("Take its settings", elem_id="settings-run")
        status = live("settings-status")
        take.click(self._take, self.png.components, [status, *self._told], **EVENT)

    @property
    def _told(self) -> list[Any]:
        return [
            self._prompt,
            self._negative,
            self._scheduler,
            self._steps,
            self._seed,
            self._guidance,
            self._size,
        ]

    async def _make(
        self, request: gr.Request, uploads: list[str], elsewhere: str, *told: Any
    ) -> AsyncIterator[tuple[Shown, Shown]]:
        def arguments(session: Session) -> dict[str, Any]:
            (model,) = self.model.named(session, uploads, elsewhere)
            return {
                "repo": model,
                "name": Path(model).name.partition(".")[0] or "image",
                "recipe": self._recipe(*told),
                "folder": os.fspath(session.fresh(RESULTS)),
            }

        steps = self._desk.work(
            request.session_hash, "generate", arguments, heavy=True, unit="steps"
        )
        async for step in steps:
            yield step.status, "" if step.result is None else _image_page(step.result)

    def _recipe(
        self,
        prompt: str,
        negative: str,
        scheduler: str,
        steps: float,
        seed: str | None,
        guidance: float | None,
        size: str | None,
    ) -> dict[str, Any]:
        """What the fields say, as a recipe has it.

        Raises:
            ConversionError: there is no prompt, or a number is none that is allowed.
        """
        if not (prompt or "").strip():
            raise ConversionError("Prompt: say what to draw")
        drawn = whole_number(seed, "Seed", 0, 2**63 - 1)
        side = whole_number(size, "Size", 8, self._desk.limits.pixels)
        if not 1 <= (steps or 0) <= _STEPS:
            raise ConversionError(f"Steps: must lie between 1 and {_STEPS}")
        return {
            "prompt": prompt,
            "negative": (negative or "").strip() or None,
            "scheduler": (scheduler or "").strip() or None,
            "steps": int(steps),
            "seed": secrets.randbelow(2**32) if drawn is None else drawn,
            "guidance": guidance,
            "size": None if side is None else (side, side),
        }

    async def _take(
        self, request: gr.Request, uploads: list[str], elsewhere: str
    ) -> AsyncIterator[tuple[Shown, ...]]:
        def arguments(session: Session) -> dict[str, Any]:
            (source,) = self.png.named(session, uploads, elsewhere)
            if source.startswith("hub:"):
                raise ConversionError("PNG: tick an upload")
            return {"source": source}

        async for step in self._desk.work(request.session_hash, "settings", arguments):
            if step.result is None:
                yield (step.status, *(gr.skip() for _ in self._told))
                continue
            found = step.result["settings"]
            size = found.get("size")
            yield (
                step.status,
                found["prompt"],
                found.get("negative", ""),
                found.get("scheduler", ""),
                found.get("steps", 30),
                str(found["seed"]),
                found.get("guidance") or _GUIDANCE,
                str(size[0]) if size else "",
            )


def _image_page(result: dict[str, Any]) -> str:
    place = Path(result["image"])
    return render(
        "app/image.html", address=address(place), name=place.name, settings=result["settings"]
    )


def add(desk: Desk) -> Tab:
    """Draw the tab."""
    drawn = ImagesTab(desk)
    return Tab([drawn.model, drawn.png])
