"""Narrow models of depths that no stock model has: configs at random, and what diffusers and
transformers make of them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch

Config = dict[str, Any]


def unet_config(rng: random.Random) -> Config:
    """A UNet2DConditionModel that diffusers can build and run."""
    config = _conditioned(rng)
    stages = len(config["block_out_channels"])
    if rng.random() < 0.4:
        config["layers_per_block"] = [rng.randint(1, 3) for _ in range(stages)]
    config["mid_block_type"] = rng.choice(["UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None])
    attends = [_attends(kind) for kind in config["down_block_types"]]
    plain = rng.random() < 0.3  # attention elsewhere on the way up than on the way down
    up = [rng.random() < 0.6 for _ in attends] if plain else attends[::-1]
    config["up_block_types"] = ["CrossAttnUpBlock2D" if one else "UpBlock2D" for one in up]
    if rng.random() < 0.3:
        layers = config["layers_per_block"]
        many = layers if isinstance(layers, list) else [layers] * stages
        config["reverse_transformer_layers_per_block"] = [
            rng.choice([rng.randint(1, 2), [rng.randint(1, 2) for _ in range(many[-1 - i] + 1)]])
            for i in range(stages)
        ]
    if rng.random() < 0.2:
        config["time_cond_proj_dim"] = 24
    return config


def controlnet_config(rng: random.Random) -> Config:
    """A ControlNetModel."""
    config = _conditioned(rng)
    config["mid_block_type"] = rng.choice(["UNetMidBlock2DCrossAttn", "UNetMidBlock2D"])
    hints = rng.randint(2, 4)
    config["conditioning_embedding_out_channels"] = [rng.choice([8, 16]) for _ in range(hints)]
    return config


def vae_config(rng: random.Random) -> Config:
    """An AutoencoderKL."""
    stages = rng.randint(1, 4)
    quant = rng.random() < 0.7
    down = ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]
    up = ["UpDecoderBlock2D", "AttnUpDecoderBlock2D"]
    return {
        "block_out_channels": [rng.choice([16, 32, 48]) for _ in range(stages)],
        "down_block_types": rng.choices(down, [3, 1], k=stages),
        "up_block_types": rng.choices(up, [3, 1], k=stages),
        "layers_per_block": rng.randint(1, 3),
        "latent_channels": rng.choice([3, 4, 8, 16]),
        "norm_num_groups": rng.choice([4, 8, 16]),
        "use_quant_conv": quant,
        "use_post_quant_conv": quant,
        "mid_block_add_attention": rng.random() < 0.8,
    }


def tiny_vae_config(rng: random.Random) -> Config:
    """An AutoencoderTiny."""
    down = rng.randint(1, 5)
    up = rng.choice([down, rng.randint(1, 5)])
    return {
        "encoder_block_out_channels": [rng.choice([4, 8])] * down,
        "decoder_block_out_channels": [rng.choice([4, 8])] * up,
        "num_encoder_blocks": [rng.randint(1, 4) for _ in range(down)],
        "num_decoder_blocks": [rng.randint(1, 4) for _ in range(up)],
        "latent_channels": rng.choice([3, 4, 16]),
        "scaling_factor": rng.choice([1.0, 0.5]),
        "shift_factor": rng.choice([0.0, 0.25]),
    }


def asymmetric_vae_config(rng: random.Random) -> Config:
    """An AsymmetricAutoencoderKL."""
    halves: Config = {}
    stages = rng.randint(1, 4)
    for half, kind in (("down", "DownEncoderBlock2D"), ("up", "UpDecoderBlock2D")):
        stages = rng.choice([stages, rng.randint(1, 4)])  # of the way up mostly as down
        halves |= {
            f"{half}_block_out_channels": [rng.choice([16, 32, 48]) for _ in range(stages)],
            f"{half}_block_types": rng.choices([kind, f"Attn{kind}"], [3, 1], k=stages),
            f"layers_per_{half}_block": rng.randint(1, 3),
        }
    return {
        **halves,
        "latent_channels": rng.choice([3, 4, 8]),
        "norm_num_groups": rng.choice([4, 8, 16]),
    }


def text_encoder_config(rng: random.Random) -> Config:
    """A CLIPTextModel."""
    heads = rng.choice([1, 2, 4])
    return {
        "hidden_size": heads * rng.choice([8, 16]),
        "intermediate_size": rng.choice([37, 64]),
        "num_hidden_layers": rng.randint(1, 15),
        "num_attention_heads": heads,
        "max_position_embeddings": rng.choice([40, 77, 248]),
        "vocab_size": rng.choice([500, 1000]),
        "hidden_act": rng.choice(["quick_gelu", "gelu"]),
        "projection_dim": 32,
        "eos_token_id": rng.choice([2, 499]),
    }


CONFIGS = {
    "UNet2DConditionModel": unet_config,
    "ControlNetModel": controlnet_config,
    "AutoencoderKL": vae_config,
    "AutoencoderTiny": tiny_vae_config,
    "AsymmetricAutoencoderKL": asymmetric_vae_config,
    "CLIPTextModel": text_encoder_config,
}
"""Class -> what makes a config at random."""

COMPONENTS = {
    "UNet2DConditionModel": "unet",
    "ControlNetModel": "",  # alone it lies in the repo itself
    "AutoencoderKL": "vae",
    "AutoencoderTiny": "vae",
    "AsymmetricAutoencoderKL": "vae",
    "CLIPTextModel": "text_encoder",
}
"""Class -> its folder in a repo."""


def _conditioned(rng: random.Random) -> Config:
    stages = rng.randint(1, 4)
    groups = rng.choice([4, 8, 16])
    heads = rng.choice([1, 2, 4])
    config: Config = {
        "block_out_channels": [16 * rng.randint(1, 4) for _ in range(stages)],
        "down_block_types": [
            "CrossAttnDownBlock2D" if rng.random() < 0.6 else "DownBlock2D" for _ in range(stages)
        ],
        "layers_per_block": rng.randint(1, 3),
        "transformer_layers_per_block": rng.choice(
            [1, 2, [rng.randint(1, 3) for _ in range(stages)]]
        ),
        "cross_attention_dim": rng.choice([24, 40]),
        "attention_head_dim": rng.choice([heads, [heads] * stages]),
        "norm_num_groups": groups,
        "use_linear_projection": rng.random() < 0.5,
    }
    if not any(map(_attends, config["down_block_types"])):
        config["down_block_types"][0] = "CrossAttnDownBlock2D"
    if config["use_linear_projection"] and rng.random() < 0.4:
        config["addition_embed_type"] = "text_time"
        config["addition_time_embed_dim"] = rng.choice([8, 256])
        config["projection_class_embeddings_input_dim"] = 6 * config["addition_time_embed_dim"] + 16
    return config


def _attends(kind: str) -> bool:
    return kind.startswith("CrossAttn")


def build(class_name: str, config: Config) -> Any:
    """The model, with random weights."""
    import diffusers
    import transformers

    torch.manual_seed(0)
    if class_name.startswith("CLIP"):
        text = transformers.CLIPTextConfig(**config)
        model = getattr(transformers, class_name)(text)
    else:
        model = getattr(diffusers, class_name)(**config)
    for parameter in model.parameters():  # a zeroed layer would hide the others
        torch.nn.init.normal_(parameter, std=0.05)
    return model.eval()


def load(class_name: str, folder: Path) -> Any:
    """The model in a folder; every tensor must be there, and no other."""
    import diffusers
    import transformers

    library = transformers if class_name.startswith("CLIP") else diffusers
    loader = getattr(library, class_name)
    if class_name.startswith("CLIP"):
        model, info = loader.from_pretrained(folder, output_loading_info=True)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys"))
    else:
        model, info = loader.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values())
    return model.eval()


@torch.no_grad()
def outputs(class_name: str, model: Any) -> list[torch.Tensor]:
    """What a model makes of the same inputs each time."""
    config = model.config
    generator = torch.Generator().manual_seed(1)
    if class_name.startswith("CLIP"):
        ids = torch.arange(12).reshape(1, -1) * 7 % config.vocab_size
        ids[0, 8] = 499
        encoded = model(input_ids=ids)
        return [encoded.last_hidden_state, encoded.pooler_output]
    if "Autoencoder" in class_name:
        image = torch.randn(1, config.in_channels, 16, 16, generator=generator)
        encoded = model.encode(image)
        is_tiny = class_name == "AutoencoderTiny"
        latents = encoded.latents if is_tiny else encoded.latent_dist.mode()
        return [latents, model.decode(latents).sample]
    inputs = _conditions(config, generator)
    if class_name == "ControlNetModel":
        hint = torch.randn(1, 3, 16 * 2 ** _hint_halvings(config), 16 * 2 ** _hint_halvings(config))
        inputs["controlnet_cond"] = torch.zeros_like(hint) + 0.5
        down, mid = model(**inputs, return_dict=False)
        return [*down, mid]
    return [model(**inputs).sample]


def _hint_halvings(config: Any) -> int:
    return len(config.conditioning_embedding_out_channels) - 1


def _conditions(config: Any, generator: torch.Generator) -> dict[str, Any]:
    """What a UNet or ControlNet takes."""
    inputs: dict[str, Any] = {
        "sample": torch.randn(1, config.in_channels, 16, 16, generator=generator),
        "timestep": torch.tensor([7]),
        "encoder_hidden_states": torch.randn(1, 5, config.cross_attention_dim, generator=generator),
    }
    if config.get("time_cond_proj_dim"):
        inputs["timestep_cond"] = torch.randn(1, config.time_cond_proj_dim, generator=generator)
    if config.addition_embed_type == "text_time":
        inputs["added_cond_kwargs"] = {
            "text_embeds": torch.randn(1, 16, generator=generator),
            "time_ids": torch.randn(1, 6, generator=generator),
        }
    return inputs
