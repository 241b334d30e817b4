"""What type checkers see of the pipelines. Each `reveal_type` and each wrong call is followed by
what mypy says of it."""

from __future__ import annotations

from typing import Any, reveal_type

import torch
from PIL import Image

from weightport import (
    AutoencoderKL,
    AutoPipelineForInpainting,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)


def loading() -> None:
    reveal_type(StableDiffusionPipeline.from_pretrained("a"))  # StableDiffusionPipeline
    reveal_type(DiffusionPipeline.from_pretrained("a"))  # DiffusionPipeline
    reveal_type(StableDiffusionXLPipeline.from_pretrained("a"))  # StableDiffusionXLPipeline
    reveal_type(UNet2DConditionModel.from_pretrained("a", subfolder="unet"))  # UNet2DConditionModel
    reveal_type(AutoencoderKL.from_pretrained("a").to(torch.float16))  # AutoencoderKL
    reveal_type(AutoPipelineForInpainting.from_pretrained("a"))  # DiffusionPipeline


def calls(pipe: StableDiffusionPipeline, xl: StableDiffusionXLPipeline) -> None:
    result = pipe("a cat", 512, 512, num_inference_steps=20, generator=torch.Generator())
    reveal_type(result)  # StableDiffusionPipelineOutput
    reveal_type(result.nsfw_content_detected)  # list[bool] | None
    reveal_type(xl("a cat", original_size=(8, 8)))  # StableDiffusionXLPipelineOutput
    reveal_type(pipe.to("cuda"))  # StableDiffusionPipeline
    reveal_type(pipe.guidance_scale)  # float
    reveal_type(pipe.unet)  # UNet2DConditionModel
    pipe("a cat", strenght=1)  # error: Unexpected keyword argument "strenght"
    pipe("a cat", image=Image.new("L", (8, 8)))  # error: Unexpected keyword argument "image"
    pipe("a cat", num_inference_steps="many")  # error: Argument "num_inference_steps"
    pipe("a cat", output_type="jpg")  # error: Argument "output_type"
    pipe(7)  # error: Argument 1
    xl("a cat", original_size=8)  # error: Argument "original_size"


def images(
    changing: StableDiffusionImg2ImgPipeline, led: StableDiffusionControlNetPipeline
) -> None:
    image = Image.new("RGB", (8, 8))
    changing("a cat", image=[image, image], strength=0.5)
    changing("a cat", image="cat.png")  # error: Argument "image"
    led("a cat", [image, torch.zeros(1, 3, 8, 8)], controlnet_conditioning_scale=[0.5, 1.0])


def prompts(pipe: StableDiffusionPipeline, xl: StableDiffusionXLPipeline) -> None:
    reveal_type(pipe.encode_prompt("a cat", "cpu", 2, True))  # tuple[Tensor, Tensor | None]
    reveal_type(xl.encode_prompt("a cat").pooled)  # Tensor | None
    pipe.encode_prompt(prompt_2="a cat")  # error: Unexpected keyword argument "prompt_2"


def constructors(pipe: StableDiffusionPipeline, xl: StableDiffusionXLPipeline) -> None:
    parts: dict[str, Any] = pipe.components
    reveal_type(StableDiffusionImg2ImgPipeline(**parts))  # StableDiffusionImg2ImgPipeline
    reveal_type(StableDiffusionImg2ImgPipeline.from_pipe(pipe))  # StableDiffusionImg2ImgPipeline
    StableDiffusionPipeline(pipe.vae)  # error: Missing positional arguments
    pipe.scheduler = DDIMScheduler()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.scheduler = pipe.unet  # error: Incompatible types in assignment


def callbacks(pipe: StableDiffusionPipeline) -> None:
    def stop(
        pipe: StableDiffusionPipeline, step: int, timestep: torch.Tensor, tensors: dict[str, Any]
    ) -> dict[str, Any]:
        pipe._interrupt = step == 3
        return tensors

    pipe("a cat", callback_on_step_end=stop)
    pipe("a cat", callback_on_step_end=len)  # error: Argument "callback_on_step_end"
