"""A converted repo computes what KerasCV computes: the real keras-cv, on files that Keras loads
itself.

The tolerances are those of float32 programs with the same maths, 3e-6 for text encoders and UNets
and 5e-6 for the VAE (relative L2, docs/parity.md). Faults are planted in narrow models with random
weights and must be found where they are.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import weightport
from weightport.converters.planning.candidates import candidates
from weightport.mappings.families import halves
from weightport.parity.bench import Bench
from weightport.parity.pairs import pairs_of
from weightport.parity.result import Check, Parity

from ..support.command import assert_refused, run
from ..support.keras_files import ROOT, interpreter, keras_files
from ..support.runners import warm_runners
from .test_keras_files import RUNS, made_by

PARTS = ("text_encoder", "unet", "decoder", "image_encoder")
TOLERANCES = {"text_encoder": 3e-6, "unet": 3e-6, "decoder": 5e-6, "image_encoder": 5e-6}
COUNTS = {"text_encoder": {196, 372}, "unet": {686}, "decoder": {140}, "image_encoder": {108}}
State = dict[str, np.ndarray[Any, Any]]


MADE = {  # which run makes the models
    ("k2", "v1"): "k2 plain",
    ("k3", "v1"): "k3 plain",
    ("k3", "v2"): "k3 v2",
}


def _sources(environment: str, version: str, kind: str) -> list[Path]:
    run = MADE[environment, version]
    files = made_by(run, RUNS[run])
    return [files.path(part, kind) for part in _parts(version)]


def _parts(version: str) -> tuple[str, ...]:
    """What narrow models are made of; version 2 has the VAE of version 1."""
    return PARTS if version == "v1" else ("text_encoder", "unet")


def _full_size(version: str) -> list[Path]:
    made = keras_files(
        "k3", "--size", "full", "--version", version, "--formats", "weights.h5", "--no-truth"
    )
    return [made.path(part, "weights.h5") for part in PARTS]


@pytest.fixture(scope="module")
def repo_of_keras(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str, str], Path]:
    """(environment, version, format) -> the repo that KerasCV's narrow models become."""

    @cache
    def convert(environment: str, version: str, kind: str) -> Path:
        output = tmp_path_factory.mktemp("parity") / "repo"
        weightport.convert(_sources(environment, version, kind), output)
        return output

    return convert


# Keras 2.15 reads TensorFlow checkpoints and its own whole models, Keras 3 also legacy files
# Images of the older sampler are drawn by test_sampler.py too
@pytest.mark.parametrize(
    ("environment", "version", "kind", "images"),
    [
        ("k2", "v1", "ckpt", False),
        pytest.param("k2", "v1", "ckpt", True, marks=pytest.mark.full),
        ("k3", "v2", "model.h5", False),
    ],
)
def test_a_repo_computes_what_keras_cv_does(
    repo_of_keras: Callable[[str, str, str], Path],
    tmp_path: Path,
    environment: str,
    version: str,
    kind: str,
    images: bool,
) -> None:
    sources = _sources(environment, version, kind)
    with pytest.MonkeyPatch.context() as patch:
        warm_runners(patch)
        found = weightport.parity(
            repo_of_keras(environment, version, kind),
            sources,
            source_python=interpreter(environment),
            report=tmp_path,
            images=images,
        )
    if images:
        _assert_images(found, "keras-cv 0.6.4")
    _assert_equal(found, version, environment)
    _assert_reported(found, tmp_path, sources)


def test_a_repo_draws_what_keras_cv_does(laboratory: Laboratory) -> None:
    _assert_images(laboratory.found, "keras-cv 0.9.0")
    _assert_equal(laboratory.found, "v1", "k3")
    _assert_reported(laboratory.found, laboratory.report, laboratory.sources)


def _assert_images(found: Parity, sampler: str) -> None:
    assert found.images
    assert found.images.sampler == sampler
    assert found.images.passed
    assert found.images.levels <= 1
    assert found.images.as_diffusers.relative_l2 > 3 * found.images.matched.relative_l2


