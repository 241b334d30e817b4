"""How a repo is written, beside what is in it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Style:
    """How the repo is written, beside what is in it."""

    dtype: str = "keep"  # a safetensors dtype name, or "keep"
    variant: str | None = None
    max_shard_size: int = 10_000_000_000
    image_size: int | None = None
    text_activation: str = "tanh"
    placeholder_tokens: tuple[str, ...] = ()
    hashes: bool = True  # sha256 of sources and outputs, for the report
    sync: bool = True  # what is finished is on the disk
