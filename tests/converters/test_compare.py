"""`weightport diff`: two checkpoints in any two layouts, by key, shape, dtype and value; the exit
status says which."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import weightport

from ..support.command import run
from ..support.synthetic import State

P = "model.diffusion_model."
Change = Callable[[Callable[[State], object]], Path]
KEY = f"{P}middle_block.1.norm.bias"
TARGET = "mid_block.attentions.0.norm.bias"


@pytest.fixture
def changed(original_of: Callable[[str], Path], tmp_path: Path) -> Change:
    """The UNet of an original checkpoint after some change."""

    def change(edit: Callable[[State], object]) -> Path:
        state = {
            key: value for key, value in load_file(original_of("sd1")).items() if key.startswith(P)
        }
        edit(state)
        save_file(state, tmp_path / "changed.safetensors")
        return tmp_path / "changed.safetensors"

    return change


@pytest.fixture
def unet(changed: Change, tmp_path: Path) -> Path:
    return changed(lambda state: None).rename(tmp_path / "unet.safetensors")


def test_the_same_in_every_layout(
    original_of: Callable[[str], Path],
    repo_of: Callable[[str], Path],
    sd1_keras: dict[str, Path],
    tmp_path: Path,
) -> None:
    weightport.convert(original_of("sd1"), tmp_path / "repo")
    for a, b in ((original_of("sd1"), repo_of("sd1")), (tmp_path / "repo", original_of("sd1"))):
        ran = run("diff", a, b)
        assert (ran.status, ran.err) == (0, "")
        assert "1130 tensors are the same, bit for bit" in ran.out
    assert run("diff", sd1_keras["text_encoder"], repo_of("sd1") / "text_encoder").status == 0


@pytest.mark.parametrize(
    ("edit", "kind", "detail"),
    [
        (lambda state: state[KEY].__setitem__(3, 7.5), "value", "F32"),
        (lambda state: state.update({KEY: state[KEY].astype(np.float16)}), "dtype", "F32 and F16"),
        (lambda state: state[KEY].__setitem__(0, np.nan), "value", "F32"),
    ],
    ids=["value", "dtype", "nan"],
)
def test_one_tensor_that_differs(
    edit: Callable[[State], object], kind: str, detail: str, unet: Path, changed: Change
) -> None:
    ran = run("diff", unet, changed(edit))
    assert ran.status == 1
    assert f"{kind} ({detail}): 1 tensors" in ran.out
    assert f"unet {TARGET}  max abs " in ran.out
    found = json.loads(run("diff", "--json", unet, changed(edit)).out)
    (difference,) = found["differences"]
    assert (difference["component"], difference["key"], difference["kind"]) == (
        "unet",
        TARGET,
        kind,
    )
    assert found["equal"] == 685


def test_largest_difference(unet: Path, changed: Change) -> None:
    def edit(state: State) -> None:
        state[KEY] = state[KEY] + np.float32(0.25)

    (difference,) = weightport.diff(unet, changed(edit)).differences
    assert difference.max_abs == pytest.approx(0.25, rel=1e-6)


def test_another_shape(unet: Path, changed: Change) -> None:
    def edit(state: State) -> None:
        first = state[f"{P}input_blocks.0.0.weight"]
        state[f"{P}input_blocks.0.0.weight"] = np.resize(first, (len(first), 9, 3, 3))

    (difference,) = weightport.diff(unet, changed(edit)).differences
    assert (difference.kind, difference.detail) == ("shape", "[32, 4, 3, 3] and [32, 9, 3, 3]")


def test_components_of_one_side_only(original_of: Callable[[str], Path], unet: Path) -> None:
    ran = run("diff", original_of("sd1"), unet)
    assert ran.status == 1
    assert "only in A: 444 tensors" in ran.out
    assert "686 tensors are the same, bit for bit" in ran.out
    assert "only in B: 444 tensors" in run("diff", unet, original_of("sd1")).out


def test_other_families_differ(original_of: Callable[[str], Path]) -> None:
    ran = run("diff", original_of("sd1"), original_of("sdxl"))
    assert ran.status == 1
    assert "families: sd1 and sdxl" in ran.out


def test_what_cannot_be_read_is_an_error(unet: Path, tmp_path: Path) -> None:
    ran = run("diff", unet, tmp_path / "missing.safetensors")
    assert (ran.status, ran.out) == (1, "")
    assert ran.err.startswith(f"error: {tmp_path / 'missing.safetensors'}: ")
    assert ran.err.count("\n") == 1
