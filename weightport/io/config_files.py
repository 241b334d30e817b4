"""The JSON files of a diffusers repository: the version of their format, and writing them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# What configs say they were written by: the first release whose meaning of them they follow.
DIFFUSERS_VERSION = "0.35.0"


def json_text(content: Mapping[str, Any]) -> str:
    """A JSON object as diffusers writes it, keys sorted."""
    return json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object into a file."""
    path.write_text(json_text(content), encoding="utf-8")
