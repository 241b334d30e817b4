"""Pipelines and components that bring their code along: behind `trust_remote_code`, from files,
folders and repos."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from weightport import DiffusionPipeline, UNet2DConditionModel

ONE_STEP = '''
import torch
from weightport import DiffusionPipeline

from .helpers import scale


class OneStep(DiffusionPipeline):
    """The sum of one denoising step and itself."""

    def __init__(self, unet, scheduler, strength=1.0):
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(strength=strength)

    def __call__(self, seed):
        sample = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
        self.scheduler.set_timesteps(1)
        with torch.no_grad():
            noise = self.unet(sample, self.scheduler.timesteps[0], torch.zeros(1, 3, 32)).sample
        return scale(self.scheduler.step(noise, self.scheduler.timesteps[0], sample).prev_sample, self.strength)

    @property
    def strength(self):
        return self.config.strength
'''
HELPERS = "from .parts.more import one\n\n\ndef scale(x, factor):\n    return x * factor * one()\n"
MORE = "def one():\n    return 1\n"
UNET = {
    "block_out_channels": [32, 32],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "cross_attention_dim": 32,
}
TRUST: dict[str, Any] = {"trust_remote_code": True}


def write_files(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of a UNet and a scheduler, whose pipeline nobody knows; to be read only."""
    folder = tmp_path_factory.mktemp("custom") / "repo"
    torch.manual_seed(0)
    UNet2DConditionModel.from_config(UNET).save_pretrained(folder / "unet")
    index = {
        "_class_name": "UnknownPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "scheduler": ["diffusers", "DDIMScheduler"],
    }
    return write_files(
        folder,
        {
            "model_index.json": json.dumps(index),
            "scheduler/scheduler_config.json": '{"steps_offset": 1}',
        },
    )


@pytest.fixture
def code(tmp_path: Path) -> Path:
    """A folder with the one-step pipeline."""
    files = {
        "pipeline.py": ONE_STEP,
        "helpers.py": HELPERS,
        "parts/more.py": MORE,
        "other.py": "1 / 0",
    }
    return write_files(tmp_path / "code", files)


@pytest.mark.parametrize("what", ["folder", "file", "text"])
def test_a_pipeline_of_ones_own(repo: Path, code: Path, what: str) -> None:
    custom: Any = {"folder": code, "file": code / "pipeline.py", "text": str(code)}[what]
    with pytest.raises(ValueError, match=r"code/pipeline\.py: .* pass trust_remote_code=True"):
        DiffusionPipeline.from_pretrained(repo, custom_pipeline=custom)
    pipe: Any = DiffusionPipeline.from_pretrained(
        repo, custom_pipeline=custom, strength=0.5, **TRUST
    )
    assert type(pipe).__name__ == "OneStep"
    assert pipe.config.strength == 0.5
    assert torch.isfinite(pipe(0)).all()
    assert not list(code.rglob("__pycache__"))


def test_it_saves_and_reloads(repo: Path, code: Path, tmp_path: Path) -> None:
    pipe: Any = DiffusionPipeline.from_pretrained(repo, custom_pipeline=code, strength=0.5, **TRUST)
    pipe.save_pretrained(tmp_path / "saved")
    saved = {
        path.relative_to(tmp_path / "saved").as_posix()
        for path in (tmp_path / "saved").rglob("*.py")
    }
    assert saved == {"pipeline.py", "helpers.py", "parts/more.py"}
    assert json.loads((tmp_path / "saved" / "model_index.json").read_text())["_class_name"] == [
        "pipeline",
        "OneStep",
    ]
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(tmp_path / "saved")
    again: Any = DiffusionPipeline.from_pretrained(tmp_path / "saved", **TRUST)
    assert torch.equal(again(3), pipe(3))
    assert type(pipe).from_pretrained(tmp_path / "saved").config == again.config == pipe.config


def test_edited_code_is_loaded_anew(repo: Path, code: Path) -> None:
    first: Any = DiffusionPipeline.from_pretrained(repo, custom_pipeline=code, **TRUST)
    again: Any = DiffusionPipeline.from_pretrained(repo, custom_pipeline=code, **TRUST)
    assert type(again) is type(first)
    (code / "parts" / "more.py").write_text("def one():\n    return 7\n")
    second: Any = DiffusionPipeline.from_pretrained(repo, custom_pipeline=code, **TRUST)
    assert torch.allclose(second(0), first(0) * 7)


