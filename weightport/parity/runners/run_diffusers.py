"""Runs diffusers and transformers: run_diffusers.py JOB.json

On a repo, or on an original file as they load it.
"""

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


def load(check: Mapping[str, Any]) -> Any:
    """The check's model, from a file or from a repo."""
    kind = getattr(diffusers, check["class"], None) or getattr(transformers, check["class"])
    source = check["source"]
    try:
        if Path(source).is_dir():
            return load_repo(kind, check)
        return load_file(kind, check)
    except Exception as error:
        library = kind.__module__.partition(".")[0]
        exchange.refuse(f"{source}: {kind.__name__} of {library} cannot load it ({error})")


def load_file(kind: Any, check: Mapping[str, Any]) -> Any:
    """A model of an original file, with the config of the repo."""
    source = check["source"]
    options = {"config": check["repo"], "subfolder": check["subfolder"], "local_files_only": True}
    if check["call"] == "control":
        refuse_controlnet(check)
    if check["call"] == "embed":
        state = load_single_file_checkpoint(source)
        return create_diffusers_clip_model_from_ldm(kind, state, **options)
    if check["call"] == "read":
        return load_t5(kind, check)
    if check["ema"]:
        options["extract_ema"] = True
    return kind.from_single_file(source, **options)


def load_t5(kind: Any, check: Mapping[str, Any]) -> Any:
    """T5 of an original file, whose tensors have transformers' names, strictly."""
    config = kind.config_class.from_pretrained(check["repo"], subfolder=check["subfolder"])
    model = kind(config)
    own = torch_models.below(load_single_file_checkpoint(check["source"]), check["prefix"])
    extras = own.keys() - model.state_dict().keys()
    model.load_state_dict({key: tensor for key, tensor in own.items() if key not in extras})
    return model


def load_repo(kind: Any, check: Mapping[str, Any]) -> Any:
    """A model of a repo, strictly."""
    source = check["source"]
    folder = check["subfolder"]
    model, info = kind.from_pretrained(
        source, subfolder=folder, output_loading_info=True, local_files_only=True
    )
    if any(info.values()):
        exchange.refuse(f"{source}: not a strict load of {folder}: {info}")
    return model


def refuse_controlnet(check: Mapping[str, Any]) -> None:
    """diffusers leaves two layers of an SDXL ControlNet's file out: it cannot be the measure."""
    if check["config"].get("addition_embed_type"):
        version = importlib.metadata.version("diffusers")
        exchange.refuse(
            f"{check['source']}: diffusers {version} leaves `label_emb` out when it loads an SDXL"
            " ControlNet from a file; compare with --against diffusers"
        )


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
