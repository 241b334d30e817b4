"""The runners of `weightport parity` in forks that need not import their framework; what KerasCV
gives for a job is kept."""

from __future__ import annotations

import json
import shutil
import sys
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from weightport.parity.frameworks import OURS, Framework
from weightport.parity.process import RUNNERS

from .forks import Forks, torch_forks
from .kept import content_of, kept
from .keras_files import BUILD, interpreter, keras
from .kerashub_files import kerashub

KEPT = {
    "kerascv": (RUNNERS / "run_kerascv.py", RUNNERS / "exchange.py", BUILD),
    "kerashub": (RUNNERS / "run_kerashub.py", RUNNERS / "exchange.py"),
}
"""Frameworks whose outputs are kept -> their scripts."""

DIFFUSERS = [
    "diffusers.loaders.single_file_utils",
    "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.models.controlnets.controlnet",
    "diffusers.models.unets.unet_2d_condition",
    "transformers.models.clip.modeling_clip",
]


def warm_runners(patch: pytest.MonkeyPatch) -> None:
    """While `patch` lasts, comparisons run our side, that of diffusers and KerasCV so."""
    patch.setattr(import_module("weightport.parity.bench"), "run_process", _run)


LDM = [
    "ldm.modules.diffusionmodules.openaimodel",
    "ldm.modules.ema",
    "transformers.models.clip.modeling_clip",
]


@cache
def _torch_forks(framework: str) -> Forks:
    """This Python with a framework imported; ours is shared with all that runs torch."""
    if framework == OURS:
        return torch_forks()
    return Forks(sys.executable, {"diffusers": DIFFUSERS, "ldm": LDM}[framework], RUNNERS)


def _run(framework: Framework, job: Path, source_python: str, *_: object) -> None:
    if framework.name in KEPT:
        _run_keras(framework.name, job, Path(source_python))
    else:
        _run_script(_torch_forks(framework.name), framework.name, job)


def _run_script(forks: Forks, framework: str, job: Path) -> None:
    ended = forks.script(RUNNERS / f"run_{framework}.py", job)
    assert ended.status == 0, ended.err


def _run_keras(framework: str, job: Path, python: Path) -> None:
    """Run KerasCV or keras-hub, for minutes, or take what it gave for the same job."""
    content = json.loads(job.read_text(encoding="utf-8"))
    checks = [_given(check) for check in content["checks"]]
    record = partial(_record, framework, job, python)
    folder = kept(python, KEPT[framework], json.dumps(checks).encode(), record)
    for file in folder.iterdir():
        shutil.copy(file, job.parent)


def _given(check: dict[str, Any]) -> dict[str, Any]:
    """A check without the places of its outputs, and with what files hold in place of names."""
    return {key: _held(value) for key, value in check.items() if key not in ("outputs", "layers")}


def _held(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _held(item) for key, item in value.items()}
    if isinstance(value, str) and Path(value).is_absolute():
        return content_of(Path(value))
    return value


def _record(framework: str, job: Path, python: Path, folder: Path) -> None:
    (environment,) = (name for name in ("k2", "k3") if interpreter(name) == python)
    forks = kerashub() if framework == "kerashub" else keras(environment)
    _run_script(forks, framework, job)
    content = json.loads(job.read_text(encoding="utf-8"))
    written = [check[kind] for check in content["checks"] for kind in ("outputs", "layers")]
    for file in map(Path, [*written, content["report"]]):
        if file.exists():
            shutil.copy(file, folder)
