"""Runs weightport's own runtime on a repo: run_weightport.py JOB.json"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from typing import Any

import exchange

with exchange.needs("torch"):
    import torch_models

    from weightport.runtime.layers import apply_semantics
    from weightport.runtime.manifest import MODELS


def run(check: Mapping[str, Any], inputs: exchange.Arrays) -> tuple[exchange.Outputs, exchange.Arrays]:
    """One model, by the maths that the check names."""
    model: Any = MODELS[check["class"]]
    model = model.from_pretrained(check["folder"], local_files_only=True)
    apply_semantics(model, check["semantics"])
    return torch_models.run(check, model, inputs)


if __name__ == "__main__":
    exchange.serve(run, {name: importlib.metadata.version(name) for name in ("weightport", "torch", "numpy")})
