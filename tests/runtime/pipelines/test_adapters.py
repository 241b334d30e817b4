"""Adapters in a pipeline, against diffusers with PEFT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextModel

import weightport
from weightport import StableDiffusionPipeline

from ...support.adapter_files import (
    cycle,
    kohya_state,
    peft_models,
    write_diffusers,
    write_kohya,
)
from ...support.closeness import assert_equal, assert_near
from ...support.lycoris_files import cases, module_of, state_of

SOME = ("mid_block.attentions", "conv_in", "up_blocks.2.resnets.0", "layers.0.")
RANKS = cycle((4, 2))
ALPHAS = cycle((4.0, 1.0, 3.0))
LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
NAME = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.fixture(scope="module")
def repo(repo_of: Callable[[str], Path]) -> Path:
    return repo_of("sd1")


@pytest.fixture(scope="module")
def files(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two LoRAs as kohya writes them, and the same for diffusers."""
    folder = tmp_path_factory.mktemp("files")
    models = {
        "lora_unet": UNet2DConditionModel.from_pretrained(repo / "unet"),
        "lora_te": CLIPTextModel.from_pretrained(repo / "text_encoder"),
    }
    made = {}
    for name, alphas in (("a", ALPHAS), ("b", cycle((2.0,)))):
        state = kohya_state(models, RANKS, alphas, torch.float32, SOME)
        made[name] = write_kohya(folder / f"{name}.safetensors", state)
        made[f"{name}-peft"] = folder / f"{name}-peft.safetensors"
        weightport.convert(made[name], made[f"{name}-peft"], to="peft", family="sd1", sync=False)
    return made


