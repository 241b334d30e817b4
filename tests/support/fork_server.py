"""Runs each program it is sent in a fork of its own, with what takes long to import there already.
A fork ends without taking apart what was imported, which would take longer than most programs.

    python fork_server.py MODULE...

A program is a line of JSON: its `code` (or a `script`), the `arguments`, the whole `environment`,
the `folder` it runs in, files for what it prints (`out`, `err`) and the `seconds` it may take. The
answer is a line with its exit status, as `subprocess` gives it. Runs under any Python, with nothing
of the project.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import signal
import sys
import threading
import traceback
import types
from pathlib import Path
from typing import Any


def serve() -> None:
    """Answer every line."""
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            os._exit(do(job))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def do(job: dict[str, Any]) -> int:
    """Be the program; returns its exit status."""
    signal.alarm(job["seconds"])
    for number, name, mode in (
        (0, os.devnull, os.O_RDONLY),
        (1, job["out"], os.O_WRONLY),
        (2, job["err"], os.O_WRONLY),
    ):
        file = os.open(name, mode)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(job["environment"])
    os.chdir(job["folder"])
    status = run(job)
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as an interpreter does
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def run(job: dict[str, Any]) -> int:
    """Run the program's code; returns the exit status."""
    try:
        if script := job.get("script"):
            sys.argv = [script, *job["arguments"]]
            sys.path[0] = str(Path(script).parent)
            runpy.run_path(script, run_name="__main__")
        else:
            sys.argv = ["-c", *job["arguments"]]
            sys.path[0] = ""
            program = types.ModuleType("__main__")
            sys.modules["__main__"] = program
            exec(compile(job["code"], "<string>", "exec"), vars(program))
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):  # what modules say is no answer
        for name in sys.argv[1:]:
            importlib.import_module(name)
    gc.freeze()  # a fork that never looks at these objects copies none of their pages
    serve()