@pytest.mark.parametrize("value", ["1", "true", "YES", "on"])
def test_the_switch_blocks_everything(
    repo: Path, code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    pipe: Any = DiffusionPipeline.from_pretrained(repo, custom_pipeline=code, **TRUST)
    pipe.save_pretrained(tmp_path / "saved")
    monkeypatch.setenv("DIFFUSERS_DISABLE_REMOTE_CODE", value)
    for custom in (code, code / "pipeline.py"):
        with pytest.raises(ValueError, match="disabled by DIFFUSERS_DISABLE_REMOTE_CODE"):
            DiffusionPipeline.from_pretrained(repo, custom_pipeline=custom, **TRUST)
    with pytest.raises(ValueError, match="disabled by DIFFUSERS_DISABLE_REMOTE_CODE"):
        DiffusionPipeline.from_pretrained(tmp_path / "saved", **TRUST)
    monkeypatch.setenv("DIFFUSERS_DISABLE_REMOTE_CODE", "0")
    DiffusionPipeline.from_pretrained(tmp_path / "saved", **TRUST)


def test_nothing_runs_without_consent(repo: Path, place: Path) -> None:
    write_files(
        place / "code",
        {"pipeline.py": "open('ran', 'w')\n" + ONE_STEP.replace("from .helpers", "#")},
    )
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(repo, custom_pipeline=place / "code")
    assert not Path("ran").exists()


def test_components_passed_in_and_missing(repo: Path, tmp_path: Path) -> None:
    extra = ONE_STEP.replace("scheduler, strength", "scheduler, critic, strength").replace(
        "from .helpers", "#"
    )
    extra = extra.replace("scheduler=scheduler)", "scheduler=scheduler, critic=critic)")
    folder = write_files(tmp_path / "code", {"pipeline.py": extra})
    with pytest.raises(ValueError, match="has no critic for OneStep"):
        DiffusionPipeline.from_pretrained(repo, custom_pipeline=folder, **TRUST)
    critic = torch.nn.Linear(1, 1)
    pipe: Any = DiffusionPipeline.from_pretrained(
        repo, custom_pipeline=folder, critic=critic, **TRUST
    )
    assert pipe.critic is critic
    assert pipe.components["critic"] is critic


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            ONE_STEP + "\nclass Two(OneStep):\n    pass\n",
            r"pipeline\.py: must hold one pipeline class, not 2 \(OneStep, Two\)",
        ),
        (
            "from weightport import DiffusionPipeline\nx = 1\n",
            r"pipeline\.py: must hold one pipeline class, not 0$",
        ),
        ("def f(:\n", r"pipeline\.py: line 1 is not Python"),
        ("from . import helpers\nfrom .no_such import x\n", None),
    ],
)
def test_files_that_hold_no_single_pipeline(
    repo: Path, code: Path, text: str, message: str | None
) -> None:
    (code / "pipeline.py").write_text(text)
    with pytest.raises(ValueError if message else ModuleNotFoundError, match=message):
        DiffusionPipeline.from_pretrained(repo, custom_pipeline=code, **TRUST)


def test_what_is_not_installed_is_named(repo: Path, code: Path) -> None:
    (code / "pipeline.py").write_text("import no_such_package.part\n")
    with pytest.raises(
        ImportError,
        match=r"code/pipeline\.py: imports no_such_package, .* `pip install no_such_package`$",
    ):
        DiffusionPipeline.from_pretrained(repo, custom_pipeline=code, **TRUST)


