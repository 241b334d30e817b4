"""Runs weightport's own runtime on a repo: run_weightport.py JOB.json"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import exchange

with exchange.needs("torch"):
    import torch
    import torch_models

    from weightport import DiffusionPipeline
    from weightport.runtime import schedulers
    from weightport.runtime.manifest import MODELS
    from weightport.runtime.semantics import apply_semantics


def load(check: Mapping[str, Any], semantics: Any) -> Any:
    """The model of a check, with these semantics."""
    kind: Any = MODELS[check["class"]]
    model = kind.from_pretrained(check["folder"], local_files_only=True)
    apply_semantics(model, semantics)
    return model


class GivenTokens:
    """Stands for a tokenizer: a text is the name of token ids that are given."""

    model_max_length = 77
    added_tokens_encoder: Mapping[str, int] = {}

    def __init__(self, ids: Mapping[str, torch.Tensor]) -> None:
        self.ids = ids

    def decode(self, ids: list[int]) -> str:
        """Nothing is too long."""
        return ""

    def __call__(self, texts: Any, **options: Any) -> Any:
        """The ids of one name as a list, of several as a tensor (b, length)."""
        if isinstance(texts, str):
            return SimpleNamespace(input_ids=self.ids[texts][0].tolist())
        return SimpleNamespace(input_ids=torch.cat([self.ids[name] for name in texts]))


def scheduler(check: Mapping[str, Any]) -> dict[str, Any]:
    """What samples in place of the repo's own scheduler, if anything does."""
    if not check["sampler"]:
        return {}
    major, minor, *_ = check["version"].split(".")
    generation = "0.7" if (int(major), int(minor)) < (0, 8) else "0.8"
    return {"scheduler": getattr(schedulers, check["sampler"])(generation=generation)}


@torch.no_grad()
def pipeline(check: Mapping[str, Any], inputs: exchange.Arrays) -> exchange.Outputs:
    """Token ids and noise to an image in [0, 1] and in uint8, sampled as the source does."""
    absent = dict.fromkeys(check["without"])
    options = {**absent, **scheduler(check), "local_files_only": True}
    pipe: Any = DiffusionPipeline.from_pretrained(check["repo"], **options)
    x = torch_models.tensors(inputs, "float32")
    for name, component in pipe.components.items():
        if isinstance(component, torch.nn.Module):
            apply_semantics(component, check["semantics"])
        elif component is not None and name.startswith("tokenizer"):
            setattr(pipe, name, GivenTokens(x))
    image = pipe(
        "tokens",
        negative_prompt="no_tokens",
        latents=x["noise"],
        height=check["image_size"],
        width=check["image_size"],
        num_inference_steps=check["steps"],
        guidance_scale=check["guidance_scale"],
        output_type="pt",
        **check["arguments"],
    ).images
    levels = 255 * image
    pixels = (levels.round() if check["rounds"] else levels).to(torch.uint8)  # as the source does
    return [torch_models.numpy(image), torch_models.numpy(pixels)]


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
