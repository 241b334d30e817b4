"""Runs weightport's own runtime on a repo: run_weightport.py JOB.json"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from typing import Any

import exchange

with exchange.needs("torch"):
    import torch
    import torch_models

    from weightport.runtime.manifest import MODELS
    from weightport.runtime.pipelines.stable_diffusion import StableDiffusionPipeline
    from weightport.runtime.schedulers import KerasCVScheduler
    from weightport.runtime.semantics import apply_semantics


def load(check: Mapping[str, Any], semantics: Any) -> Any:
    """The model of a check, with these semantics."""
    kind: Any = MODELS[check["class"]]
    model = kind.from_pretrained(check["folder"], local_files_only=True)
    apply_semantics(model, semantics)
    return model


@torch.no_grad()
def pipeline(check: Mapping[str, Any], inputs: exchange.Arrays) -> exchange.Outputs:
    """Token ids and noise to an image in [0, 1] and in uint8, with KerasCV's sampler."""
    pipe: Any = StableDiffusionPipeline.from_pretrained(
        check["repo"],
        scheduler=KerasCVScheduler(generation=check["generation"]),
        safety_checker=None,
        local_files_only=True,
    )
    for model in (pipe.text_encoder, pipe.unet, pipe.vae):
        apply_semantics(model, check["semantics"])
    x = torch_models.tensors(inputs, "float32")
    context = pipe.text_encoder(x["tokens"]).last_hidden_state
    empty = pipe.text_encoder(x["no_tokens"]).last_hidden_state
    image = pipe(
        prompt_embeds=context,
        negative_prompt_embeds=empty,
        latents=x["noise"],
        height=check["image_size"],
        width=check["image_size"],
        num_inference_steps=check["steps"],
        guidance_scale=check["guidance_scale"],
        output_type="pt",
    ).images
    truncated = (255 * image).to(torch.uint8)  # as KerasCV does
    return [torch_models.numpy(image), torch_models.numpy(truncated)]


def run(
    check: Mapping[str, Any], inputs: exchange.Arrays
) -> tuple[exchange.Outputs, exchange.Arrays]:
    """One model or the whole pipeline, by the maths that the check names."""
    if check["call"] == "draw":
        return pipeline(check, inputs), {}
    return torch_models.run(check, load(check, check["semantics"]), inputs)


if __name__ == "__main__":
    exchange.serve(
        run, {name: importlib.metadata.version(name) for name in ("weightport", "torch", "numpy")}
    )
