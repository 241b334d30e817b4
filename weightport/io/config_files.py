"""The JSON files of a diffusers repository: the version of their format, and writing them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# What configs say they were written by: the first release whose meaning of them they follow.
DIFFUSERS_VERSION = "0.35.0"


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object as diffusers does, keys sorted."""
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False)
    path.write_text(f"{text}\n", encoding="utf-8")
