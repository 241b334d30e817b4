"""Runs diffusers and transformers: on a repo, or on an original file as they load it.
run_diffusers.py JOB.json"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import exchange

with exchange.needs("diffusers"):
    import diffusers
    import torch_models
    import transformers
    from diffusers.loaders.single_file_utils import (
        create_diffusers_clip_model_from_ldm,
        load_single_file_checkpoint,
    )

PACKAGES = ("diffusers", "transformers", "torch", "numpy")


def refuse_controlnet(check: Mapping[str, Any]) -> None:
    """diffusers leaves two layers of an SDXL ControlNet's file out: what it loads cannot be the
    measure."""
    if check["class"] == "ControlNetModel" and check["config"].get("addition_embed_type"):
        version = importlib.metadata.version("diffusers")
        exchange.refuse(
            f"{check['source']}: diffusers {version} leaves `label_emb` out when it loads an SDXL"
            " ControlNet from a file; compare with --against diffusers"
        )


def load(check: Mapping[str, Any]) -> Any:
    """The check's model: from a file by `from_single_file`, with the config of the repo; from a
    repo strictly."""
    kind = getattr(diffusers, check["class"], None) or getattr(transformers, check["class"])
    repo, folder, source = check["repo"], check["subfolder"], check["source"]
    try:
        if not Path(source).is_dir():
            refuse_controlnet(check)
            if check["class"].startswith("CLIP"):
                state = load_single_file_checkpoint(source)
                return create_diffusers_clip_model_from_ldm(
                    kind, state, subfolder=folder, config=repo, local_files_only=True
                )
            ema = {"extract_ema": True} if check["ema"] else {}
            return kind.from_single_file(
                source, config=repo, subfolder=folder, local_files_only=True, **ema
            )
        model, info = kind.from_pretrained(
            source, subfolder=folder, output_loading_info=True, local_files_only=True
        )
    except Exception as error:
        exchange.refuse(
            f"{source}: {kind.__name__} of {kind.__module__.partition('.')[0]} cannot load it"
            f" ({error})"
        )
    if any(info.values()):
        exchange.refuse(f"{source}: not a strict load of {folder}: {info}")
    return model


def run(
    check: Mapping[str, Any], inputs: exchange.Arrays
) -> tuple[exchange.Outputs, exchange.Arrays]:
    """One model, as users of diffusers run it."""
    return torch_models.run(check, load(check), inputs)


if __name__ == "__main__":
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    exchange.serve(run, {name: importlib.metadata.version(name) for name in PACKAGES})
