"""Two checkpoints beside each other."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

from ...errors import printable
from ..report import Report
from . import Arguments
from .archives import opened

_SHOWN = 500  # lines


def compare(arguments: Arguments, report: Report) -> dict[str, Any]:
    """Compare two files tensor by tensor, in any two layouts."""
    from ...api import diff
    from ...converters.compare import describe

    a, b = arguments["a"], arguments["b"]
    found = diff(opened(a), opened(b), progress=report.progress)
    same = not found.differences and found.families[0] == found.families[1]
    lines = [printable(line, 500) for line in islice(describe(found), _SHOWN + 1)]
    return {
        "a": printable(Path(a).name),
        "b": printable(Path(b).name),
        "same": same,
        "equal": found.equal,
        "different": len(found.differences),
        "lines": lines[:_SHOWN],
        "cut": len(lines) > _SHOWN,
    }
