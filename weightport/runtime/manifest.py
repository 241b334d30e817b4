"""The tensors of a model, known from its config alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch

from .loading.budget import MOST_PARAMETERS, at_most
from .loading.model import Model
from .loading.weights import NoInit
from .models.asymmetric_vae import AsymmetricAutoencoderKL
from .models.autoencoder_tiny import AutoencoderTiny
from .models.clip import CLIPTextModel, CLIPTextModelWithProjection
from .models.controlnet import ControlNetModel
from .models.flux import FluxTransformer2DModel
from .models.mmdit import SD3Transformer2DModel
from .models.t5 import T5EncoderModel
from .models.unet import UNet2DConditionModel
from .models.vae import AutoencoderKL

MODELS: dict[str, type[Model]] = {
    model.__name__: model
    for model in (
        UNet2DConditionModel,
        ControlNetModel,
        SD3Transformer2DModel,
        FluxTransformer2DModel,
        AutoencoderKL,
        AutoencoderTiny,
        AsymmetricAutoencoderKL,
        CLIPTextModel,
        CLIPTextModelWithProjection,
        T5EncoderModel,
    )
}
Shapes = dict[str, tuple[int, ...]]


def manifest(class_name: str, config: Mapping[str, Any]) -> Shapes:
    """Key -> shape of every tensor, in the order of the state dict. The model is built without
    memory for weights, and once for each config.

    Raises:
        ValueError: the class is unknown, or the config asks for something that is not implemented.
    """
    if class_name not in MODELS:
        raise ValueError(
            f"{class_name!r} is not a model of the runtime; known: {', '.join(MODELS)}"
        )
    return dict(_build(class_name, json.dumps(config, sort_keys=True)))


@lru_cache(maxsize=64)
def _build(class_name: str, config: str) -> Shapes:
    with torch.device("meta"), NoInit(), at_most(MOST_PARAMETERS):
        model = MODELS[class_name].from_config(json.loads(config))
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
