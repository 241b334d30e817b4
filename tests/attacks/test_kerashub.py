"""Presets of keras-hub that are damaged or hostile."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import h5py
import pytest

import weightport

from ..support import transformer_families
from ..support.command import assert_refused, run

SHARD = "model_00000.weights.h5"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The diffuser of a narrow Stable Diffusion 3."""
    folder = tmp_path_factory.mktemp("kerashub")
    state = transformer_families.original("sd3", "transformer")
    original = transformer_families.write(folder / "original.safetensors", state)
    file = folder / "model.weights.h5"
    weightport.convert(original, file, to="kerashub", component="transformer", sync=False)
    return file


@pytest.fixture
def preset(weights: Path, place: Path) -> Path:
    """A folder with these weights alone."""
    (place / "preset").mkdir()
    shutil.copy(weights, place / "preset")
    return place / "preset"


@pytest.mark.parametrize("cls", [["x"], {"a": 1}, 5, None, "MMDiT"])
@pytest.mark.parametrize("config", [[1], {"num_heads": {"a": 1}}, {"num_heads": 1e300}, None])
def test_a_config_that_makes_no_sense_says_nothing(cls: Any, config: Any, preset: Path) -> None:
    (preset / "config.json").write_text(json.dumps({"class_name": cls, "config": config}))
    ended = run("inspect", preset)
    assert ended.status == 0, ended.err
    assert "part        transformer" in ended.out


@pytest.mark.parametrize(
    "content", [b"[]", b"", b"[" * 100_000, b'{"a":' * 100_000, b'{"a": 1, "a": 2}', b"\xff\xfe"]
)
def test_a_config_that_cannot_be_read_is_refused(content: bytes, preset: Path) -> None:
    (preset / "config.json").write_bytes(content)
    for ended in (run("inspect", preset), run("convert", preset, "-o", preset.with_name("out"))):
        assert_refused(ended, preset / "config.json", ".")


@pytest.mark.parametrize(
    "name", ["../secret.weights.h5", "/etc/passwd", "a\0b", "gone.h5", 5, ["a", 1]]
)
def test_shards_that_lie_elsewhere_are_refused(name: object, preset: Path, weights: Path) -> None:
    shutil.copy(weights, preset.with_name("secret.weights.h5"))
    (preset / "model.weights.h5").unlink()
    index = {"metadata": {}, "weight_map": {"/layers": name}}
    (preset / "model.weights.json").write_text(json.dumps(index))
    for ended in (run("inspect", preset), run("convert", preset, "-o", preset.with_name("out"))):
        assert_refused(ended, preset, "shard|no such file|weight_map")


def test_a_pipe_is_no_shard(preset: Path) -> None:
    (preset / "model.weights.h5").unlink()
    os.mkfifo(preset / SHARD)
    (preset / "model.weights.json").write_text(json.dumps({"weight_map": {"/layers": SHARD}}))
    assert_refused(run("inspect", preset), preset / SHARD, "not a regular file|no regular file")


@pytest.mark.parametrize(("number", "is_taken"), [("1234", True), ("1" + "0" * 9, False)])
def test_numbers_of_blocks_are_ranks(number: str, is_taken: bool, preset: Path) -> None:
    """Keras counts on where several models were made, but not for ever."""
    file = preset / "model.weights.h5"
    with h5py.File(file, "r+") as opened:
        opened.move("layers/mm_di_t_block_2", f"layers/mm_di_t_block_{number}")
    ended = run("convert", file, "-o", preset.with_name("out"), "--no-sync")
    if is_taken:
        assert ended.status == 0, ended.err
    else:
        assert_refused(ended, file, "mm_di_t_block")
