"""Facts about layouts and classes that are neither tables nor families: `facts/*.toml`."""

from __future__ import annotations

import tomllib
from functools import cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent / "facts"


@cache
def facts(name: str) -> dict[str, Any]:
    """The content of `facts/<name>.toml`, read once. Treat as read-only."""
    return tomllib.loads((FOLDER / f"{name}.toml").read_text(encoding="utf-8"))