def parts(repo: Path, library: Any, encoder: Any, dtype: torch.dtype) -> dict[str, Any]:
    """UNet and text encoder alone: what adapters change."""
    unet = library.UNet2DConditionModel.from_pretrained(repo / "unet").to(dtype)
    return {
        "vae": None,
        "text_encoder": encoder.from_pretrained(repo / "text_encoder").to(dtype),
        "tokenizer": None,
        "unet": unet,
        "scheduler": library.DDIMScheduler(),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def ours(repo: Path, dtype: torch.dtype = torch.float32) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(**parts(repo, weightport, weightport.CLIPTextModel, dtype))


def theirs(repo: Path, dtype: torch.dtype) -> Any:
    return diffusers.StableDiffusionPipeline(**parts(repo, diffusers, CLIPTextModel, dtype))


@torch.no_grad()
def outputs(pipe: Any) -> tuple[Tensor, Tensor]:
    """What UNet and text encoder compute."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, 8, 8, generator=generator).to(pipe.unet.dtype)
    words = torch.randn(1, 7, 64, generator=generator).to(pipe.unet.dtype)
    ids = torch.tensor([[49406, 320, 1125, 49407]])
    noise = pipe.unet(x, torch.tensor(500), encoder_hidden_states=words).sample
    return noise, pipe.text_encoder(ids)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_side_paths_are_those_of_peft(
    dtype: torch.dtype, repo: Path, files: dict[str, Path]
) -> None:
    """With alphas that differ; two adapters with weights, per component too."""
    mine, other = ours(repo, dtype), theirs(repo, dtype)
    base = outputs(mine)
    assert_near(base, outputs(other))
    for name in "ab":
        mine.load_lora_weights(files[name], adapter_name=name)
        other.load_lora_weights(files[f"{name}-peft"], adapter_name=name)
        assert mine.get_list_adapters() == other.get_list_adapters()
    assert not torch.equal(outputs(mine)[0], base[0])
    several: list[Any] = [[0.7, 0.4], [{"unet": 0.5}, 1.5]]
    for weights in several:
        mine.set_adapters(["a", "b"], weights)
        other.set_adapters(["a", "b"], weights)
        assert mine.get_active_adapters() == other.get_active_adapters()
        assert_near(outputs(mine), outputs(other))
    mine.disable_lora()
    assert_equal(outputs(mine), base)
    mine.enable_lora()
    mine.delete_adapters("a")
    other.delete_adapters("a")
    assert mine.get_list_adapters() == other.get_list_adapters()
    assert_near(outputs(mine), outputs(other))
    mine.unload_lora_weights()
    assert mine.get_list_adapters() == {}
    assert_equal(outputs(mine), base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_biases_behind_factors_are_those_of_peft(
    dtype: torch.dtype, repo: Path, tmp_path: Path
) -> None:
    """On layers without a bias too, whose parameters cannot take them."""
    bias = {"lora_bias": True}
    models = peft_models(repo, unet=bias, text_encoder=bias)
    with torch.no_grad():
        for model in models.values():
            model.to(dtype)
            for key, parameter in model.named_parameters():
                if key.endswith("lora_B.default.bias"):
                    parameter.normal_(std=0.1)
    mine = ours(repo, dtype)
    base = outputs(mine)
    mine.load_lora_weights(write_diffusers(tmp_path, models))
    other = theirs(repo, dtype)
    for name, model in models.items():
        setattr(other, name, model)
    assert (outputs(mine)[0] - base[0]).norm() > 0.01 * base[0].norm()
    assert_near(outputs(mine), outputs(other))
    with pytest.raises(ValueError, match="bias, which the model lacks"):
        mine.fuse_lora()
    mine.unload_lora_weights()
    assert_equal(outputs(mine), base)


def test_the_adapter_loaded_last_is_used(repo: Path, files: dict[str, Path]) -> None:
    mine, other = ours(repo), theirs(repo, torch.float32)
    for name in "ab":
        mine.load_lora_weights(files[name])
        other.load_lora_weights(files[f"{name}-peft"])
    assert mine.get_active_adapters() == other.get_active_adapters()
    assert mine.get_list_adapters() == other.get_list_adapters()
    assert_near(outputs(mine), outputs(other))


def test_fused_is_baked_and_unfused_the_base(
    repo: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    mine = ours(repo)
    base = {key: tensor.clone() for key, tensor in mine.unet.state_dict().items()}
    before = outputs(mine)
    mine.load_lora_weights(files["a"])
    mine.fuse_lora(lora_scale=0.7)
    fused = outputs(mine)
    weightport.convert(
        repo, tmp_path / "baked", lora=[f"{files['a']}@0.7"], component="unet",
        ignore_unmatched=True, sync=False,
    )  # fmt: skip
    baked = load_file(tmp_path / "baked" / "unet" / "diffusion_pytorch_model.safetensors")
    for key, tensor in mine.unet.state_dict().items():
        assert torch.equal(tensor, baked[key]), key
    broken = load_file(files["b"])
    broken |= {key: one * float("nan") for key, one in broken.items() if "lora_up" in key}
    mine.load_lora_weights(broken, adapter_name="broken")
    with pytest.raises(ValueError, match="adapters make NaN or Inf of"):
        mine.fuse_lora()
    mine.unload_lora_weights()
    assert_equal(outputs(mine), fused)
    mine.unfuse_lora()
    assert_equal(outputs(mine), before)
    assert all(torch.equal(base[key], one) for key, one in mine.unet.state_dict().items())


def test_a_run_may_scale(repo: Path, files: dict[str, Path]) -> None:
    """`cross_attention_kwargs={"scale": s}` is the weight of one call."""
    mine = ours(repo)
    mine.load_lora_weights(files["a"])
    arguments: dict[str, Any] = {
        "prompt_embeds": torch.randn(1, 7, 64),
        "negative_prompt_embeds": torch.randn(1, 7, 64),
        "latents": torch.randn(1, 4, 8, 8),
        "height": 64,
        "width": 64,
        "num_inference_steps": 1,
        "output_type": "latent",
    }
    scaled = mine(**arguments, cross_attention_kwargs={"scale": 0.5}).images
    whole = mine(**arguments).images
    mine.set_adapters("default_0", 0.5)
    assert torch.equal(scaled, mine(**arguments).images)
    assert not torch.equal(scaled, whole)
    with pytest.raises(ValueError, match="cross_attention_kwargs: gligen is not supported"):
        mine(**arguments, cross_attention_kwargs={"gligen": 1.0})


def test_every_other_flavour_takes_the_place_of_the_parameter(repo: Path) -> None:
    """The same weight as that of the layer with LyCORIS' module on it."""
    mine = ours(repo)
    base = outputs(mine)
    to_q: Any = ours(repo).unet.get_submodule(LAYER)
    for label in ("loha-linear", "lokr-linear", "lora-rows-linear", "oft-linear"):
        case = next(case for case in cases() if case.label == label)
        linear = torch.nn.Linear(96, 96)
        linear.load_state_dict({"weight": to_q.weight, "bias": torch.zeros(96)})
        module = module_of(case, linear, 1.0, NAME)
        state = {key: one for key, one in state_of(module, NAME).items() if "diff_b" not in key}
        mine.load_lora_weights(state)
        changed = mine.unet.get_submodule(LAYER)
        x = torch.randn(3, 96)
        wanted = linear(x)
        assert (changed(x) - wanted).norm() <= 1e-5 * wanted.norm(), label
        mine.unload_lora_weights()
        assert_equal(outputs(mine), base)


def test_packed_layers_are_packed_anew(repo: Path, files: dict[str, Path]) -> None:
    mine = ours(repo)
    mine.pack()
    base = outputs(mine)
    mine.load_lora_weights(files["a"])
    side = outputs(mine)
    mine.fuse_lora()
    fused = outputs(mine)
    assert (side[0] - fused[0]).norm() <= 1e-5 * side[0].norm()
    assert (side[0] - base[0]).norm() > 1e-3 * base[0].norm()
    mine.unfuse_lora()
    mine.unload_lora_weights()
    assert_equal(outputs(mine), base)


def test_what_diffusers_saves_is_what_we_save(repo: Path, tmp_path: Path) -> None:
    layers = {"mid_block.x.lora_A.weight": torch.ones(2, 3)}
    metadata = {"r": 2, "target_modules": ["x"], "alpha_pattern": {}}
    options: dict[str, Any] = {
        "unet_lora_layers": layers,
        "unet_lora_adapter_metadata": metadata,
        "text_encoder_lora_layers": {key: one.clone() for key, one in layers.items()},
    }
    StableDiffusionPipeline.save_lora_weights(tmp_path / "ours", **options)
    diffusers.StableDiffusionPipeline.save_lora_weights(tmp_path / "theirs", **options)
    mine, other = (
        (tmp_path / who / "pytorch_lora_weights.safetensors") for who in ("ours", "theirs")
    )
    assert load_file(mine).keys() == load_file(other).keys()
    assert safe_open(mine, "pt").metadata() == safe_open(other, "pt").metadata()


def test_what_does_not_fit_is_refused_and_changes_nothing(
    repo: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    mine = ours(repo)
    mine.load_lora_weights(files["a"], adapter_name="a")
    before = outputs(mine)
    state = load_file(files["b"])
    strange = {**state, "lora_unet_x.lora_up.weight": torch.zeros(1)}
    wide = {f"{NAME}.lora_down.weight": torch.zeros(2, 64)}
    wide |= {f"{NAME}.lora_up.weight": torch.zeros(64, 2)}
    save_file(strange, tmp_path / "strange.safetensors")
    for content, message in (
        (tmp_path / "strange.safetensors", "belong to no module of the pipeline: lora_unet_x"),
        (wide, "makes a change"),
        ({f"{NAME}.lora_up.weight": torch.zeros(2, 2)}, "half of a LoRA"),
    ):
        with pytest.raises(ValueError, match=message):
            mine.load_lora_weights(content)
    with pytest.raises(ValueError, match="already"):
        mine.load_lora_weights(files["b"], adapter_name="a")
    with pytest.raises(ValueError, match="there is no adapter 'z'"):
        mine.set_adapters("z")
    with pytest.raises(ValueError, match="2 adapters are named, with 1 weights"):
        mine.set_adapters(["a", "a"], [1.0])
    with pytest.raises(OSError, match="no such folder"):
        mine.load_lora_weights(tmp_path / "none")
    assert_equal(outputs(mine), before)


def test_what_is_refused_while_it_is_applied_leaves_the_pipeline_as_it_was(
    repo: Path, files: dict[str, Path]
) -> None:
    """In every component: two DoRAs of one layer, and factors that make NaN."""
    mine = ours(repo)
    state = {key: one for key, one in load_file(files["a"]).items() if "lora_te" in key}
    state |= {
        f"{NAME}.lora_down.weight": torch.randn(2, 96),
        f"{NAME}.lora_up.weight": torch.randn(96, 2),
        f"{NAME}.dora_scale": torch.ones(96, 1),
    }
    mine.load_lora_weights(state, adapter_name="a")
    before = outputs(mine)
    adapters = mine.get_list_adapters()
    broken = {**state, f"{NAME}.dora_scale": torch.full((96, 1), float("nan"))}
    with pytest.raises(ValueError, match="adapters make NaN or Inf of"):
        mine.load_lora_weights(broken, adapter_name="b")
    assert mine.get_list_adapters() == adapters
    assert mine.get_active_adapters() == ["a"]
    assert_equal(outputs(mine), before)
    mine.load_lora_weights(state, adapter_name="b")
    with pytest.raises(ValueError, match="in ways whose order matters"):
        mine.set_adapters(["a", "b"], 0.5)
    assert mine.get_active_adapters() == ["b"]
    mine.set_adapters("a")
    assert_equal(outputs(mine), before)
