"""A converted repository beside the framework that its weights came from."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from ...errors import printable
from ..report import Report
from . import Arguments
from .archives import all_opened


def parity(arguments: Arguments, report: Report) -> dict[str, Any]:
    """Run both sides, and write the report."""
    from ... import api
    from ...parity.report import describe
    from ...pull import fetch

    repo, *sources = (
        fetch(one) if one.startswith("hub:") else Path(one).absolute()
        for one in all_opened([arguments["repo"], *arguments["sources"]])
    )
    # other interpreters are started here, and find modules in the current folder
    os.chdir(tempfile.mkdtemp())
    folder = Path(arguments["folder"])
    python = arguments["python"]
    found = api.parity(
        repo,
        sources,
        images=arguments["images"],
        image_size=arguments["image_size"],
        report=folder,
        progress=report.progress,
        **({"source_python": python} if python else {}),
    )
    return {
        "passed": found.passed,
        "lines": [printable(line, 500) for line in describe(found)],
        "page": str(folder / "parity.html"),
        "files": [str(folder / "parity.json")],
    }
