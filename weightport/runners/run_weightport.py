"""Runs weightport's own runtime on a repo: run_weightport.py JOB.json"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import exchange

with exchange.needs("torch"):
    import torch
    import torch_models
    from safetensors.torch import load_file

    from weightport.runtime.manifest import MODELS


def load(folder: Path, class_name: str, semantics: Any) -> Any:
    """The model in a folder of a repo, with every key accounted for."""
    with torch.device("meta"):  # no memory for weights that are replaced at once
        model: Any = MODELS[class_name](json.loads((folder / "config.json").read_text()), semantics=semantics)
    weights = {}
    for file in folder.glob("*.safetensors"):
        weights |= load_file(file)
    model.load_state_dict({key: tensor.float() for key, tensor in weights.items()}, strict=True, assign=True)
    return model


def run(check: Mapping[str, Any], inputs: exchange.Arrays) -> tuple[exchange.Outputs, exchange.Arrays]:
    """One model, by the maths that the check names."""
    model = load(Path(check["folder"]), check["class"], check["semantics"])
    return torch_models.run(check, model, inputs)


if __name__ == "__main__":
    exchange.serve(run, {name: importlib.metadata.version(name) for name in ("weightport", "torch", "numpy")})
