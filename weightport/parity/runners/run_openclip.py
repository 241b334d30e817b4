"""Runs the text encoder of SD 2.x as its authors do: run_openclip.py JOB.json"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import exchange

with exchange.needs("open_clip"):
    import torch
    import torch_models
    from open_clip.transformer import TextTransformer

PACKAGES = ("open-clip-torch", "torch", "numpy")
NOT_OF_THE_TOWER = ("logit_scale", "attn_mask")  # of the whole CLIP; a constant


def load(check: Mapping[str, Any]) -> Any:
    """The text tower of a checkpoint, at the widths of a config, with all layers of the file."""
    config = check["config"]
    whole = torch_models.below(torch_models.read(Path(check["source"])), check["prefix"])
    state = {key: tensor.float() for key, tensor in whole.items() if key not in NOT_OF_THE_TOWER}
    layers = {key.split(".")[2] for key in state if key.startswith("transformer.resblocks.")}
    model = TextTransformer(
        context_length=config["max_position_embeddings"],
        vocab_size=config["vocab_size"],
        width=config["hidden_size"],
        heads=config["num_attention_heads"],
        mlp_ratio=config["intermediate_size"] / config["hidden_size"],
        layers=len(layers),
        output_dim=state["text_projection"].shape[1] if "text_projection" in state else None,
    )
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        exchange.refuse(f"{check['source']}: open_clip does not take it ({error})")
    return model


def run(
    check: Mapping[str, Any], inputs: exchange.Arrays
) -> tuple[exchange.Outputs, exchange.Arrays]:
    """What SD 2.x is conditioned on: the last layer but one, after the final norm.

    `FrozenOpenCLIPEmbedder` with layer="penultimate", in ldm/modules/encoders/modules.py.
    """
    model = load(check).to(getattr(torch, check["dtype"])).eval()
    tokens = torch_models.tensors(inputs, check["dtype"])["tokens"]
    with torch_models.recorded(model, check["watch"]) as found, torch.no_grad():
        states = model.forward_intermediates(
            tokens,
            indices=[check["config"]["num_hidden_layers"] - 1],
            normalize_intermediates=True,
            intermediates_only=True,
            output_fmt="NLC",
        )
    return [torch_models.numpy(states["text_intermediates"][0])], found


if __name__ == "__main__":
    exchange.serve(run, {name: importlib.metadata.version(name) for name in PACKAGES})
