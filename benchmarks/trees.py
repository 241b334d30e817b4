"""The code of another commit beside this one's; PYTHONPATH says which runs."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from measure import Command

ROOT = Path(__file__).resolve().parent.parent


def python(tree: Path) -> Command:
    """The beginning of a command that runs Python with the weightport of a tree.

    With `-P` neither the working directory nor the folder of a script comes before it. What is
    compiled is kept, as of installed packages: the first round does it.
    """
    return ["env", "PYTHONDONTWRITEBYTECODE=", f"PYTHONPATH={tree}", sys.executable, "-P"]


def moved(command: Command, tree: Path) -> Command:
    """A command of `python(ROOT)` with another tree."""
    here = python(ROOT)
    assert command[: len(here)] == here
    return python(tree) + command[len(here) :]


@contextlib.contextmanager
def checkout(revision: str) -> Iterator[Path]:
    """A worktree of a commit, compiled; it is removed at the end.

    Raises:
        SystemExit: git knows no such commit.
    """
    git = ["git", "-C", str(ROOT), "worktree"]
    with tempfile.TemporaryDirectory(prefix="weightport-tree-") as folder:
        tree = Path(folder, "tree")
        added = subprocess.run(
            [*git, "add", "--detach", tree, revision], capture_output=True, text=True, check=False
        )
        if added.returncode:
            raise SystemExit(added.stderr.strip())
        try:
            compiling = [sys.executable, "-m", "compileall", "-q", tree]
            subprocess.run(compiling, stdout=subprocess.DEVNULL, check=True)
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", tree], check=True)
