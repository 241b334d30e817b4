"""Reports as the page shows them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..reports.page import render
from .gate import address


def report_page(title: str, result: Mapping[str, Any]) -> str:
    """The lines of a report, its page in a frame that may do nothing, and its files."""
    files = [Path(result["page"]), *map(Path, result["files"])]
    return render(
        "app/report.html",
        title=title,
        lines=result["lines"],
        page=address(files[0]),
        files={file.name: address(file) for file in files},
    )