def _assert_equal(found: Parity, version: str, environment: str) -> None:
    assert {check.name for check in found.checks} == set(_parts(version))
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
    folders = {halves().get(part, part) for part in _parts(version)} - {"text_encoder"}
    names = {file.name for file in found.files}
    assert {f"repo/{folder}/diffusion_pytorch_model.safetensors" for folder in folders} < names


def _assert_reported(found: Parity, folder: Path, sources: list[Path]) -> None:
    report, page = ((folder / name).read_text() for name in ("parity.json", "parity.html"))
    assert json.loads(report)["passed"] is True
    count = len(sources) + bool(found.images)
    assert f"{count} of {count} checks passed" in page
    assert page.count("<img ") == (5 if found.images else 0)
    _assert_nothing_local(report, page)
    given = tuple(source.name for source in sources)  # a file, a folder or a prefix
    assert all(file.name.startswith(("repo/", *given)) for file in found.files)


def _assert_nothing_local(*texts: str) -> None:
    """Reports go to the Hub: they name files, not the folders of this machine."""
    for text in texts:
        for folder in (tempfile.gettempdir(), str(Path.home()), str(ROOT)):
            assert f"{folder}/" not in text


# --- planted faults -------------------------------------------------------------------------------

Spoil = Callable[[Path], None]  # given the folder of a component


def _weights(change: Callable[[State], None]) -> Spoil:
    def spoil(folder: Path) -> None:
        (file,) = folder.glob("*.safetensors")
        state = load_file(file)
        change(state)
        save_file(
            {key: np.ascontiguousarray(tensor) for key, tensor in state.items()},
            file,
            {"format": "pt"},
        )

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


ATTENTION = "down_blocks.0.attentions.0"
ATTEND = "up_blocks.2.attentions.1"
QUERY, OUT = "transformer_blocks.0.attn1.to_q", "transformer_blocks.0.attn1.to_out.0"
RESNET = "mid_block.resnets.1"
CONV = "decoder.up_blocks.2.resnets.1"
UPSAMPLE = "decoder.up_blocks.1.upsamplers.0"
ENCODER = "encoder.down_blocks.2.resnets.1"
ROUNDED = "encoder.mid_block.resnets.0"
POSITIONS = "text_model.embeddings.position_embedding.weight"
LAYER = "text_model.encoder.layers.0"

ATTENTION_ROW = 'down_blocks.{i}.attentions.{j} = "spatial_transformer.{2*i+j} : transformer"'
ATTEND_ROW = 'up_blocks.{i}.attentions.{j} = "spatial_transformer.{3*i+j+4} : transformer"'
BLOCK_ROW = 'transformer_blocks.0 = "transformer_block : block"'
TIME_ROW = 'time_embedding.linear_{k} = "dense.{k-1} : kernel"'
ENTRY = 'conv1 = "entry_flow.padded_conv2d.conv2d : kernel"'
NORM = 'norm1 = "entry_flow.group_normalization"'


class Fault(NamedTuple):
    """Something wrong in a repo, and where it must be found: the first module, its block, the row
    that filled it."""

    check: str
    block: str
    module: str  # in the block
    row: str
    spoil: Spoil