@pytest.mark.parametrize(
    "custom", ["lpw_stable_diffusion", "no/such/folder", "./nowhere", "nowhere.py", "no/where.py"]
)
def test_what_is_not_there_is_named(
    repo: Path, custom: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises((OSError, ValueError), match=Path(custom).stem):
        DiffusionPipeline.from_pretrained(repo, custom_pipeline=custom, **TRUST)


# --- components with code -------------------------------------------------------------------------

DOUBLE = '''
from weightport import UNet2DConditionModel


class DoubleUNet(UNet2DConditionModel):
    """A UNet that predicts twice the noise."""

    def forward(self, *arguments, **options):
        return super().forward(*arguments, **options)._replace(sample=2 * super().forward(*arguments, **options).sample)
'''
NOISE = """
import json
from pathlib import Path


class Noise:
    def __init__(self, level):
        self.level = level

    @classmethod
    def from_pretrained(cls, folder):
        return cls(json.loads(Path(folder, "noise.json").read_text())["level"])

    def save_pretrained(self, folder):
        Path(folder).mkdir()
        Path(folder, "noise.json").write_text(json.dumps({"level": self.level}))

    def set_timesteps(self):
        pass
"""


def test_components_with_code(repo: Path, tmp_path: Path, code: Path) -> None:
    pipe: Any = DiffusionPipeline.from_pretrained(repo, custom_pipeline=code, **TRUST)
    pipe.save_pretrained(tmp_path / "saved")
    index = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    index |= {"unet": ["double", "DoubleUNet"], "scheduler": ["noise", "Noise"]}
    write_files(
        tmp_path / "saved",
        {
            "model_index.json": json.dumps(index),
            "unet/double.py": DOUBLE,
            "scheduler/noise.py": NOISE,
            "scheduler/noise.json": '{"level": 3}',
        },
    )
    with pytest.raises(ValueError, match=r"saved/pipeline\.py: .* trust_remote_code"):
        DiffusionPipeline.from_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"saved/unet/double\.py: .* trust_remote_code"):
        type(pipe).from_pretrained(tmp_path / "saved")
    found = DiffusionPipeline.from_pretrained(tmp_path / "saved", dtype=torch.float16, **TRUST)
    assert type(found.unet).__name__ == "DoubleUNet"
    assert found.unet.dtype == torch.float16
    assert found.scheduler.level == 3
    found.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "unet" / "double.py").read_text() == DOUBLE
    again: Any = DiffusionPipeline.from_pretrained(tmp_path / "again", **TRUST)
    assert again.config == found.config
    assert again.config.unet == ["double", "DoubleUNet"]
    assert again.scheduler.level == 3


def test_a_class_that_is_not_in_its_module(repo: Path, tmp_path: Path) -> None:
    index = {
        **json.loads((repo / "model_index.json").read_text()),
        "_class_name": ["pipeline", "torch"],
    }
    folder = write_files(
        tmp_path / "repo", {"model_index.json": json.dumps(index), "pipeline.py": "import torch"}
    )
    with pytest.raises(ValueError, match="there is no class torch in it"):
        DiffusionPipeline.from_pretrained(folder, **TRUST)
    for name in ("../pipeline", "os", "missing"):
        index["_class_name"] = [name, "X"]
        (folder / "model_index.json").write_text(json.dumps(index))
        with pytest.raises(OSError, match=rf"there is no {name}\.py in it"):
            DiffusionPipeline.from_pretrained(folder, **TRUST)


# --- code for diffusers ---------------------------------------------------------------------------

FOREIGN = ONE_STEP.replace("from weightport import", "from diffusers import").replace(
    "from .helpers", "#"
)
FOREIGN = FOREIGN.replace("super().__init__()\n", "").replace(
    "        self.register_modules", "        super().__init__()\n        self.register_modules"
)


def test_code_for_diffusers_gets_diffusers(repo: Path, tmp_path: Path) -> None:
    """Its class extends diffusers' pipeline, so diffusers loads it, with diffusers' own
    components."""
    diffusers = pytest.importorskip("diffusers")
    folder = write_files(tmp_path / "code", {"pipeline.py": FOREIGN})
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(repo, custom_pipeline=folder)
    pipe: Any = DiffusionPipeline.from_pretrained(
        repo, custom_pipeline=folder, dtype=torch.float16, **TRUST
    )
    assert isinstance(pipe, diffusers.DiffusionPipeline)
    assert type(pipe).__name__ == "OneStep"
    assert isinstance(pipe.unet, diffusers.UNet2DConditionModel)
    assert pipe.unet.dtype == torch.float16


def test_code_for_diffusers_needs_diffusers(repo: Path, tmp_path: Path) -> None:
    folder = write_files(tmp_path / "code", {"pipeline.py": FOREIGN})
    code = f"""
import sys
sys.modules["diffusers"] = None  # as if it were not installed
from weightport import DiffusionPipeline
try:
    DiffusionPipeline.from_pretrained({str(repo)!r}, custom_pipeline={str(folder)!r}, trust_remote_code=True)
except ImportError as error:
    print(error)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    where = folder / "pipeline.py"
    assert (
        ran.stdout
        == f"{where}: imports diffusers, which is not installed; try `pip install diffusers`\n"
    )
