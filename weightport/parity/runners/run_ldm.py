"""Runs the models of an original checkpoint as their first authors do: run_ldm.py JOB.json

UNet and VAE are the real `ldm` modules, in the copy that `stable-diffusion-sdkit` on PyPI carries.
The text encoder of SD 1.x is that of transformers, as CompVis used it.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import exchange

with exchange.needs("stable-diffusion-sdkit (ldm)"):
    import torch
    import torch_models
    from ldm.modules.diffusionmodules.model import Decoder, Encoder
    from ldm.modules.diffusionmodules.openaimodel import UNetModel
    from ldm.modules.ema import LitEma
    from torch import Tensor, nn

PACKAGES = ("stable-diffusion-sdkit", "torch", "transformers", "numpy")


def unet(config: Mapping[str, Any]) -> nn.Module:
    """The UNet at the widths of a config.

    As CompVis's v1-inference.yaml and Stability-AI's v2-inference.yaml have it.
    """
    widths = config["block_out_channels"]
    model: nn.Module = UNetModel(
        image_size=32,  # not used
        in_channels=config["in_channels"],
        out_channels=config["out_channels"],
        model_channels=widths[0],
        channel_mult=[width // widths[0] for width in widths],
        num_res_blocks=config["layers_per_block"],
        attention_resolutions=[4, 2, 1],
        use_spatial_transformer=True,
        context_dim=config["cross_attention_dim"],
        use_linear_in_transformer=config.get("use_linear_projection", False),
        legacy=False,
        **heads(widths, config["attention_head_dim"]),
    )
    return model


def heads(widths: Sequence[int], counts: int | Sequence[int]) -> dict[str, int]:
    """How attention is split: into a number of heads, or into heads of one width."""
    if isinstance(counts, int):
        return {"num_heads": counts}
    width = widths[0] // counts[0]
    if any(whole != count * width for whole, count in zip(widths, counts, strict=True)):
        exchange.refuse(
            f"ldm has no UNet with {counts} heads at widths {widths}: its heads are of one width"
        )
    return {"num_head_channels": width}


class Autoencoder(nn.Module):
    """`AutoencoderKL` of ldm, less PyTorch Lightning and the training loss."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        sizes: dict[str, Any] = {
            "ch": widths[0],
            "ch_mult": [width // widths[0] for width in widths],
            "num_res_blocks": 2,
            "attn_resolutions": [],
            "in_channels": 3,
            "out_ch": 3,
            "resolution": 256,
            "z_channels": 4,
        }
        self.encoder = Encoder(double_z=True, **sizes)
        self.decoder = Decoder(**sizes)
        self.quant_conv = nn.Conv2d(8, 8, 1)
        self.post_quant_conv = nn.Conv2d(4, 4, 1)

    def encode(self, image: Tensor) -> Tensor:
        """Image (b, 3, h, w) -> mean and log variance (b, 8, h/8, w/8)."""
        moments: Tensor = self.quant_conv(self.encoder(image))
        return moments

    def decode(self, latent: Tensor) -> Tensor:
        """Latent (b, 4, h, w), not scaled -> image (b, 3, 8h, 8w)."""
        image: Tensor = self.decoder(self.post_quant_conv(latent))
        return image


def clip(config: Mapping[str, Any]) -> nn.Module:
    """The text encoder of SD 1.x, `FrozenCLIPEmbedder`."""
    with exchange.needs("transformers"):
        from transformers import CLIPTextConfig, CLIPTextModel
    model: nn.Module = CLIPTextModel(CLIPTextConfig(**config))
    return model


def build(check: Mapping[str, Any]) -> nn.Module:
    """The check's model, at the widths that its config says."""
    config = check["config"]
    match check["call"]:
        case "denoise":
            return unet(config)
        case "embed":
            return clip(config)
    return Autoencoder(config["block_out_channels"])


def averages(unet: nn.Module) -> dict[str, str]:
    """Name of a parameter -> that of its moving average, as ldm's own `LitEma` gives it."""
    average = LitEma(nn.ModuleDict({"diffusion_model": unet}))
    return {
        key.removeprefix("diffusion_model."): f"model_ema.{name}"
        for key, name in average.m_name2s_name.items()
    }


def state_dict(model: nn.Module, check: Mapping[str, Any]) -> dict[str, Tensor]:
    """What a checkpoint has for the model: its weights, or their moving average."""
    state = torch_models.read(Path(check["source"]))
    if check["ema"]:
        return {key: state[name] for key, name in averages(model).items()}
    return torch_models.below(state, check["prefix"])


def load(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load strictly; there may be a level `text_model.`, and saved buffers, by the transformers."""
    has_level = any(key.startswith("text_model.") for key in model.state_dict())
    named = {}
    for key, tensor in state.items():
        if not key.endswith("position_ids"):
            named[key if has_level else key.removeprefix("text_model.")] = tensor.float()
    model.load_state_dict(named, strict=True)


def run(
    check: Mapping[str, Any], inputs: exchange.Arrays
) -> tuple[exchange.Outputs, exchange.Arrays]:
    """One model on the inputs of a check, in scaled latents."""
    model = build(check)
    try:
        load(model, state_dict(model, check))
    except RuntimeError as error:
        exchange.refuse(f"{check['source']}: the real modules do not take it ({error})")
    model.to(getattr(torch, check["dtype"])).eval()
    x = torch_models.tensors(inputs, check["dtype"])
    with torch_models.recorded(model, check["watch"]) as found, torch.no_grad():
        outputs = call(check, model, x)
    return [torch_models.numpy(output) for output in outputs], found


def call(check: Mapping[str, Any], model: Any, x: Mapping[str, Tensor]) -> list[Tensor]:
    """The outputs of a check."""
    match check["call"]:
        case "denoise":
            torch_models.give_features(model.time_embed, x["features"])
            return [model(x["sample"], x["timestep"], x["context"])]
        case "decode":
            return [model.decode(x["latent"] / check["config"]["scaling_factor"])]
        case "encode":
            mean, logvar = model.encode(x["image"]).chunk(2, dim=1)
            return [mean * check["config"]["scaling_factor"], logvar.clamp(-30, 20)]
    return [model(x["tokens"]).last_hidden_state]


def versions() -> Iterator[tuple[str, str]]:
    """What is installed of the packages."""
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            yield name, importlib.metadata.version(name)


if __name__ == "__main__":
    exchange.serve(run, dict(versions()))
