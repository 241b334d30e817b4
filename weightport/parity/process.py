"""Starts the runners: each framework in a process of its own, under the interpreter that has it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from ..errors import ConversionError, printable
from .frameworks import OURS, Framework
from .runners.exchange import MISSING

RUNNERS = Path(__file__).resolve().parent / "runners"
PACKAGE = RUNNERS.parents[1]


def run_process(
    framework: Framework, job: Path, source_python: str, step: Callable[[], None]
) -> None:
    """Start a runner and wait for it; `step` is called for each check that is done.

    Raises:
        ConversionError: its framework is not installed, or it ended with an error.
    """
    ours = framework.name == OURS
    python = sys.executable if ours else source_python
    command = [python, str(RUNNERS / f"run_{framework.name}.py"), str(job)]
    environment = _with_weightport() if ours else dict(os.environ)
    log = job.with_suffix(".log")
    try:
        with log.open("w", encoding="utf-8") as errors:
            status = _wait(command, environment, errors, step)
    except OSError as error:
        raise ConversionError(
            f"--source-python {python}: cannot be started ({error.strerror})"
        ) from None
    if status:
        raise ConversionError(
            _why(framework, python, status, log.read_text(encoding="utf-8", errors="replace"))
        )


def _with_weightport() -> dict[str, str]:
    """An environment in which this very package is found."""
    others = os.environ.get("PYTHONPATH")
    path = [str(PACKAGE.parent), *([others] if others else [])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path)}


def _wait(
    command: list[str], environment: dict[str, str], errors: TextIO, step: Callable[[], None]
) -> int:
    """Run a command to its end; returns its exit status."""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=errors, encoding="utf-8", env=environment
    ) as process:
        try:
            for line in process.stdout or ():
                if line.startswith("done "):
                    step()
        except BaseException:
            process.kill()
            raise
    return process.returncode


def _why(framework: Framework, python: str, status: int, log: str) -> str:
    """One line for a runner that failed."""
    lines = [line for line in log.splitlines() if line.strip()]
    last = lines[-1] if lines else "it printed nothing"
    if status == MISSING:
        other = ", or name another interpreter with --source-python"
        return (
            f'{last}; run `{python} -m pip install "weightport[{framework.extra}]"`'
            f"{'' if framework.name == OURS else other}"
        )
    if status < 0:
        return (
            f"the {framework.name} process was killed by signal {-status}: is there enough memory?"
        )
    return printable(last, limit=600)
