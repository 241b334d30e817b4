"""The UNets of Stable Diffusion 1.5 and XL in full size, random weights, against diffusers (minutes, gigabytes)."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from weightport.runtime.unet import UNet2DConditionModel  # noqa: E402

CONFIGS: dict[str, dict[str, Any]] = {
    "sd15": {"cross_attention_dim": 768, "sample_size": 64},
    "sdxl": {
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
    },
}


@pytest.mark.full
@pytest.mark.parametrize("name", CONFIGS)
def test_full_size_unet_equals_diffusers(name: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    config = CONFIGS[name]
    with torch.device("meta"):
        theirs, ours = diffusers.UNet2DConditionModel(**config), UNet2DConditionModel(config)
    generator = torch.Generator().manual_seed(0)
    state = {}
    for key, tensor in ours.state_dict().items():
        bound = 0.2 if tensor.ndim == 1 else (3 / tensor[0].numel()) ** 0.5
        state[key] = torch.empty(tensor.shape).uniform_(-bound, bound, generator=generator)
        if tensor.ndim == 1 and key.endswith("weight"):
            state[key] += 1
    inputs: dict[str, Any] = {
        "sample": torch.randn(2, 4, 32, 32, generator=generator),
        "timestep": torch.tensor([7, 901]),
        "encoder_hidden_states": torch.randn(2, 77, config["cross_attention_dim"], generator=generator),
    }
    if name == "sdxl":
        embeds = torch.randn(2, 1280, generator=generator)
        inputs["added_cond_kwargs"] = {"text_embeds": embeds, "time_ids": torch.full((2, 6), 512.0)}
    outputs = []
    for model in (theirs, ours):
        model.load_state_dict(state, strict=True, assign=True)  # both share the memory
        with torch.no_grad():
            outputs.append(model.eval()(**inputs).sample)
    distance = ((outputs[1] - outputs[0]).norm() / outputs[0].norm()).item()
    print(f"{name}: relative distance {distance:.1e}")
    assert distance <= 1e-5
