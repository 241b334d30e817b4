"""Schedulers beside each other on one model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...errors import printable
from ..report import Report
from . import Arguments
from .archives import opened
from .images import device, explained


def schedulers(arguments: Arguments, report: Report) -> dict[str, Any]:
    """Draw with each scheduler, and write the report with its plots."""
    with explained():
        from ...api import compare_schedulers
        from ...comparison.report import describe

        folder = Path(arguments["folder"])
        repo = arguments["repo"]
        found, notes = compare_schedulers(
            repo.removeprefix("hub:") if repo.startswith("hub:") else opened(repo),
            arguments["prompts"],
            folder,
            device=device(),
            progress=report.progress,
            **arguments["options"],
        )
    return {
        "lines": [printable(line, 500) for line in describe(found, notes)],
        "page": str(folder / "report.html"),
        "files": [str(folder / "results.csv"), str(folder / "results.json")],
    }
