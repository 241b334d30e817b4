"""SDXL and ControlNets compute what they do by diffusers' single-file loader, text encoders what
OpenCLIP does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import CLIPTextModelWithProjection

import weightport

from ..support.runners import warm_runners
from ..support.synthetic import average_name, config, write_controlnet

FAMILIES = ("sdxl", "sdxl_refiner")
CLASSES = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}


@pytest.fixture(scope="module")
def repo(
    original_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    def convert(family: str) -> Path:
        folder = tmp_path_factory.mktemp(family) / "repo"
        weightport.convert(original_of(family), folder, residue=False)
        return folder

    return convert


@pytest.fixture(autouse=True)
def warm(monkeypatch: pytest.MonkeyPatch) -> None:
    warm_runners(monkeypatch)


def run(model: Any, family: str) -> torch.Tensor:
    """What a UNet, VAE or ControlNet computes from fixed inputs."""
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn((2, 4, 8, 8), generator=generator)
    with torch.no_grad():
        if isinstance(model, AutoencoderKL):
            return model.decode(latent).sample
        numbers = 5 if family == "sdxl_refiner" else 6
        inputs: dict[str, Any] = {
            "sample": latent,
            "timestep": torch.tensor([1, 981]),
            "encoder_hidden_states": torch.randn(
                (2, 7, model.config["cross_attention_dim"]), generator=generator
            ),
        }
        if family.startswith("sdxl"):
            added = {
                "text_embeds": torch.randn((2, 1280), generator=generator),
                "time_ids": torch.ones((2, numbers)),
            }
            inputs["added_cond_kwargs"] = added
        if isinstance(model, ControlNetModel):
            image = torch.rand((2, 3, 64, 64), generator=generator)
            return model(**inputs, controlnet_cond=image).mid_block_res_sample
        return model(**inputs).sample


def assert_equal(ours: torch.nn.Module, theirs: torch.nn.Module, family: str) -> None:
    """The same weights to the bit, and outputs up to roundings: where tensors lie in memory decides
    the kernels."""
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in ours.state_dict().items())
    torch.testing.assert_close(run(ours, family), run(theirs, family), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("component", CLASSES)
@pytest.mark.parametrize("family", FAMILIES)
def test_sdxl_as_by_diffusers_single_file(
    family: str,
    component: str,
    original_of: Callable[[str], Path],
    repo: Callable[[str], Path],
) -> None:
    folder, kind = repo(family), CLASSES[component]
    ours = kind.from_pretrained(folder, subfolder=component).eval()
    theirs = kind.from_single_file(
        original_of(family), config=str(folder), subfolder=component
    ).eval()
    assert_equal(ours, theirs, family)


def test_the_moving_average_of_sdxl_as_by_diffusers_single_file(
    original_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warm_runners(monkeypatch)
    state = load_file(original_of("sdxl"))
    unet = {
        key: tensor for key, tensor in state.items() if key.startswith("model.diffusion_model.")
    }
    file = tmp_path / "model.safetensors"
    save_file(unet | {average_name(key): tensor + 0.01 for key, tensor in unet.items()}, file)
    weightport.convert(file, tmp_path / "repo", ema=True)
    (check,) = weightport.parity(tmp_path / "repo", file, ema=True, component="unet").checks
    assert check.passed
    assert check.against == "diffusers"


@pytest.mark.parametrize("naming", ["original", "diffusers"])
@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_a_controlnet_as_by_diffusers_single_file(family: str, naming: str, tmp_path: Path) -> None:
    source = write_controlnet(tmp_path / "source", family)
    file = source / "diffusion_pytorch_model.safetensors"
    if naming == "original":
        file = tmp_path / "control.safetensors"
        weightport.convert(source, file, to="ldm")
    weightport.convert(file, tmp_path / "repo")
    ours = ControlNetModel.from_pretrained(tmp_path / "repo").eval()
    theirs = ControlNetModel.from_single_file(str(file), config=str(tmp_path / "repo")).eval()
    assert_equal(ours, theirs, family)


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_parity_runs_a_controlnet_beside_diffusers(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warm_runners(monkeypatch)
    weightport.convert(
        write_controlnet(tmp_path / "source", family), tmp_path / "control.safetensors", to="ldm"
    )
    weightport.convert(tmp_path / "control.safetensors", tmp_path / "repo")
    (check,) = weightport.parity(tmp_path / "repo", tmp_path / "control.safetensors").checks
    assert check.passed
    assert check.name == "controlnet"
    assert check.against == "diffusers"


def test_an_sdxl_controlnet_is_complete(tmp_path: Path) -> None:
    """diffusers' single-file loader leaves out `label_emb`, so only files under diffusers' names
    compare."""
    source = write_controlnet(tmp_path / "source", "sdxl")
    weightport.convert(source, tmp_path / "control.safetensors", to="ldm")
    weightport.convert(tmp_path / "control.safetensors", tmp_path / "repo")
    ours = ControlNetModel.from_pretrained(tmp_path / "repo").eval()
    file = source / "diffusion_pytorch_model.safetensors"
    theirs = ControlNetModel.from_single_file(str(file), config=str(tmp_path / "repo")).eval()
    assert_equal(ours, theirs, "sdxl")


def openclip(
    state: dict[str, torch.Tensor], heads: int, tokens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """OpenCLIP's text tower: the output of the last layer but one, and the projection at the end
    token."""
    x = state["token_embedding.weight"][tokens] + state["positional_embedding"][: tokens.shape[1]]
    layers = [x]
    for layer in range(sum(key.endswith(".ln_1.weight") for key in state)):
        w = {
            k.removeprefix(f"transformer.resblocks.{layer}."): v
            for k, v in state.items()
            if f".{layer}." in k
        }
        normed = F.layer_norm(x, x.shape[-1:], w["ln_1.weight"], w["ln_1.bias"])
        q, k, v = F.linear(normed, w["attn.in_proj_weight"], w["attn.in_proj_bias"]).chunk(3, -1)
        split = [t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v)]
        mixed = (
            F.scaled_dot_product_attention(split[0], split[1], split[2], is_causal=True)
            .transpose(1, 2)
            .flatten(2)
        )
        x = x + F.linear(mixed, w["attn.out_proj.weight"], w["attn.out_proj.bias"])
        normed = F.layer_norm(x, x.shape[-1:], w["ln_2.weight"], w["ln_2.bias"])
        hidden = F.gelu(F.linear(normed, w["mlp.c_fc.weight"], w["mlp.c_fc.bias"]))
        x = x + F.linear(hidden, w["mlp.c_proj.weight"], w["mlp.c_proj.bias"])
        layers.append(x)
    final = F.layer_norm(x, x.shape[-1:], state["ln_final.weight"], state["ln_final.bias"])
    return layers[-2], final[torch.arange(len(tokens)), tokens.argmax(-1)] @ state[
        "text_projection"
    ]


@pytest.mark.parametrize(("family", "embedder"), [("sdxl", 1), ("sdxl_refiner", 0)])
def test_the_second_text_encoder_as_openclip(
    family: str, embedder: int, original_of: Callable[[str], Path], repo: Callable[[str], Path]
) -> None:
    prefix = f"conditioner.embedders.{embedder}.model."
    state = {
        k.removeprefix(prefix): v
        for k, v in load_file(original_of(family)).items()
        if k.startswith(prefix)
    }
    tokens = torch.tensor([[49406, 320, 1125, 49407], [49406, 2368, 49407, 0]])
    hidden, pooled = openclip(
        state, config(family, "text_encoder_2")["num_attention_heads"], tokens
    )
    model = CLIPTextModelWithProjection.from_pretrained(
        repo(family), subfolder="text_encoder_2"
    ).eval()
    with torch.no_grad():
        ours = model(tokens, output_hidden_states=True)
    torch.testing.assert_close(ours.hidden_states[-2], hidden, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.text_embeds, pooled, rtol=1e-4, atol=1e-5)
