"""A hundred jobs of every family and layout, of which ten are damaged in different ways."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import weightport

from ..support.command import run
from ..support.transformer_families import bundle, original, write
from .results import content_of, left_in_part, statuses

FAMILIES = ("sd1", "sd2", "sdxl", "sdxl_refiner")
GOOD = 90
Make = Callable[[Path], object]


def changed(file: Path, place: Path, number: int) -> None:
    """A copy of a Keras file in which one tensor is another."""
    shutil.copyfile(file, place)
    with h5py.File(place, "r+") as opened:
        found: list[h5py.Dataset] = []
        opened.visititems(lambda _, item: found.append(item) if hasattr(item, "dtype") else None)
        found[0][...] = np.full(found[0].shape, number, "f4")


def cut(file: Path, place: Path) -> None:
    shutil.copyfile(file, place)
    os.truncate(place, place.stat().st_size // 2)


@pytest.fixture
def shelf(
    tmp_path: Path,
    repo_of: Callable[[str], Path],
    original_of: Callable[[str], Path],
    keras_of: Callable[[str, str], dict[str, Path]],
) -> Path:
    """The sources."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    for family in FAMILIES:
        if family != "sd2":  # whose files do not say what they predict
            (folder / f"{family}.safetensors").symlink_to(original_of(family))
        (folder / f"{family}-repo").symlink_to(repo_of(family))
    for family in ("sd1", "sd2"):
        for ending in (".weights.h5", ".h5"):
            model = folder / f"{family}{ending.replace('.', '-')}"
            model.mkdir()
            for path in keras_of(family, ending).values():
                (model / path.name).symlink_to(path)
    torch.save({"state_dict": load_file(original_of("sd1"))}, folder / "pickled.ckpt")
    write(folder / "sd3.safetensors", bundle("sd3"))
    write(folder / "flux.safetensors", original("flux", "transformer"))
    decoder = keras_of("sd1", ".weights.h5")["decoder"]
    for number, (name, damage) in enumerate(damaged(decoder, original_of("sd1"))):
        damage(folder / f"bad-{number}{name}")
    while len(list(folder.iterdir())) < 100:
        number = len(list(folder.iterdir()))
        changed(decoder, folder / f"copy-{number}.h5", number)
    return folder


def damaged(keras: Path, checkpoint: Path) -> Iterator[tuple[str, Make]]:
    """Ten ways."""
    yield ".ckpt", lambda place: place.write_bytes(b"")
    yield ".safetensors", lambda place: place.write_text("<html>")
    yield ".safetensors", lambda place: cut(checkpoint, place)
    yield ".h5", lambda place: cut(keras, place)
    yield ".ckpt", lambda place: place.write_bytes(b"version https://git-lfs.github.com/spec/v1")
    yield ".pt", lambda place: place.write_bytes(b"PK\x03\x04" + bytes(100))
    yield ".bin", lambda place: place.write_bytes(os.urandom(1000))
    yield ".safetensors", lambda place: place.write_bytes(b"\xff" * 7 + b"\x00{}")
    yield ".ckpt", lambda place: place.symlink_to(place.with_name("nowhere"))
    yield ".h5", lambda place: without_a_layer(keras, place)


def without_a_layer(file: Path, place: Path) -> None:
    shutil.copyfile(file, place)
    with h5py.File(place, "r+") as opened:
        del opened["layers/attention_block"]


@pytest.mark.full
def test_a_hundred_jobs(shelf: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ended = run("batch", shelf, "-o", out, "--workers", "2", "--no-sync")
    assert ended.status == 1
    found = statuses(out)
    assert len(found) == 100
    failed = {name for name, status in found.items() if status == "failed"}
    assert failed == {f"bad-{number}" for number in range(10)}
    assert list(found.values()).count("converted") == GOOD
    jobs = json.loads((out / "batch.json").read_text())["jobs"]
    for job in jobs:
        if job["status"] == "failed":
            assert f"{shelf}/{job['name']}" in job["error"]
            assert job["error"] in ended.out
    assert left_in_part(out) == []
    for job in jobs:
        if job["status"] == "converted":
            alone = tmp_path / "alone" / job["name"]
            alone.parent.mkdir(exist_ok=True)
            weightport.convert(job["sources"], alone, sync=False)
            assert content_of(out / job["name"]) == content_of(alone), job["name"]
            shutil.rmtree(alone)
