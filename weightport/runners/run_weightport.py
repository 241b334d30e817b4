"""Runs weightport's own runtime on a repo: run_weightport.py JOB.json"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from typing import Any

import exchange

with exchange.needs("torch"):
    import torch
    import torch_models

    from weightport.manifest import MODELS
    from weightport.runtime.layers import apply_semantics


def load(check: Mapping[str, Any], semantics: Any) -> Any:
    """The model of a check, with these semantics."""
    kind: Any = MODELS[check["class"]]
    model = kind.from_pretrained(check["folder"], local_files_only=True)
    apply_semantics(model, semantics)
    return model


def timesteps(steps: int, generation: str) -> list[int]:
    """The timesteps of KerasCV's `generate_image`: up to keras-cv 0.7, or from 0.8 on."""
    if generation == "0.7":
        return list(range(1, 1000, 1000 // steps))
    return [round(i * 999 / (steps - 1)) for i in range(steps)]


@torch.no_grad()
def pipeline(check: Mapping[str, Any], inputs: exchange.Arrays) -> exchange.Outputs:
    """Token ids and noise to an image, as KerasCV's `generate_image` does: DDIM without noise, guided.

    Song et al. 2020, https://arxiv.org/abs/2010.02502, equation 12 with eta 0; Ho and Salimans 2022,
    https://arxiv.org/abs/2207.12598, for the guidance.
    """
    models = {name: load(part, check["semantics"]) for name, part in check["parts"].items()}
    x = torch_models.tensors(inputs, "float32")
    context, empty = (models["text_encoder"](x[name]).last_hidden_state for name in ("tokens", "no_tokens"))
    steps = timesteps(check["steps"], check["generation"])
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas = torch.cumprod(1 - betas, 0)[steps].tolist()
    latent = x["noise"]
    for i in reversed(range(len(steps))):
        alpha, before = alphas[i], alphas[i - 1] if i else 1.0
        plain, guided = (models["unet"](latent, steps[i], c).sample for c in (empty, context))
        noise = plain + check["guidance_scale"] * (guided - plain)
        clean = (latent - (1 - alpha) ** 0.5 * noise) / alpha**0.5
        latent = before**0.5 * clean + (1 - before) ** 0.5 * noise
    vae = models["decoder"]
    image = vae.decode(latent / vae.config.scaling_factor).sample
    pixels = (255 * (image + 1) / 2).clamp(0, 255).to(torch.uint8)  # KerasCV truncates
    return [torch_models.numpy(image), torch_models.numpy(pixels)]


def run(check: Mapping[str, Any], inputs: exchange.Arrays) -> tuple[exchange.Outputs, exchange.Arrays]:
    """One model or the whole pipeline, by the maths that the check names."""
    if check["name"] == "pipeline":
        return pipeline(check, inputs), {}
    return torch_models.run(check, load(check, check["semantics"]), inputs)


if __name__ == "__main__":
    exchange.serve(run, {name: importlib.metadata.version(name) for name in ("weightport", "torch", "numpy")})
