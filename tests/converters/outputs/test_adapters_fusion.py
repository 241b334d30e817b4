"""Adapters of SD 3 and Flux under other names, whose layers are fused in some."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from diffusers.loaders.lora_conversion_utils import (
    _convert_bfl_flux_control_lora_to_diffusers,
    _convert_xlabs_flux_lora_to_diffusers,
)
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

import weightport

from ...support import flow_pairs
from ...support.adapter_files import cycle, state_over, write_kohya
from ...support.transformer_families import original
from .test_adapters import assert_same, respelled

ORIGINALS = Path(__file__).parents[2] / "golden" / "originals"
PREFIX = "model.diffusion_model."
FLUX_WIDTH = 3072


def full_size_flux(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """What kohya's scripts write for two blocks of Flux, in the widths that diffusers asks for."""
    w = FLUX_WIDTH
    shapes = {
        "double_blocks.0.img_attn.qkv": (3 * w, w),
        "double_blocks.0.txt_attn.qkv": (3 * w, w),
        "double_blocks.0.img_attn.proj": (w, w),
        "double_blocks.0.txt_mlp.2": (w, 4 * w),
        "double_blocks.0.img_mod.lin": (6 * w, w),
        "single_blocks.1.linear1": (7 * w, w),
        "single_blocks.1.linear2": (w, 5 * w),
        "single_blocks.1.modulation.lin": (3 * w, w),
        "final_layer.adaLN_modulation.1": (2 * w, w),
        "final_layer.linear": (64, w),
    }
    weights = {
        f"{name}.weight": torch.empty(shape, device="meta") for name, shape in shapes.items()
    }
    state = state_over(weights, "", rank=4, alpha=lambda i: 4.0, dtype=dtype)
    blocks = "lora_unet_double_blocks_0_txt_attn_qkv"  # as of a LoRA for each of the three
    state[f"{blocks}.lora_down.weight"] = torch.randn(6, w).to(dtype)
    up = torch.zeros(3 * w, 6)
    for k in range(3):
        up[k * w : (k + 1) * w, 2 * k : 2 * k + 2] = torch.randn(w, 2)
    state[f"{blocks}.lora_up.weight"] = up.to(dtype)
    state[f"{blocks}.alpha"] = torch.tensor(6.0, dtype=dtype)
    return state


@pytest.fixture(scope="module")
def kohya(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kohya") / "style.safetensors"
    return write_kohya(path, full_size_flux(torch.bfloat16), ss_network_dim="4")


def test_kohyas_file_becomes_what_diffusers_makes_of_it(kohya: Path, tmp_path: Path) -> None:
    theirs = FluxPipeline.lora_state_dict(load_file(kohya))
    ours = load_file(respelled(kohya, "peft", tmp_path))
    named = {key.removeprefix("transformer."): tensor for key, tensor in theirs.items()}
    assert {key.removeprefix("transformer.") for key in ours} == named.keys()
    for key, tensor in ours.items():
        assert torch.equal(tensor, named[key.removeprefix("transformer.")]), key


@pytest.mark.parametrize("to", ["peft", "onetrainer", "original"])
def test_kohyas_file_comes_back(to: str, kohya: Path, tmp_path: Path) -> None:
    there = respelled(kohya, to, tmp_path)
    assert load_file(there).keys().isdisjoint(load_file(kohya))
    assert_same(respelled(there, "kohya", tmp_path), kohya)


def test_xlabs_file_becomes_what_diffusers_makes_of_it(tmp_path: Path) -> None:
    w = FLUX_WIDTH
    shapes = {
        "double_blocks.0.processor.qkv_lora1": (3 * w, w),
        "double_blocks.0.processor.proj_lora1": (w, w),
        "double_blocks.0.processor.qkv_lora2": (3 * w, w),
        "double_blocks.0.processor.proj_lora2": (w, w),
        "single_blocks.2.processor.qkv_lora": (3 * w, w),
        "single_blocks.2.processor.proj_lora": (w, 5 * w),
    }
    state = {}
    for name, (rows, columns) in shapes.items():
        state[f"{name}.down.weight"] = torch.randn(2, columns)
        state[f"{name}.up.weight"] = torch.randn(rows, 2)
    save_file(state, tmp_path / "x.safetensors")
    theirs = _convert_xlabs_flux_lora_to_diffusers(dict(state))
    there = respelled(tmp_path / "x.safetensors", "peft", tmp_path)
    ours = load_file(there)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())
    assert_same(respelled(there, "xlabs", tmp_path), tmp_path / "x.safetensors")
    there = respelled(tmp_path / "x.safetensors", "kohya", tmp_path)  # the MLP's rows are zeros
    assert_same(respelled(there, "xlabs", tmp_path), tmp_path / "x.safetensors")