FAULTS = {  # wrong weights
    "two rows swapped": Fault(
        "unet",
        RESNET,
        ".conv1",
        f'mid_block.resnets.{{j}} = "res_block.{{j+8}} : resnet" / {ENTRY}',
        _tensor(f"{RESNET}.conv1.weight", _swap_rows),
    ),
    "a kernel transposed": Fault(
        "unet",
        ATTENTION,
        f".{QUERY}",
        f'{ATTENTION_ROW} / {BLOCK_ROW} / attn{{k}}.* = "attn{{k}}.* : kernel"',
        _tensor(f"{ATTENTION}.{QUERY}.weight", np.transpose),
    ),
    "two layers of attention": Fault(
        "unet",
        ATTEND,
        f".{QUERY}",
        f'{ATTEND_ROW} / {BLOCK_ROW} / attn{{k}}.* = "attn{{k}}.* : kernel"',
        _exchange(f"{ATTEND}.{QUERY}", f"{ATTEND}.{OUT}"),
    ),
    "a kernel mirrored": Fault(
        "decoder",
        CONV,
        ".conv2",
        'decoder.up_blocks.{i}.resnets.{j} = "resnet_block.{3*i+j+2} : resnet" / conv2 ='
        ' "conv2.conv2d : kernel"',
        _tensor(f"{CONV}.conv2.weight", lambda kernel: kernel[..., ::-1]),
    ),
    "a bias lost": Fault(
        "decoder",
        UPSAMPLE,
        ".conv",
        'decoder.up_blocks.{i}.upsamplers.0.conv = "padded_conv2d.{i+2}.conv2d : kernel"',
        _tensor(f"{UPSAMPLE}.conv.bias", np.zeros_like),
    ),
    "two layers exchanged": Fault(
        "image_encoder",
        ENCODER,
        ".conv1",
        'encoder.down_blocks.{i}.resnets.{j} = "resnet_block.{2*i+j} : resnet" / conv1 ='
        ' "conv1.conv2d : kernel"',
        _exchange(f"{ENCODER}.conv1", f"{ENCODER}.conv2"),
    ),
    "a tensor rounded": Fault(
        "image_encoder",
        ROUNDED,
        ".conv1",
        'encoder.mid_block.resnets.{j} = "resnet_block.{j+8} : resnet" / conv1 = "conv1.conv2d :'
        ' kernel"',
        _tensor(f"{ROUNDED}.conv1.weight", lambda w: w.astype("f2").astype("f4")),
    ),
    "a sign": Fault(
        "image_encoder",
        "quant_conv",
        "",
        'quant_conv = "padded_conv2d.5.conv2d : kernel"',
        _tensor("quant_conv.bias", _negate_first),
    ),
    "positions shifted": Fault(
        "text_encoder",
        "text_model.embeddings",
        "",
        'text_model.embeddings = "clip_embedding.0"',
        _tensor(POSITIONS, lambda w: np.roll(w, 1, axis=0)),
    ),
}
MISCONFIGURED = {  # right weights, different maths
    "one norm eps": Fault(
        "unet",
        "down_blocks.0.resnets.0",
        ".norm1",
        f'down_blocks.{{i}}.resnets.{{j}} = "res_block.{{2*i+j}} : resnet" / {NORM}',
        _config(norm_eps=1e-3),
    ),
    "the number of heads": Fault(
        "unet",
        ATTENTION,
        f".{OUT}",
        f'{ATTENTION_ROW} / {BLOCK_ROW} / attn{{k}}.to_out.0 = "attn{{k}}.out_proj : kernel"',
        _config(attention_head_dim=4),
    ),
    "sines before cosines": Fault(
        "unet", "time_embedding", ".linear_1", TIME_ROW, _config(flip_sin_to_cos=False)
    ),
    "the layer norms' eps": Fault(
        "text_encoder",
        LAYER,
        ".layer_norm1",
        'text_model.encoder.layers.{i}.layer_norm{k} = "clip_encoder_layer.{i}.layer_norm{k}"',
        _config(layer_norm_eps=1e-4),
    ),
    "the activation": Fault(
        "text_encoder",
        LAYER,
        ".mlp.fc2",
        'text_model.encoder.layers.{i}.mlp.fc{k} = "clip_encoder_layer.{i}.fc{k} : kernel"',
        _config(hidden_act="gelu"),
    ),
}


