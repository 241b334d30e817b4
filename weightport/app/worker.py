"""The process of one job: a request on stdin, progress and the answer on stdout, a line of JSON
each.

    python -m weightport.app.worker
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import NoReturn


def main() -> int:
    """Do the task on stdin; returns the exit status."""
    signal.signal(signal.SIGTERM, _terminate)
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print goes elsewhere
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # converting never uses its threads
    request = json.loads(sys.stdin.readline())
    if request["token"]:
        os.environ["HF_TOKEN"] = request["token"]
    from .report import Report
    from .tasks import shown, task

    report = Report(lines)
    try:
        report.line({"result": task(request["task"])(request["arguments"], report)})
        return 0
    except Exception as error:
        from ..errors import one_line
        from ..hub.secrets import hide

        report.line({"error": shown(hide(one_line(error)), 2000)})
        return 1


def _terminate(signum: int, frame: object) -> NoReturn:
    raise SystemExit(128 + signum)


if __name__ == "__main__":
    sys.exit(main())
