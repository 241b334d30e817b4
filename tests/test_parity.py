"""A converted repo computes what KerasCV computes: the real keras-cv, on files that Keras loads itself.

The tolerances are those of float32 programs with the same maths, 3e-6 for text encoders and UNets and 5e-6 for the VAE
(relative L2, docs/parity.md). Faults are planted in narrow models with random weights and must be found where they are.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import weightport
from weightport.api import _runtime_state_dict
from weightport.converters.conversion import HALVES
from weightport.converters.recognise import candidates
from weightport.parity_run import Bench, Check, pairs_of

from .command import assert_refused, run
from .keras_files import interpreter, keras_files

pytest.importorskip("torch")

PARTS = ("text_encoder", "unet", "decoder", "image_encoder")
TOLERANCES = {"text_encoder": 3e-6, "unet": 3e-6, "decoder": 5e-6, "image_encoder": 5e-6}
COUNTS = {"text_encoder": {196, 372}, "unet": {686}, "decoder": {140}, "image_encoder": {108}}
State = dict[str, np.ndarray[Any, Any]]


MADE = {  # as test_keras_files makes them: what is in the cache serves both
    ("k2", "v1"): "--formats weights.h5,h5,model.h5,keras,ckpt,tf_checkpoint",
    ("k3", "v1"): "--formats weights.h5,model.h5,keras,tf_checkpoint,sharded",
    ("k3", "v2"): "--version v2 --formats weights.h5,model.h5",
}


def _sources(environment: str, version: str, kind: str) -> list[Path]:
    made = keras_files(environment, *MADE[environment, version].split())
    return [made.path(part, kind) for part in PARTS]


def _full_size(version: str) -> list[Path]:
    made = keras_files("k3", "--size", "full", "--version", version, "--formats", "weights.h5", "--no-truth")
    return [made.path(part, "weights.h5") for part in PARTS]


@pytest.fixture(scope="session")
def repo_of_keras(tmp_path_factory):
    """(environment, version, format) -> the repo that KerasCV's narrow models become."""

    @cache
    def convert(environment: str, version: str, kind: str) -> Path:
        output = tmp_path_factory.mktemp("parity") / "repo"
        weightport.convert(_sources(environment, version, kind), output)
        return output

    return convert


# Keras 2.15 reads TensorFlow checkpoints and its own whole models, Keras 3 also legacy files
@pytest.mark.parametrize(
    ("environment", "version", "kind"),
    [("k2", "v1", "ckpt"), ("k3", "v1", "weights.h5"), ("k3", "v2", "model.h5")],
)
def test_a_repo_computes_what_keras_cv_does(repo_of_keras, tmp_path, environment, version, kind):
    repo, python = repo_of_keras(environment, version, kind), interpreter(environment)
    found = weightport.parity(
        repo, _sources(environment, version, kind), source_python=python, report=tmp_path, images=version == "v1"
    )
    if version == "v1":  # both generations of the sampler: keras-cv 0.6 and 0.9
        assert found.images
        assert found.images.sampler == {"k2": "keras-cv 0.6.4", "k3": "keras-cv 0.9.0"}[environment]
        assert found.images.passed
        assert found.images.levels <= 1
        assert found.images.as_diffusers.relative_l2 > 3 * found.images.matched.relative_l2
    assert {check.name for check in found.checks} == set(PARTS)
    for check in found.checks:
        assert check.against == "kerascv"
        assert check.tolerance == TOLERANCES[check.name]
        assert check.weights
        assert check.weights.equal in COUNTS[check.name]
        assert not check.weights.wrong
        assert 0 < check.matched.relative_l2 <= TOLERANCES[check.name]
        assert check.matched.cosine > 1 - 1e-9
        assert check.passed
        if check.name != "text_encoder":
            assert check.as_diffusers
            assert 1.5 * check.matched.relative_l2 < check.as_diffusers.relative_l2 < 3e-4
    assert found.passed
    assert found.environment["kerascv"]["versions"]["keras"][0] == environment[1]
    assert json.loads((tmp_path / "parity.json").read_text())["passed"] is True
    assert (
        f"{4 + bool(found.images)} of {4 + bool(found.images)} checks passed" in (tmp_path / "parity.html").read_text()
    )


# --- planted faults ---------------------------------------------------------------------------------------------------

Spoil = Callable[[Path], None]  # given the folder of a component


def _weights(change: Callable[[State], None]) -> Spoil:
    def spoil(folder: Path) -> None:
        (file,) = folder.glob("*.safetensors")
        state = load_file(file)
        change(state)
        save_file({key: np.ascontiguousarray(tensor) for key, tensor in state.items()}, file, {"format": "pt"})

    return spoil


def _tensor(key: str, change: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]) -> Spoil:
    return _weights(lambda state: state.update({key: change(state[key])}))


def _exchange(first: str, second: str) -> Spoil:
    def change(state: State) -> None:
        for slot in ("weight", "bias"):
            a, b = f"{first}.{slot}", f"{second}.{slot}"
            if a in state:
                state[a], state[b] = state[b], state[a]

    return _weights(change)


