"""Interpreters that have imported what takes long, and run each program in a fork of their own.

To import torch or TensorFlow takes seconds of every process. A program here ends as one in a
process of its own does: it has its own memory, environment, folder and exit status.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from .command import Run

SERVER = Path(__file__).with_name("fork_server.py")
MODULES = [
    "h5py",
    "weightport.cli",
    "weightport.converters.compare",
    "weightport.converters.inspection",
    "weightport.push",
    "weightport.runtime.manifest",
    "weightport.runtime.public",
    "weightport.runtime.single_file",
    *("filelock", "httpx2", "tqdm.auto", "truststore", "yaml"),  # what the Hub's client imports
]
COMMAND = "from weightport.cli import main\nraise SystemExit(main())"
HASTY = "import time\ntime.sleep = lambda seconds: None\n"  # who would wait does not
SECONDS = 600  # a program that takes longer is ended


class Forks:
    """An interpreter and what it has imported, started by the first program.

    Args:
        python: the interpreter.
        modules: what it imports.
        path: a folder of modules beside those that it finds anyway.
    """

    def __init__(self, python: str | Path, modules: Sequence[str], path: Path) -> None:
        command = [python, SERVER, *modules]
        paths = os.pathsep.join(filter(None, [str(path), os.environ.get("PYTHONPATH")]))
        self._server = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": paths},
        )
        atexit.register(self.close)

    def script(self, script: Path, *arguments: str | Path) -> Run:
        """Run a script."""
        return self._run({"script": str(script)}, arguments, {})

    def code(
        self, code: str, *arguments: str | Path, environment: Mapping[str, str] | None = None
    ) -> Run:
        """Run Python code, as `python -c` does."""
        return self._run({"code": code}, arguments, environment or {})

    def _run(
        self,
        program: Mapping[str, str],
        arguments: Sequence[str | Path],
        environment: Mapping[str, str],
    ) -> Run:
        with tempfile.NamedTemporaryFile() as out, tempfile.NamedTemporaryFile() as err:
            self._send(
                {
                    **program,
                    "arguments": [str(argument) for argument in arguments],
                    "environment": {**os.environ, **environment},
                    "folder": str(Path.cwd()),
                    "out": out.name,
                    "err": err.name,
                    "seconds": SECONDS,
                }
            )
            status = int(self._server.stdout.readline())
            return Run(status, _text(out.name), _text(err.name))

    def _send(self, job: Mapping[str, Any]) -> None:
        print(json.dumps(job), file=self._server.stdin, flush=True)

    def close(self) -> None:
        """End the interpreter."""
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()


@cache
def torch_forks() -> Forks:
    """This Python with torch and our runtime imported; the Hub's client is not, for it reads the
    environment when it is."""
    return Forks(sys.executable, MODULES, SERVER.parent)


def run_python(
    code: str, *arguments: str | Path, environment: Mapping[str, str] | None = None
) -> Run:
    """Run Python code in a process of its own; it finds the arguments in `sys.argv[1:]`."""
    return torch_forks().code(code, *arguments, environment=environment)


def run_command(
    *arguments: str | Path, environment: Mapping[str, str] | None = None, hasty: bool = False
) -> Run:
    """Run the `weightport` command in a process of its own.

    Args:
        hasty: what waits before a second try does not.
    """
    code = HASTY + COMMAND if hasty else COMMAND
    return run_python(code, *arguments, environment=environment)


def _text(name: str) -> str:
    return Path(name).read_text(encoding="utf-8", errors="surrogateescape")