def test_black_forest_labs_file_becomes_what_diffusers_makes_of_it(tmp_path: Path) -> None:
    """Of all layers of a model of more input channels, with biases, beside whole norms. But for one
    fault of diffusers', which swaps the halves of the last modulation's right factor too."""
    state: dict[str, Tensor] = {}
    lines = (ORIGINALS / "flux_control.txt").read_text().splitlines()
    for key, _, shape in (line.partition(" ") for line in lines):
        sizes = [int(size) for size in shape.split("x")]
        if key.endswith(".scale"):
            state[key] = torch.randn(sizes)
        elif len(sizes) == 2:
            name = key.removesuffix(".weight")
            state[f"{name}.lora_A.weight"] = torch.randn(2, sizes[1], dtype=torch.bfloat16)
            state[f"{name}.lora_B.weight"] = torch.randn(sizes[0], 2, dtype=torch.bfloat16)
            state[f"{name}.lora_B.bias"] = torch.randn(sizes[0], dtype=torch.bfloat16)
    save_file(state, tmp_path / "depth.safetensors")
    there = respelled(tmp_path / "depth.safetensors", "peft", tmp_path)
    ours = load_file(there)
    named = _convert_bfl_flux_control_lora_to_diffusers(dict(state))
    theirs = {f"transformer.{key.removeprefix('transformer.')}": one for key, one in named.items()}
    swapped = theirs["transformer.norm_out.linear.lora_A.weight"]
    theirs["transformer.norm_out.linear.lora_A.weight"] = swapped.flip(0)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())
    assert_same(respelled(there, "original", tmp_path), tmp_path / "depth.safetensors")


