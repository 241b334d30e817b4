"""Adapters as others write them: kohya's names over the modules that torch lists, and diffusers' own
`save_lora_weights` of what PEFT trains."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers.integrations.peft
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from weightport.mappings.families import families

# transformers 5.24 asks for a PEFT that is not published yet
transformers.integrations.peft.MIN_PEFT_VERSION = "0.18.0"

Shape = tuple[int, ...]
UNET_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "conv1", "ff.net.0.proj"]
TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1"]


def layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear | nn.Conv2d]]:
    """The layers that trainers change, by torch's names."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            yield name, module


@cache
def stock_model(family: str, component: str) -> nn.Module:
    """The full-size model of diffusers or transformers, without weights."""
    config = families()[family].components[component].config
    with torch.device("meta"):
        if component == "unet":
            return UNet2DConditionModel.from_config(config)
        return CLIPTextModel(CLIPTextConfig(**config))


def kohya_name(prefix: str, name: str) -> str:
    """What kohya's `LoRANetwork` calls a module: `lora_unet_down_blocks_0_...`."""
    text = "text_model." if "te" in prefix and not name.startswith("text_model") else ""
    return (prefix + "." + text + name).replace(".", "_")


def kohya_state(
    models: Mapping[str, nn.Module],
    rank: Callable[[int], int] = lambda i: 2,
    alpha: Callable[[int], float] = lambda i: 1.0,
    dtype: torch.dtype = torch.float16,
    only: tuple[str, ...] = ("",),
) -> dict[str, Tensor]:
    """A LoRA on the layers of models, `{"lora_unet": unet, "lora_te": text_encoder}`.

    Args:
        rank: of the layer of that number.
        alpha: of the same.
        only: parts of the names of layers to change.
    """
    state: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    named = [
        (kohya_name(prefix, name), layer)
        for prefix, model in models.items()
        for name, layer in layers(model)
        if any(part in name for part in only)
    ]
    for i, (name, layer) in enumerate(named):
        rows, *columns = layer.weight.shape
        ones = [1] * (len(columns) - 1)
        factors = {"down": (rank(i), *columns), "up": (rows, rank(i), *ones)}
        for role, shape in factors.items():
            values = torch.randn(shape, generator=generator) * 0.1
            state[f"{name}.lora_{role}.weight"] = values.to(dtype)
        state[f"{name}.alpha"] = torch.tensor(alpha(i)).to(dtype)
    return state


def write_kohya(path: Path, state: Mapping[str, Tensor], **metadata: str) -> Path:
    """The state as a file."""
    save_file(dict(state), path, metadata or None)
    return path


def peft_models(repo: Path, **options: Any) -> dict[str, Any]:
    """UNet and text encoder of a repo, with a random LoRA of PEFT's on each."""
    torch.manual_seed(0)
    models = {
        "unet": UNet2DConditionModel.from_pretrained(repo / "unet"),
        "text_encoder": CLIPTextModel.from_pretrained(repo / "text_encoder"),
    }
    for (name, model), targets in zip(models.items(), (UNET_TARGETS, TEXT_TARGETS), strict=True):
        wanted = {"r": 4, "lora_alpha": 2, "target_modules": targets, **options.get(name, {})}
        model.add_adapter(LoraConfig(**wanted))
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_B" in key:
                    parameter.normal_(std=0.1)
                elif "lora_magnitude_vector" in key:
                    parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
    return models


def write_diffusers(folder: Path, models: Mapping[str, Any]) -> Path:
    """What `save_lora_weights` makes of PEFT's models."""
    states = {
        f"{name}_lora_layers": convert_state_dict_to_diffusers(get_peft_model_state_dict(model))
        for name, model in models.items()
    }
    metadata = _collate_lora_metadata(models)
    StableDiffusionPipeline.save_lora_weights(folder, **states, **metadata)
    return folder / "pytorch_lora_weights.safetensors"


def cycle(values: tuple[Any, ...]) -> Callable[[int], Any]:
    """The value of each number in turn."""
    several = list(itertools.islice(itertools.cycle(values), len(values)))
    return lambda i: several[i % len(several)]


def state_over(
    weights: Mapping[str, Any],
    prefix: str,
    rank: int = 2,
    alpha: Callable[[int], float] = lambda i: 2.0,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """A LoRA in kohya's names on all matrices among the tensors of an original checkpoint.

    Args:
        prefix: what stands before the names there.
        alpha: of the layer of that number.
    """
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}
    matrices = [
        key for key, tensor in weights.items() if key.endswith(".weight") and tensor.ndim == 2
    ]
    for i, key in enumerate(matrices):
        name = "lora_unet_" + key.removeprefix(prefix).removesuffix(".weight").replace(".", "_")
        rows, columns = weights[key].shape
        for role, shape in (("down", (rank, columns)), ("up", (rows, rank))):
            values = torch.randn(shape, generator=generator) * 0.1
            state[f"{name}.lora_{role}.weight"] = values.to(dtype)
        state[f"{name}.alpha"] = torch.tensor(alpha(i), dtype=dtype)
    return state
