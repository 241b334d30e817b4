"""Models in full size, random weights, against diffusers and transformers (minutes, gigabytes).

Weights are made once and shared: both models are built on the meta device, and take turns in
holding them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

from weightport.runtime.models.clip import CLIPTextModel, CLIPTextModelWithProjection
from weightport.runtime.models.controlnet import ControlNetModel
from weightport.runtime.models.safety_checker import StableDiffusionSafetyChecker
from weightport.runtime.models.unet import UNet2DConditionModel
from weightport.runtime.models.vae import AutoencoderKL

TOLERANCE = 1e-5  # of the largest value

SD15 = {"cross_attention_dim": 768}
SDXL = {
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
}
CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
}
CLIP_H = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
}
CLIP_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
}
VISION = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
}

Outputs = dict[str, Any]


class Case(NamedTuple):
    """A model of each side; `oracle` makes theirs, `run` gives named tensors of either."""

    ours: type[Any]
    config: dict[str, Any]
    oracle: Callable[[dict[str, Any]], torch.nn.Module]
    run: Callable[[torch.nn.Module, dict[str, Any]], Outputs]


def noise(*shape: int) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + sum(shape)))


def of_diffusers(name: str) -> Callable[[dict[str, Any]], torch.nn.Module]:
    return lambda config: getattr(pytest.importorskip("diffusers"), name)(**config)


def of_transformers(name: str) -> Callable[[dict[str, Any]], torch.nn.Module]:
    def build(config: dict[str, Any]) -> torch.nn.Module:
        transformers = pytest.importorskip("transformers")
        model: torch.nn.Module = getattr(transformers, name)(transformers.CLIPTextConfig(**config))
        return model

    return build


def their_safety_checker(config: dict[str, Any]) -> torch.nn.Module:
    pytest.importorskip("diffusers")
    from diffusers.pipelines.stable_diffusion.safety_checker import (
        StableDiffusionSafetyChecker as Theirs,
    )
    from transformers import CLIPConfig

    return Theirs(CLIPConfig(**config))


def unet_inputs(config: dict[str, Any]) -> dict[str, Any]:
    inputs = {
        "sample": noise(2, 4, 16, 16),
        "timestep": torch.tensor([7, 901]),
        "encoder_hidden_states": noise(2, 77, config["cross_attention_dim"]),
    }
    if "addition_embed_type" in config:
        inputs["added_cond_kwargs"] = {
            "text_embeds": noise(2, 1280),
            "time_ids": torch.full((2, 6), 512.0),
        }
    return inputs


def unet(model: Any, config: dict[str, Any]) -> Outputs:
    return {"sample": model(**unet_inputs(config)).sample}


def controlnet(model: Any, config: dict[str, Any]) -> Outputs:
    output = model(**unet_inputs(config), controlnet_cond=noise(2, 3, 128, 128))
    samples = [*output.down_block_res_samples, output.mid_block_res_sample]
    return {str(i): sample for i, sample in enumerate(samples)}


def vae(model: Any, config: dict[str, Any]) -> Outputs:
    posterior = model.encode(noise(1, 3, 128, 128)).latent_dist
    return {"moments": posterior.parameters, "image": model.decode(noise(1, 4, 16, 16)).sample}


def text_encoder(model: Any, config: dict[str, Any]) -> Outputs:
    ids = torch.randint(1000, 40_000, (2, 77), generator=torch.Generator().manual_seed(1))
    ids[0, 9:], ids[1, 76] = 49407, 49407
    output = model(ids, output_hidden_states=True)
    pooled = output.text_embeds if hasattr(output, "text_embeds") else output.pooler_output
    return {
        "last": output.last_hidden_state,
        "penultimate": output.hidden_states[-2],
        "pooled": pooled,
    }


def safety_checker(model: Any, config: dict[str, Any]) -> Outputs:
    seen: list[Any] = []
    model.visual_projection.register_forward_hook(
        lambda _module, _inputs, output: seen.append(output)
    )
    flags = model(clip_input=noise(2, 3, 224, 224), images=torch.ones(2, 3, 8, 8))[1]
    return {"embedding": seen[0], "flags": torch.tensor(flags).float()}


CASES = {
    "unet sd15": Case(UNet2DConditionModel, SD15, of_diffusers("UNet2DConditionModel"), unet),
    "unet sdxl": Case(UNet2DConditionModel, SDXL, of_diffusers("UNet2DConditionModel"), unet),
    "controlnet sd15": Case(ControlNetModel, SD15, of_diffusers("ControlNetModel"), controlnet),
    "vae": Case(AutoencoderKL, VAE, of_diffusers("AutoencoderKL"), vae),
    "clip l": Case(
        CLIPTextModel, {**CLIP_L, "eos_token_id": 2}, of_transformers("CLIPTextModel"), text_encoder
    ),
    "clip h": Case(
        CLIPTextModel,
        {**CLIP_H, "num_hidden_layers": 23},
        of_transformers("CLIPTextModel"),
        text_encoder,
    ),
    "clip g": Case(
        CLIPTextModelWithProjection,
        {**CLIP_G, "num_hidden_layers": 32, "projection_dim": 1280},
        of_transformers("CLIPTextModelWithProjection"),
        text_encoder,
    ),
    "safety checker": Case(
        StableDiffusionSafetyChecker,
        {
            "projection_dim": 768,
            "vision_config": {**VISION, "patch_size": 14, "projection_dim": 768},
        },
        their_safety_checker,
        safety_checker,
    ),
}


def random_state(model: torch.nn.Module) -> dict[str, Any]:
    """Random values for every tensor of a model on the meta device, of a size that keeps
    activations near one."""
    generator, state = torch.Generator().manual_seed(0), {}
    for key, tensor in model.state_dict().items():
        bound = 0.2 if tensor.ndim == 1 else (3 / tensor[0].numel()) ** 0.5
        state[key] = torch.empty(tensor.shape).uniform_(-bound, bound, generator=generator)
        if tensor.ndim == 1 and key.endswith("weight"):
            state[key] += 1
    return state


def fill(model: torch.nn.Module, state: dict[str, Any]) -> None:
    """Give a model on the meta device these tensors without a copy; transformers 5 leaves a level
    of names out."""
    names = {
        key.removeprefix("text_model.").replace("vision_model.vision_model.", "vision_model."): key
        for key in state
    }
    own = model.state_dict()
    assert len(own) == len(state)
    model.load_state_dict(
        {key: state[key if key in state else names[key]] for key in own}, strict=True, assign=True
    )
    for name, buffer in model.named_buffers():  # not in the state dict
        assert name.endswith("position_ids")
        model.get_submodule(name.rpartition(".")[0]).position_ids = torch.arange(buffer.shape[-1])[
            None
        ]


@pytest.mark.full
@pytest.mark.parametrize("name", CASES)
def test_full_size_model_equals_the_library(name: str) -> None:
    case = CASES[name]
    with torch.device("meta"):
        ours = case.ours.from_config(case.config)
    state = random_state(ours)
    with torch.device("meta"):
        theirs = case.oracle(case.config)
    outputs = []
    for model in (theirs, ours):
        fill(model, state)
        with torch.no_grad():
            outputs.append(case.run(model.eval(), case.config))
    errors = []
    for key, expected in outputs[0].items():
        assert expected.isfinite().all(), key
        errors.append(
            (
                (outputs[1][key] - expected).abs().max() / expected.abs().max().clamp_min(1e-30)
            ).item()
        )
    print(f"\n{name}: {len(errors)} outputs, largest error {max(errors):.1e} of the largest value")
    assert max(errors) <= TOLERANCE
