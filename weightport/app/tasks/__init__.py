"""What a worker does, a module for each kind: a task takes plain data, and answers with plain data.

Paths in it come from the server, which made them or checked them; what is there to read is as
untrusted as on the command line.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from ...errors import printable
from ..report import Report

Arguments = Mapping[str, Any]
Task = Callable[[Arguments, Report], dict[str, Any]]


def shown(text: str, limit: int = 1000) -> str:
    """A line for the page, without where the server keeps the visitor's files."""
    return printable(text.replace(f"{Path.cwd().parent}{os.sep}", ""), limit)


_HOMES = {
    "inspect": "inspection",
    "plan": "conversion",
    "convert": "conversion",
    "compare": "comparison",
    "parity": "parity",
    "generate": "images",
    "settings": "images",
    "schedulers": "schedulers",
}


def task(name: str) -> Task:
    """The task of a name; only its own module is imported."""
    found: Task = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    return found
