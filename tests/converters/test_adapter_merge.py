"""Several adapters as one: the sum of what each does alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import weightport

from ..support.adapter_files import cycle, kohya_state, stock_model, write_kohya

NAME = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
ONLY = ("mid_block.attentions.0.transformer_blocks.0.attn1", "conv_in", "conv_shortcut")


def lora(
    path: Path,
    rank: int,
    alphas: tuple[float, ...],
    seed: int,
    dtype: torch.dtype = torch.float16,
    only: tuple[str, ...] = ONLY,
) -> Path:
    unet = stock_model("sd1", "unet")
    state = kohya_state({"lora_unet": unet}, lambda i: rank, cycle(alphas), dtype, only)
    torch.manual_seed(seed)
    for key, tensor in state.items():
        if not key.endswith("alpha"):
            state[key] = torch.randn_like(tensor)
    return write_kohya(path, state)


def merged(
    folder: Path, sources: list[Path], strengths: tuple[float, ...], **options: Any
) -> tuple[dict[str, Tensor], Any]:
    output = folder / "merged.safetensors"
    options = {"family": "sd1", "sync": False, **options}
    conversion = weightport.convert(sources, output, merge=strengths, **options)
    return load_file(output), conversion


def change(state: dict[str, Tensor], name: str) -> Tensor:
    """What a LoRA adds to a weight, in float64."""
    if f"{name}.lora_up.weight" not in state:
        return torch.zeros(())
    up = state[f"{name}.lora_up.weight"].double().flatten(1)
    down = state[f"{name}.lora_down.weight"].double().flatten(1)
    return state[f"{name}.alpha"].double() / len(down) * (up @ down)


def test_every_module_is_the_weighted_sum(tmp_path: Path) -> None:
    """Other ranks, alphas, dtypes; modules that one of them has alone."""
    a = lora(tmp_path / "a.safetensors", 4, (4.0, 1.0), 1)
    b = lora(tmp_path / "b.safetensors", 3, (2.0, 3.0), 2, torch.bfloat16, ("mid_block",))
    state, conversion = merged(tmp_path, [a, b], (0.7, -0.4))
    files = load_file(a), load_file(b)
    names = {key.partition(".")[0] for file in files for key in file}
    assert {key.partition(".")[0] for key in state} == names
    for name in names:
        wanted = 0.7 * change(files[0], name) - 0.4 * change(files[1], name)
        error = (change(state, name) - wanted).norm() / wanted.norm()
        assert error <= 1e-7, name
    assert "rounded once, to float32" in conversion.notes[-1]
    with safe_open(tmp_path / "merged.safetensors", "pt") as file:
        said = json.loads(file.metadata()["merged_from"])
    assert [(one["file"], one["strength"]) for one in said] == [
        ("a.safetensors", 0.7),
        ("b.safetensors", -0.4),
    ]
    assert all(len(one["sha256"]) == 64 for one in said)


def test_alike_scales_keep_every_bit(tmp_path: Path) -> None:
    """They become the alpha; the factors are those of the files, one below the other."""
    a = lora(tmp_path / "a.safetensors", 4, (2.0,), 1)
    b = lora(tmp_path / "b.safetensors", 2, (2.0,), 2)
    state, conversion = merged(tmp_path, [a, b], (0.5, 0.25))
    files = load_file(a), load_file(b)
    for key, tensor in state.items():
        if key.endswith("lora_up.weight"):
            assert torch.equal(tensor, torch.cat([file[key] for file in files], 1))
        elif key.endswith("lora_down.weight"):
            assert torch.equal(tensor, torch.cat([file[key] for file in files], 0))
        else:
            assert tensor.item() == 0.25 * 6
    assert "keep the bits they had" in conversion.notes[-1]
    assert "rounded" not in conversion.notes[-1]


def test_differences_and_norms_add_up(tmp_path: Path) -> None:
    norm = "lora_unet_mid_block_resnets_0_norm1"
    states = []
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        state = {
            f"{NAME}.diff": torch.randn(1280, 1280).half(),
            f"{norm}.w_norm": torch.randn(1280),
            f"{norm}.b_norm": torch.randn(1280),
        }
        save_file(state, tmp_path / f"{name}.safetensors")
        states.append(state)
    sources = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    state, _ = merged(tmp_path, sources, (0.7, 0.4))
    assert state.keys() == states[0].keys()
    for key, tensor in state.items():
        wanted = 0.7 * states[0][key].double() + 0.4 * states[1][key].double()
        assert torch.equal(tensor, wanted.float()), key


def loha() -> dict[str, Tensor]:
    state = {f"{NAME}.hada_w{i}_a": torch.randn(1280, 2) for i in "12"}
    return state | {f"{NAME}.hada_w{i}_b": torch.randn(2, 1280) for i in "12"}


def test_what_is_expanded_merges(tmp_path: Path) -> None:
    a = lora(tmp_path / "a.safetensors", 4, (2.0,), 1)
    state = loha()
    save_file(state, tmp_path / "b.safetensors")
    sources = [a, tmp_path / "b.safetensors"]
    with pytest.raises(weightport.ConversionError, match="is LoHa, of which only a LoRA can be"):
        merged(tmp_path, sources, (1.0, 0.5))
    found, _ = merged(tmp_path, sources, (1.0, 0.5), expand=True)
    one, two = (
        state[f"{NAME}.hada_w{i}_a"].double() @ state[f"{NAME}.hada_w{i}_b"].double() for i in "12"
    )
    wanted = change(load_file(a), NAME) + 0.5 * one * two
    assert (change(found, NAME) - wanted).norm() <= 1e-7 * wanted.norm()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({f"{NAME}.dora_scale": torch.ones(1280, 1)}, "LoRA . DoRA, whose change depends on"),
        ({f"{NAME}.diff": torch.zeros(1280, 1280)}, "is full difference, and LoRA in .*a.safe"),
    ],
)
def test_what_is_no_sum_is_refused(other: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    a = lora(tmp_path / "a.safetensors", 4, (2.0,), 1)
    state = {
        f"{NAME}.lora_down.weight": torch.zeros(2, 1280),
        f"{NAME}.lora_up.weight": torch.zeros(1280, 2),
    }
    save_file(other if f"{NAME}.diff" in other else state | other, tmp_path / "b.safetensors")
    with pytest.raises(weightport.ConversionError, match=message) as error:
        merged(tmp_path, [a, tmp_path / "b.safetensors"], (1.0, 0.5))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "merged.safetensors").exists()


@pytest.mark.parametrize(
    ("strengths", "message"),
    [((0.5,), "1 strengths are given for 2"), ((1.0, 0.0), "leave that adapter out")],
)
def test_strengths_that_make_no_sense(
    strengths: tuple[float, ...], message: str, tmp_path: Path
) -> None:
    a = lora(tmp_path / "a.safetensors", 1, (1.0,), 1, only=("conv_in",))
    b = lora(tmp_path / "b.safetensors", 1, (1.0,), 2, only=("conv_in",))
    with pytest.raises(weightport.ConversionError, match=message):
        merged(tmp_path, [a, b], strengths)


def test_adapters_of_other_models_are_refused(tmp_path: Path) -> None:
    a = lora(tmp_path / "a.safetensors", 1, (1.0,), 1, only=("conv_in",))
    text = {"lora_te2_text_model_encoder_layers_0_mlp_fc1": (5120, 1280)}
    state = {}
    for name, (rows, columns) in text.items():
        state[f"{name}.lora_down.weight"] = torch.zeros(1, columns)
        state[f"{name}.lora_up.weight"] = torch.zeros(rows, 1)
    b = write_kohya(tmp_path / "b.safetensors", state)
    c = lora(tmp_path / "c.safetensors", 1, (1.0,), 1, only=("attentions.0.proj_in",))
    with pytest.raises(weightport.ConversionError, match="not for one model"):
        weightport.convert([c, b], tmp_path / "out.safetensors", merge=(1.0, 1.0))
    assert a.exists()
