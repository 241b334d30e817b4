"""The tensors of a model, known from its config alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .models.clip import CLIPTextModel, CLIPTextModelWithProjection
from .models.controlnet import ControlNetModel
from .models.unet import UNet2DConditionModel
from .models.vae import AutoencoderKL

MODELS: dict[str, type[torch.nn.Module]] = {
    model.__name__: model
    for model in (
        UNet2DConditionModel,
        ControlNetModel,
        AutoencoderKL,
        CLIPTextModel,
        CLIPTextModelWithProjection,
    )
}


def manifest(class_name: str, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Key -> shape of every tensor, in the order of the state dict. The model is built without
    memory for weights.

    Raises:
        ValueError: the class is unknown, or the config asks for something that is not implemented.
    """
    if class_name not in MODELS:
        raise ValueError(
            f"{class_name!r} is not a model of the runtime; known: {', '.join(MODELS)}"
        )
    with torch.device("meta"):
        model = MODELS[class_name](config)
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