@pytest.fixture(scope="module")
def of_diffusers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `save_lora_weights` makes of PEFT's Flux; of one block all three ranks of a fused layer
    differ, of another one layer has no LoRA."""
    torch.manual_seed(0)
    model = FluxTransformer2DModel(**flow_pairs.FLUX)
    config = LoraConfig(
        r=4,
        lora_alpha=4,
        target_modules=["to_q", "to_k", "transformer_blocks.0.attn.to_v", "proj_out", "proj_mlp"],
        # the first that fits counts; diffusers sorts them when it saves, and `^` is before letters
        rank_pattern={"^transformer_blocks.0.attn.to_k": 2, "attn.to_k": 1},
        alpha_pattern={"^transformer_blocks.0.attn.to_k": 2, "attn.to_k": 1},
    )
    model.add_adapter(config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.normal_(std=0.1)
    folder = tmp_path_factory.mktemp("diffusers")
    FluxPipeline.save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(model),
        **_collate_lora_metadata({"transformer": model}),
    )
    return folder / "pytorch_lora_weights.safetensors"


@pytest.mark.parametrize("to", ["kohya", "original", "onetrainer"])
def test_diffusers_own_file_comes_back(to: str, of_diffusers: Path, tmp_path: Path) -> None:
    there = respelled(of_diffusers, to, tmp_path, family="flux")
    assert load_file(there).keys().isdisjoint(load_file(of_diffusers))
    assert_same(respelled(there, "peft", tmp_path, family="flux"), of_diffusers)


@pytest.mark.parametrize("family", ["sd3", "sd35_medium", "flux"])
def test_baked_originals_are_what_kohya_defines(family: str, tmp_path: Path) -> None:
    """Every matrix of the original file, fused ones whole, against float64 by the definition."""
    weights = original(family, "transformer")
    save_file(
        {key: torch.from_numpy(one) for key, one in weights.items()}, tmp_path / "m.safetensors"
    )
    state = state_over(weights, PREFIX, alpha=cycle((4.0, 1.0, 3.0)))
    write_kohya(tmp_path / "style.safetensors", state)
    weightport.convert(
        tmp_path / "m.safetensors",
        tmp_path / "baked.safetensors",
        lora=[f"{tmp_path / 'style.safetensors'}@0.7"],
        to="ldm",
        family=family,
        sync=False,
    )
    baked = load_file(tmp_path / "baked.safetensors")
    assert baked.keys() == weights.keys()
    changed = 0
    for key, base in weights.items():
        name = "lora_unet_" + key.removeprefix(PREFIX).removesuffix(".weight").replace(".", "_")
        wanted = torch.from_numpy(base).double()
        if f"{name}.alpha" in state:
            changed += 1
            up, down = (state[f"{name}.lora_{role}.weight"].double() for role in ("up", "down"))
            wanted = wanted + 0.7 * state[f"{name}.alpha"].double() / 2 * (up @ down)
            assert (baked[key] - wanted).abs().max() <= 3e-7 * wanted.abs().max(), key
        else:
            assert torch.equal(baked[key].double(), wanted), key
    assert changed == len(state) // 3


def one(name: str, rows: int = 96, columns: int = 32, **other: Any) -> dict[str, Tensor]:
    factors = {
        f"{name}.lora_down.weight": torch.randn(2, columns),
        f"{name}.lora_up.weight": torch.randn(rows, 2),
    }
    return factors | {f"{name}.{role}": tensor for role, tensor in other.items()}


PEFT = "transformer.transformer_blocks.0.attn"
QKV = "lora_unet_double_blocks_0_img_attn_qkv"


@pytest.mark.parametrize(
    ("state", "to", "message"),
    [
        (
            one(f"{PEFT}.to_q", 32, alpha=torch.tensor(1.0)) | one(f"{PEFT}.to_k", 32),
            "kohya",
            "attn.to_q` has the strength 0.5 .* and `transformer.*to_k` 1, and kohya has one",
        ),
        ({f"{QKV}.oft_blocks": torch.zeros(4, 24, 24)}, "onetrainer", "qkv` is OFT over .*to_q, "),
        (
            {f"{QKV}.lokr_w1": torch.zeros(4, 4), f"{QKV}.lokr_w2": torch.zeros(24, 8)},
            "onetrainer",
            "qkv` is LoKr over .*to_q, .* cannot be taken apart exactly",
        ),
        (
            one(QKV, dora_scale=torch.ones(1, 32)),
            "onetrainer",
            r"qkv` is LoRA \+ DoRA over .*to_q, ",
        ),
        (one(QKV, alpha=torch.tensor(1.0)), "xlabs", "has the strength 0.5 .* has no alphas"),
        (one("lora_unet_double_blocks_0_img_mlp_0", 128), "xlabs", "has no name in XLabs"),
        (one(QKV), "kohya-sgm", "has no name in kohya, sgm names"),
        (one(QKV) | one(f"{PEFT}.to_v", 32), "peft", "are the same module"),
    ],
)
def test_what_a_convention_has_no_place_for_is_refused(
    state: dict[str, Tensor], to: str, message: str, tmp_path: Path
) -> None:
    file = write_kohya(tmp_path / "x.safetensors", state)
    with pytest.raises(weightport.ConversionError, match=message):
        respelled(file, to, tmp_path, family="flux")
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]
