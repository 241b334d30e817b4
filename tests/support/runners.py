"""The runners of `weightport parity` in forks that need not import their framework."""

from __future__ import annotations

import sys
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

from weightport.parity.frameworks import OURS, Framework
from weightport.parity.process import RUNNERS

from .forks import Forks, torch_forks
from .keras_files import interpreter, keras

DIFFUSERS = [
    "diffusers.loaders.single_file_utils",
    "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.models.controlnets.controlnet",
    "diffusers.models.unets.unet_2d_condition",
    "transformers.models.clip.modeling_clip",
]


def warm_runners(patch: pytest.MonkeyPatch) -> None:
    """While `patch` lasts, comparisons run our side, that of diffusers and KerasCV in forks."""
    patch.setattr(import_module("weightport.parity.bench"), "run_process", _run)


@cache
def _diffusers_forks() -> Forks:
    return Forks(sys.executable, DIFFUSERS, RUNNERS)


def _forks(framework: Framework, source_python: str) -> Forks:
    if framework.name == "kerascv":
        (environment,) = (name for name in ("k2", "k3") if str(interpreter(name)) == source_python)
        return keras(environment)
    return {OURS: torch_forks, "diffusers": _diffusers_forks}[framework.name]()


def _run(framework: Framework, job: Path, source_python: str, *_: object) -> None:
    forks = _forks(framework, source_python)
    ended = forks.script(RUNNERS / f"run_{framework.name}.py", job)
    assert ended.status == 0, ended.err
