"""LoHa, LoKr and mid factors as plain LoRA, against the forward of LyCORIS' own modules."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import weightport

from ..support.lycoris_files import Case, cases, effective_weight, module_of, state_of

LAYERS: dict[str, tuple[str, Callable[[], Any]]] = {
    "linear": ("lora_unet_time_embedding_linear_1", lambda: nn.Linear(320, 1280)),
    "conv3": ("lora_unet_conv_in", lambda: nn.Conv2d(4, 320, 3, padding=1)),
    "conv1": ("lora_unet_down_blocks_1_resnets_0_conv_shortcut", lambda: nn.Conv2d(320, 640, 1)),
}
CASES = [
    case
    for case in cases()
    if case.name.startswith(("loha", "lokr", "lora-tucker")) and case.name != "lokr-whole"
]


def made(case: Case) -> tuple[str, dict[str, Tensor], Any, Any]:
    """The name and tensors of a module, its layer, and the layer's weight without it."""
    name, layer = LAYERS[case.layer]
    torch.manual_seed(0)
    changed = layer()
    before = changed.weight.detach().clone()
    module = module_of(case, changed, 1, name)
    return name, state_of(module, name), changed, before


def expanded(state: dict[str, Tensor], folder: Path) -> tuple[dict[str, Tensor], Any]:
    save_file(state, folder / "some.safetensors")
    output = folder / "plain.safetensors"
    conversion = weightport.convert(
        folder / "some.safetensors", output, expand=True, family="sd1", sync=False
    )
    return load_file(output), conversion


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_the_change_is_that_of_lycoris(case: Case, tmp_path: Path) -> None:
    name, state, layer, before = made(case)
    plain, conversion = expanded(state, tmp_path)
    up = plain.pop(f"{name}.lora_up.weight").double().flatten(1)
    down = plain.pop(f"{name}.lora_down.weight").double().flatten(1)
    scale = plain.pop(f"{name}.alpha").item() / len(down)
    ours = before.double().flatten(1) + scale * (up @ down)
    if case.is_decomposed:
        magnitude = plain.pop(f"{name}.dora_scale").double().flatten()
        if len(magnitude) == len(up) and "columns" not in case.name:
            ours *= (magnitude / ours.norm(dim=1))[:, None]
        else:
            cells = ours.reshape(before.shape)
            norms = cells.transpose(0, 1).flatten(1).norm(dim=1)
            ours = (cells * (magnitude / norms).view(1, -1, *[1] * (cells.ndim - 2))).flatten(1)
    assert not plain
    theirs = effective_weight(layer)[0].double().flatten(1)
    assert (theirs - before.flatten(1)).abs().max() > 1e-3
    assert (ours - theirs).norm() <= 2e-6 * theirs.norm()
    assert f"plain LoRA now, of rank {len(down)}" in conversion.notes[-1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_of_half_precision_are_exact(dtype: torch.dtype, tmp_path: Path) -> None:
    case = next(case for case in CASES if case.label == "loha-linear")
    name, state, _, _ = made(case)
    halves = {key: tensor.to(dtype) for key, tensor in state.items()}
    plain, conversion = expanded(halves, tmp_path)
    a, c = (halves[f"{name}.hada_w{i}_a"].double() for i in "12")
    wanted = (a[:, :, None] * c[:, None, :]).flatten(1)
    assert torch.equal(plain[f"{name}.lora_up.weight"].double(), wanted)
    assert conversion.notes[-1].endswith("their factors are exact")


def test_what_is_no_plain_lora_stays(tmp_path: Path) -> None:
    """A LoKr of two whole factors, whose rank would be that of the weight."""
    case = next(case for case in cases() if case.label == "lokr-whole-linear")
    _, state, _, _ = made(case)
    plain, conversion = expanded(state, tmp_path)
    assert plain.keys() == state.keys()
    assert not any("plain LoRA" in note for note in conversion.notes)


def test_peft_takes_what_was_expanded(tmp_path: Path) -> None:
    case = next(case for case in CASES if case.label == "loha-linear")
    _, state, _, _ = made(case)
    save_file(state, tmp_path / "some.safetensors")
    weightport.convert(
        tmp_path / "some.safetensors",
        tmp_path / "peft.safetensors",
        to="peft",
        family="sd1",
        expand=True,
        sync=False,
    )
    assert load_file(tmp_path / "peft.safetensors").keys() == {
        "unet.time_embedding.linear_1.lora_A.weight",
        "unet.time_embedding.linear_1.lora_B.weight",
    }