def _config(**options: Any) -> Spoil:
    def spoil(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | options))

    return spoil


def _swap_rows(weight: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return weight[[1, 0, *range(2, len(weight))]]


def _negate_first(bias: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.concatenate([-bias[:1], bias[1:]])


ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
ATTEND = "up_blocks.2.attentions.1.transformer_blocks.0.attn1"
CONV = "decoder.up_blocks.2.resnets.1.conv2"
UPSAMPLE = "decoder.up_blocks.1.upsamplers.0.conv"
ENCODER = "encoder.down_blocks.2.resnets.1"
ROUNDED = "encoder.mid_block.resnets.0.conv1"
POSITIONS = "text_model.embeddings.position_embedding.weight"
LAYER = "text_model.encoder.layers.0"
FAULTS: dict[str, tuple[str, str, Spoil]] = {  # wrong weights: name -> the check that fails, the module named, how
    "two rows swapped": ("unet", "mid_block.resnets.1.conv1", _tensor("mid_block.resnets.1.conv1.weight", _swap_rows)),
    "a kernel transposed": ("unet", f"{ATTENTION}.to_q", _tensor(f"{ATTENTION}.to_q.weight", np.transpose)),
    "two layers of attention": ("unet", f"{ATTEND}.to_q", _exchange(f"{ATTEND}.to_q", f"{ATTEND}.to_out.0")),
    "a kernel mirrored": ("decoder", CONV, _tensor(f"{CONV}.weight", lambda kernel: kernel[..., ::-1])),
    "a bias lost": ("decoder", UPSAMPLE, _tensor(f"{UPSAMPLE}.bias", np.zeros_like)),
    "two layers exchanged": ("image_encoder", f"{ENCODER}.conv1", _exchange(f"{ENCODER}.conv1", f"{ENCODER}.conv2")),
    "a tensor rounded": ("image_encoder", ROUNDED, _tensor(f"{ROUNDED}.weight", lambda w: w.astype("f2").astype("f4"))),
    "a sign": ("image_encoder", "quant_conv", _tensor("quant_conv.bias", _negate_first)),
    "positions shifted": ("text_encoder", "text_model.embeddings", _tensor(POSITIONS, lambda w: np.roll(w, 1, axis=0))),
}
MISCONFIGURED: dict[str, tuple[str, str, Spoil]] = {  # right weights, different maths
    "one norm eps": ("unet", "down_blocks.0.resnets.0.norm1", _config(norm_eps=1e-3)),
    "the number of heads": ("unet", f"{ATTENTION}.to_out.0", _config(attention_head_dim=4)),
    "the layer norms' eps": ("text_encoder", f"{LAYER}.layer_norm1", _config(layer_norm_eps=1e-4)),
    "the activation": ("text_encoder", f"{LAYER}.mlp.fc2", _config(hidden_act="gelu")),
}


class Laboratory:
    """KerasCV, run once on its narrow models with every layer recorded; repos are compared with that."""

    def __init__(self, sources: list[Path], repo: Path, folder: Path) -> None:
        self.sources, self.repo = sources, repo
        python = str(interpreter("k3"))
        self.bench = Bench(folder, "float32", 8, python, lambda done, total: None)
        self.bench.run_theirs(pairs_of(repo, sources, _runtime_state_dict), layers=True, step=lambda: None)

    def check(self, repo: Path, name: str) -> Check:
        """One check of a repo."""
        (pair,) = (pair for pair in pairs_of(repo, self.sources, _runtime_state_dict) if pair.name == name)
        self.bench.run_ours([pair], layers=True, step=lambda: None)
        return self.bench.check(pair)


@pytest.fixture(scope="module")
def laboratory(repo_of_keras, tmp_path_factory):
    source = ("k3", "v1", "weights.h5")
    return Laboratory(_sources(*source), repo_of_keras(*source), tmp_path_factory.mktemp("bench"))


@pytest.mark.parametrize("fault", [*FAULTS, *MISCONFIGURED])
def test_a_planted_fault_fails_and_is_found(laboratory, tmp_path, fault):
    name, module, spoil = (FAULTS | MISCONFIGURED)[fault]
    shutil.copytree(laboratory.repo, tmp_path / "repo")
    spoil(tmp_path / "repo" / HALVES.get(name, name))
    check = laboratory.check(tmp_path / "repo", name)
    assert not check.passed
    assert check.fault
    assert check.fault.module == module
    assert _pattern(check.fault.row).match(module), check.fault.row
    assert check.weights
    assert bool(check.weights.wrong) == (fault in FAULTS)
    assert check.matched.relative_l2 > check.tolerance


def _pattern(row: str) -> re.Pattern[str]:
    """What the left side of a table row matches."""
    left = row.partition(" = ")[0]
    return re.compile(re.sub(r"\\\{\w+\\\}|\\\*", r"\\w+", re.escape(left)))


def test_the_repo_without_a_fault_passes_with_every_layer_compared(laboratory):
    for name, count in (("unet", 400), ("decoder", 80), ("image_encoder", 60), ("text_encoder", 100)):
        check = laboratory.check(laboratory.repo, name)
        assert check.passed
        assert check.fault is None
        assert len(check.layers) > count
        assert max(layer.relative_l2 for layer in check.layers) < 1e-5


def test_a_wrong_table_is_different_maths_not_wrong_weights(laboratory, tmp_path, monkeypatch):
    """Two rows of a table swapped: the inverse gives the source back all the same, and only running it tells."""
    (candidate,) = (c for c in candidates("kerascv") if c.table.name == "kerascv_unet")
    for slot in ("weight", "bias"):
        first, second = (f"res_block.5.{flow}.group_normalization.{slot}" for flow in ("entry_flow", "exit_flow"))
        a, b = candidate.links[first], candidate.links[second]
        monkeypatch.setitem(candidate.links, first, replace(a, targets=b.targets))
        monkeypatch.setitem(candidate.links, second, replace(b, targets=a.targets))
    weightport.convert(laboratory.sources, tmp_path / "repo")
    check = laboratory.check(tmp_path / "repo", "unet")
    assert check.weights
    assert check.weights.equal == 686
    assert not check.weights.wrong
    assert not check.passed
    assert check.fault
    assert check.fault.block == "down_blocks.2.resnets.1"


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_prints_a_table_and_the_fault(original_of, repo_of, tmp_path):
    pytest.importorskip("diffusers")
    run_ok = run("parity", repo_of("sd1"), "--against", "diffusers", "--component", "unet", "-o", tmp_path / "report")
    assert run_ok.status == 0, run_ok
    assert run_ok.out.splitlines()[-1] == "passed"
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"parity.html", "parity.json"}

    shutil.copytree(repo_of("sdxl"), tmp_path / "repo")
    _tensor("conv_in.weight", _swap_rows)(tmp_path / "repo" / "unet")
    failed = run("parity", tmp_path / "repo", "--source", original_of("sdxl"), "--component", "unet")
    assert failed.status == 1
    assert "FAIL: wrong weights" in failed.out
    assert "wrong weight: conv_in.weight is not model.diffusion_model.input_blocks.0.0.weight" in failed.out
    assert "first wrong: conv_in," in failed.out
    assert failed.out.splitlines()[-1] == "FAILED"


def test_a_missing_framework_is_one_line_with_a_hint(sd1_repo, sd1_keras):
    ended = run("parity", sd1_repo, "--source", sd1_keras["decoder"])  # this interpreter has no keras-cv
    assert_refused(ended, "keras-cv is not installed", r"pip install .*weightport\[keras\].*--source-python")


def test_an_interpreter_that_is_none(sd1_repo, sd1_keras, tmp_path):
    ended = run("parity", sd1_repo, "--source", sd1_keras["decoder"], "--source-python", tmp_path / "python")
    assert_refused(ended, tmp_path / "python", "cannot be started")


def test_a_file_that_keras_cannot_load(repo_of_keras):
    made = _sources("k2", "v1", "ckpt")[PARTS.index("decoder")]
    ended = run("parity", repo_of_keras("k2", "v1", "ckpt"), "--source", made, "--source-python", interpreter("k3"))
    assert_refused(ended, made, r"Keras 3\.\S+ cannot load it \(")


def test_sources_of_another_family(repo_of, sd2_keras):
    assert_refused(run("parity", repo_of("sd1"), "--source", sd2_keras["unet"]), sd2_keras["unet"], "not of one family")


def test_a_component_that_is_not_there(sd1_repo, sd1_keras):
    ended = run("parity", sd1_repo, "--source", sd1_keras["decoder"], "--component", "unet")
    assert_refused(ended, "--component unet", "not in the sources")


# --- full size --------------------------------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_full_size_models_match_keras(tmp_path, version):
    """860 M parameters: the figures of docs/parity.md."""
    sources = _full_size(version)
    weightport.convert(sources, tmp_path / "repo")
    found = weightport.parity(tmp_path / "repo", sources, source_python=interpreter("k3"))
    for check in found.checks:
        other = f", as diffusers runs it {check.as_diffusers.relative_l2:.1e}" if check.as_diffusers else ""
        print(f"{version} {check.name}: {check.matched.relative_l2:.1e}{other}")
    assert found.passed
    peaks = [report["peak_rss"] for report in found.environment.values() if isinstance(report, dict)]
    assert max(peaks) < 12e9


@pytest.mark.full
@pytest.mark.parametrize("component", ["unet", "image_encoder"])
def test_full_size_models_in_float64(tmp_path, component):
    source = _full_size("v1")[PARTS.index(component)]
    weightport.convert(source, tmp_path / "repo")
    found = weightport.parity(
        tmp_path / "repo", source, source_python=interpreter("k3"), component=component, dtype="float64"
    )
    print(f"{component}: {found.checks[0].matched.relative_l2:.1e}")
    assert found.passed
    assert found.checks[0].tolerance == 1e-12
