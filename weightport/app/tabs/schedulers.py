"""*Schedulers*: many of them on one model, with speed and distance to a reference."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from typing import Any

from ...errors import ConversionError, printable
from ..desk import Desk
from ..framework import gr
from ..results import report_page
from ..sessions import RESULTS, Session
from ..sources import SourceField
from ..widgets import Shown, Tab, action, explained, whole_number

_FIRST = "ddim, euler, dpm++2m, unipc"


def add(desk: Desk) -> Tab:
    """Draw the tab."""
    explained(
        "Draws each prompt with each scheduler and number of steps from the same noise, and reports"
        f" time and distance to a converged reference. At most {desk.limits.images} images."
    )
    model = SourceField(desk, "Model", "schedulers", most=1)
    prompts = gr.Textbox(label="Prompts, one a line", lines=2, elem_id="schedulers-prompts")
    names = gr.Textbox(
        value=_FIRST,
        label="Schedulers",
        info="Short names or class names, with commas between them.",
        elem_id="schedulers-names",
    )
    with gr.Row():
        steps = gr.Textbox(value="5, 10, 20", label="Numbers of steps", elem_id="schedulers-steps")
        reference = gr.Slider(
            2,
            400,
            value=100,
            step=2,
            label="Steps of the reference",
            elem_id="schedulers-reference",
        )
        seed = gr.Number(value=0, label="Seed", precision=0, elem_id="schedulers-seed")
        size = gr.Textbox(
            label="Size in pixels",
            info="Left empty, the model's own.",
            elem_id="schedulers-size",
        )

    async def run(
        request: gr.Request,
        uploads: list[str],
        elsewhere: str,
        text: str,
        chosen: str,
        numbers: str,
        *more: Any,
    ) -> AsyncIterator[tuple[Shown, Shown]]:
        def arguments(session: Session) -> dict[str, Any]:
            (repo,) = model.named(session, uploads, elsewhere)
            lines = [line.strip() for line in (text or "").splitlines() if line.strip()]
            schedulers = [name.strip() for name in (chosen or "").split(",") if name.strip()]
            options = _options(desk, lines, schedulers, numbers or "", *more)
            folder = os.fspath(session.fresh(RESULTS))
            return {"repo": repo, "prompts": lines, "options": options, "folder": folder}

        found = desk.work(request.session_hash, "schedulers", arguments, heavy=True, unit="images")
        async for step in found:
            yield step.status, "" if step.result is None else report_page("Schedulers", step.result)

    inputs = [*model.components, prompts, names, steps, reference, seed, size]
    action(desk, "schedulers", "Compare schedulers", run, inputs)
    return Tab([model])


def _options(
    desk: Desk,
    prompts: list[str],
    schedulers: list[str],
    numbers: str,
    reference: float,
    seed: float | None,
    size: str | None,
) -> dict[str, Any]:
    """The options of the comparison.

    Raises:
        ConversionError: something is lacking or too much.
    """
    if not prompts:
        raise ConversionError("Prompts: say what to draw")
    try:
        steps = [int(part) for part in numbers.split(",")]
    except ValueError:
        raise ConversionError(
            f"Numbers of steps: {printable(numbers)} are not numbers with commas"
        ) from None
    if not schedulers or min(steps) < 1 or max(steps) > 1000:
        raise ConversionError("Choose a scheduler, and numbers of steps from 1 to 1000")
    images = len(prompts) * (len(schedulers) * len(steps) + 2)
    if images > desk.limits.images:
        raise ConversionError(
            f"that is {images} images; at most {desk.limits.images} are made here"
        )
    side = whole_number(size, "Size", 8, desk.limits.pixels)
    return {
        "schedulers": schedulers,
        "steps": steps,
        "reference_steps": min(max(int(reference), 2), 400),
        "seed": max(int(seed or 0), 0),
        "size": None if side is None else (side, side),
    }
