"""Sizes as people write them, in each of the three places that take one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import weightport
from weightport.errors import ConversionError
from weightport.io.sizes import parse_size

from ..support.command import assert_refused, run

SIZES: dict[int | str, int] = {
    1: 1,
    "7": 7,
    "12 B": 12,
    "1K": 1000,
    "1kb": 1000,
    "1 KiB": 1024,
    "800MB": 800_000_000,
    "1.5 mib": 1_572_864,
    "5GB": 5_000_000_000,
    "10G": 10_000_000_000,
    "2GiB": 2 << 30,
    "1TB": 10**12,
    "0.1T": 10**11,
}
NONSENSE: list[Any] = [
    "", "many", "GB", "0", 0, -5, "-5GB", "0.4", "0.0001KB", "1e3", "5XB", "5GBB", "10i", "10iB", "5 G B", "1,5GB",
    "٣GB", True, None, "9" * 400, "1" * 5000, "5GB\n--x",
]  # fmt: skip


@pytest.mark.parametrize("size", SIZES)
def test_sizes(size: int | str) -> None:
    assert parse_size(size) == SIZES[size]


@pytest.mark.parametrize("size", NONSENSE)
def test_nonsense(size: Any) -> None:
    with pytest.raises(ValueError, match="not a size"):
        parse_size(size)


@pytest.mark.parametrize("size", ["1K", "2KiB", "10G", "0.001 TB"])
def test_every_entry_takes_every_spelling(size: str, place: Path, sd1_repo: Path) -> None:
    sources, output = sd1_repo / "vae", place / "out"
    weightport.convert(sources, output, max_shard_size=size, dry_run=True)
    ended = run("convert", sources, "-o", output, "--dry-run", "--max-shard-size", size)
    assert (ended.status, ended.err) == (0, "")


@pytest.mark.parametrize("size", ["5XB", "0", "5 G B", "٣GB"])
def test_every_entry_refuses_nonsense(size: str, place: Path, sd1_repo: Path) -> None:
    pytest.importorskip("torch")
    with pytest.raises(ConversionError, match=f"^--max-shard-size {size}: not a size"):
        weightport.convert(sd1_repo / "vae", place / "out", max_shard_size=size)
    ended = run("convert", sd1_repo / "vae", "-o", place / "out", "--max-shard-size", size)
    assert_refused(ended, f"--max-shard-size {size}", "not a size")
    model = weightport.AutoencoderKL.from_pretrained(sd1_repo, subfolder="vae")
    with pytest.raises(ValueError, match=f"^max_shard_size = '{size}': not a size"):
        model.save_pretrained(place / "out", max_shard_size=size)
    assert not (place / "out").exists()


def test_a_model_is_split_at_the_size(place: Path, sd1_repo: Path) -> None:
    pytest.importorskip("torch")
    model = weightport.AutoencoderKL.from_pretrained(sd1_repo, subfolder="vae")
    model.save_pretrained(place / "out", max_shard_size="0.2 MiB")
    limit = 0.2 * (1 << 20)
    sizes = [path.stat().st_size for path in (place / "out").glob("*-of-*.safetensors")]
    largest = max(tensor.nbytes for tensor in model.state_dict().values())
    assert len(sizes) > 1
    assert max(sizes) < max(limit, largest) + (1 << 16)  # header
