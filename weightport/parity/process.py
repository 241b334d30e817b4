"""Starts the runners: each framework in a process of its own, under the interpreter that has it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from ..errors import ConversionError, printable
from .runners.exchange import MISSING

RUNNERS = Path(__file__).resolve().parent / "runners"
EXTRAS = {
    "weightport": "torch",
    "kerascv": "keras",
    "ldm": "ldm",
    "openclip": "ldm",
    "diffusers": "oracle",
}


def run_process(runner: str, job: Path, source_python: str, step: Callable[[], None]) -> None:
    """Start a runner and wait for it; `step` is called for each check that is done.

    Raises:
        ConversionError: its framework is not installed, or it ended with an error.
    """
    ours = runner == "weightport"
    python = sys.executable if ours else source_python
    environment = dict(os.environ)
    if ours:
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(RUNNERS.parent.parent), environment.get("PYTHONPATH", "")]
        )
    log = job.with_suffix(".log")
    command = [python, str(RUNNERS / f"run_{runner}.py"), str(job)]
    try:
        with (
            log.open("w") as errors,
            subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
            ) as process,
        ):
            try:
                for line in process.stdout or ():
                    if line.startswith("done "):
                        step()
            except BaseException:
                process.kill()
                raise
    except OSError as error:
        raise ConversionError(
            f"--source-python {python}: cannot be started ({error.strerror})"
        ) from None
    if process.returncode:
        raise ConversionError(
            _why(runner, python, process.returncode, log.read_text(errors="replace"))
        )


def can_import(module: str, python: str) -> bool:
    """Whether an interpreter can import a module. One that is installed may still not fit what else
    is there."""
    try:
        return (
            subprocess.run(
                [python, "-c", f"import {module}"], capture_output=True, check=False
            ).returncode
            == 0
        )
    except OSError:
        return False


def _why(runner: str, python: str, status: int, log: str) -> str:
    """One line for a runner that failed."""
    last = next((line for line in reversed(log.splitlines()) if line.strip()), "it printed nothing")
    if status == MISSING:
        other = (
            "" if runner == "weightport" else ", or name another interpreter with --source-python"
        )
        return f'{last}; run `{python} -m pip install "weightport[{EXTRAS[runner]}]"`{other}'
    if status < 0:
        return f"the {runner} process was killed by signal {-status}: is there enough memory?"
    return printable(last, limit=600)