class Laboratory:
    """A comparison with KerasCV's narrow models, every layer recorded, and its bench: other repos
    are compared with what KerasCV did there."""

    def __init__(self, sources: list[Path], repo: Path, folder: Path) -> None:
        self.sources, self.repo, self.folder = sources, repo, folder
        self.report = folder / "report"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(import_module("weightport.parity.run"), "Bench", self._bench)
            warm_runners(patch)
            self.found = weightport.parity(
                repo,
                sources,
                source_python=interpreter("k3"),
                layers=True,
                image_size=64,
                report=self.report,
            )

    def _bench(self, _folder: Path, *options: Any) -> Bench:
        """A bench whose folder stays."""
        self.bench = Bench(self.folder, *options)
        return self.bench

    def check(self, repo: Path, name: str) -> Check:
        """One check of a repo."""
        (pair,) = (pair for pair in pairs_of(repo, self.sources) if pair.name == name)
        with pytest.MonkeyPatch.context() as patch:
            warm_runners(patch)
            self.bench.run_ours([pair], layers=True, step=lambda: None)
        return self.bench.check(pair)


@pytest.fixture(scope="module")
def laboratory(
    repo_of_keras: Callable[[str, str, str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Laboratory:
    source = ("k3", "v1", "weights.h5")
    return Laboratory(_sources(*source), repo_of_keras(*source), tmp_path_factory.mktemp("bench"))


@pytest.mark.parametrize("name", [*FAULTS, *MISCONFIGURED])
def test_a_planted_fault_fails_and_is_found(
    laboratory: Laboratory, tmp_path: Path, name: str
) -> None:
    fault = (FAULTS | MISCONFIGURED)[name]
    shutil.copytree(laboratory.repo, tmp_path / "repo")
    fault.spoil(tmp_path / "repo" / halves().get(fault.check, fault.check))
    check = laboratory.check(tmp_path / "repo", fault.check)
    assert not check.passed
    assert check.fault
    assert (check.fault.block, check.fault.module) == (fault.block, fault.block + fault.module)
    tail = check.fault.row.removeprefix(fault.row)
    assert tail in (
        "",
        ' / weight = "weight : ... i o -> o i ..."',
    )  # how the row goes on, if it does
    assert tail != check.fault.row
    assert check.weights
    assert bool(check.weights.wrong) == (name in FAULTS)
    assert check.matched.relative_l2 > check.tolerance


def test_the_repo_without_a_fault_passes_with_every_layer_compared(laboratory: Laboratory) -> None:
    for name, count in (
        ("unet", 400),
        ("decoder", 80),
        ("image_encoder", 60),
        ("text_encoder", 100),
    ):
        check = laboratory.check(laboratory.repo, name)
        assert check.passed
        assert check.fault is None
        assert len(check.layers) > count
        assert max(layer.relative_l2 for layer in check.layers) < 1e-5


def test_a_wrong_table_is_different_maths_not_wrong_weights(
    laboratory: Laboratory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rows of a table swapped: the inverse gives the source back all the same, and only running
    it tells."""
    (candidate,) = (c for c in candidates("kerascv") if c.table.name == "kerascv_unet")
    for slot in ("weight", "bias"):
        first, second = (
            f"res_block.5.{flow}.group_normalization.{slot}" for flow in ("entry_flow", "exit_flow")
        )
        a, b = candidate.links[first], candidate.links[second]
        monkeypatch.setitem(candidate.links, first, a._replace(targets=b.targets))
        monkeypatch.setitem(candidate.links, second, b._replace(targets=a.targets))
    weightport.convert(laboratory.sources, tmp_path / "repo")
    check = laboratory.check(tmp_path / "repo", "unet")
    assert check.weights
    assert check.weights.equal == 686
    assert not check.weights.wrong
    assert not check.passed
    assert check.fault
    assert check.fault.block == "down_blocks.2.resnets.1"


# --- the command ----------------------------------------------------------------------------------


def test_the_command_prints_a_table_and_the_fault(
    original_of: Callable[[str], Path],
    repo_of: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("diffusers")
    warm_runners(monkeypatch)
    run_ok = run(
        "parity",
        repo_of("sd1"),
        "--against",
        "diffusers",
        "--component",
        "unet",
        "-o",
        tmp_path / "report",
    )
    assert run_ok.status == 0, run_ok
    assert run_ok.out.splitlines()[-1] == "passed"
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"parity.html", "parity.json"}
    _assert_nothing_local(*(path.read_text() for path in (tmp_path / "report").iterdir()))

    shutil.copytree(repo_of("sdxl"), tmp_path / "repo")
    _tensor("conv_in.weight", _swap_rows)(tmp_path / "repo" / "unet")
    failed = run(
        "parity", tmp_path / "repo", "--source", original_of("sdxl"), "--component", "unet"
    )
    assert failed.status == 1
    assert "FAIL: wrong weights" in failed.out
    assert (
        "wrong weight: conv_in.weight is not model.diffusion_model.input_blocks.0.0.weight"
        in failed.out
    )
    assert "first wrong: conv_in," in failed.out
    assert failed.out.splitlines()[-1] == "FAILED"


def test_a_missing_framework_is_one_line_with_a_hint(
    sd1_repo: Path, sd1_keras: dict[str, Path]
) -> None:
    ended = run(
        "parity", sd1_repo, "--source", sd1_keras["decoder"]
    )  # this interpreter has no keras-cv
    assert_refused(
        ended, "keras-cv is not installed", r"pip install .*weightport\[keras\].*--source-python"
    )


def test_an_interpreter_that_is_none(
    sd1_repo: Path, sd1_keras: dict[str, Path], tmp_path: Path
) -> None:
    ended = run(
        "parity", sd1_repo, "--source", sd1_keras["decoder"], "--source-python", tmp_path / "python"
    )
    assert_refused(ended, tmp_path / "python", "cannot be started")


def test_a_file_that_keras_cannot_load(repo_of_keras: Callable[[str, str, str], Path]) -> None:
    made = _sources("k2", "v1", "ckpt")[PARTS.index("decoder")]
    ended = run(
        "parity",
        repo_of_keras("k2", "v1", "ckpt"),
        "--source",
        made,
        "--source-python",
        interpreter("k3"),
    )
    assert_refused(ended, made, r"Keras 3\.\S+ cannot load it \(")


def test_sources_of_another_family(
    repo_of: Callable[[str], Path], sd2_keras: dict[str, Path]
) -> None:
    assert_refused(
        run("parity", repo_of("sd1"), "--source", sd2_keras["unet"]),
        sd2_keras["unet"],
        "not of one family",
    )


def test_a_component_that_is_not_there(sd1_repo: Path, sd1_keras: dict[str, Path]) -> None:
    ended = run("parity", sd1_repo, "--source", sd1_keras["decoder"], "--component", "unet")
    assert_refused(ended, "--component unet", "not in the sources")


# --- full size ------------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_full_size_models_match_keras(tmp_path: Path, version: str) -> None:
    """860 M parameters: the figures of docs/parity.md."""
    sources = _full_size(version)
    weightport.convert(sources, tmp_path / "repo")
    found = weightport.parity(tmp_path / "repo", sources, source_python=interpreter("k3"))
    for check in found.checks:
        other = (
            f", as diffusers runs it {check.as_diffusers.relative_l2:.1e}"
            if check.as_diffusers
            else ""
        )
        print(f"{version} {check.name}: {check.matched.relative_l2:.1e}{other}")
    assert found.passed
    peaks = [
        report["peak_rss"] for report in found.environment.values() if isinstance(report, dict)
    ]
    assert max(peaks) < 12e9


@pytest.mark.full
@pytest.mark.parametrize("component", ["unet", "image_encoder"])
def test_full_size_models_in_float64(tmp_path: Path, component: str) -> None:
    parts = dict(zip(PARTS, _full_size("v1"), strict=True))
    source = parts[component]
    halves = [parts["decoder"]] if component == "image_encoder" else []  # of one VAE
    weightport.convert([source, *halves], tmp_path / "repo")
    options: dict[str, Any] = {"component": component, "dtype": "float64", "image_size": 64}
    found = weightport.parity(tmp_path / "repo", source, source_python=interpreter("k3"), **options)
    print(f"{component}: {found.checks[0].matched.relative_l2:.1e}")
    assert found.passed
    assert found.checks[0].tolerance == 1e-12
