"""`DiffusionPipeline`: components, loading, variants, dtypes, sharing and saving; diffusers is the
oracle."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import pytest
import torch

from weightport import (
    AutoencoderKL,
    CLIPTextModel,
    CLIPTokenizer,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from weightport.converters.repo.tokenizer import write_tokenizer
from weightport.runtime.loading.components import correct_sample_size
from weightport.runtime.loading.config import Config

D = "diffusion_pytorch_model"
NAMES = ["vae", "text_encoder", "tokenizer", "unet", "scheduler"]
UNET = {
    "sample_size": 64,
    "block_out_channels": [32, 32],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "cross_attention_dim": 32,
}
VAE = {
    "block_out_channels": [32, 32],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
}
TEXT = {
    "vocab_size": 1000,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
SCHEDULER = {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "steps_offset": 1}


class Plain(DiffusionPipeline):
    """Text-to-image without a call."""

    _optional_components: ClassVar[list[str]] = [
        "safety_checker",
        "feature_extractor",
        "image_encoder",
    ]

    def __init__(
        self,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        unet: Any,
        scheduler: Any,
        safety_checker: Any = None,
        feature_extractor: Any = None,
        image_encoder: Any = None,
        requires_safety_checker: bool = True,
    ) -> None:
        self.register_to_config(requires_safety_checker=requires_safety_checker)
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
            image_encoder=image_encoder,
        )


class Other(DiffusionPipeline):
    """What shares a few of the components, and has an option of its own."""

    def __init__(self, unet: Any, scheduler: Any, strength: float = 0.5) -> None:
        self.register_to_config(strength=strength)
        self.register_modules(unet=unet, scheduler=scheduler)


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete repository of a narrow Stable Diffusion 1 model; to be read only."""
    folder = tmp_path_factory.mktemp("pipeline") / "repo"
    torch.manual_seed(0)
    UNet2DConditionModel.from_config(UNET).save_pretrained(folder / "unet")
    AutoencoderKL.from_config(VAE).save_pretrained(folder / "vae")
    CLIPTextModel.from_config(TEXT).save_pretrained(folder / "text_encoder")
    write_tokenizer(folder / "tokenizer")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    index = {
        "_class_name": "StableDiffusionPipeline",
        "scheduler": ["diffusers", "PNDMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        **{name: [None, None] for name in Plain._optional_components},
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def copy(repo: Path, tmp_path: Path) -> Path:
    """A copy of it, to break."""
    return Path(shutil.copytree(repo, tmp_path / "copy"))


def edit_index(folder: Path, **changes: Any) -> None:
    path = folder / "model_index.json"
    index = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in index.items() if value is not ...}))


def dtypes(pipe: DiffusionPipeline) -> dict[str, Any]:
    return {
        name: part.dtype
        for name, part in pipe.components.items()
        if isinstance(part, torch.nn.Module)
    }


def same_weights(a: Any, b: Any) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(
        torch.equal(first[key], second[key]) for key in first
    )


# --- what a pipeline is ---------------------------------------------------------------------------


def test_components_are_attributes_and_folders(repo: Path) -> None:
    pipe = Plain.from_pretrained(repo)
    assert list(pipe.components) == [*NAMES, *Plain._optional_components]
    for name in NAMES:
        assert getattr(pipe, name) is pipe.components[name]
        assert (repo / name).is_dir()
    assert [type(pipe.components[name]).__name__ for name in NAMES] == [
        *(
            "AutoencoderKL",
            "CLIPTextModel",
            "CLIPTokenizer",
            "UNet2DConditionModel",
            "PNDMScheduler",
        )
    ]
    assert pipe.safety_checker is None
    assert not any(pipe.components[name].training for name in ("vae", "text_encoder", "unet"))
    assert pipe.unet.config.sample_size == 64
    assert pipe.name_or_path == str(repo)
    with pytest.raises(AttributeError, match="'Plain' object has no attribute 'sampler'"):
        pipe.sampler  # noqa: B018


def test_arguments_have_diffusers_names_and_order(repo: Path, tmp_path: Path) -> None:
    pipe = Plain.from_pretrained(pretrained_model_name_or_path=repo)
    pipe.save_pretrained(tmp_path / "bin", False, "fp16")
    assert (tmp_path / "bin" / "unet" / f"{D}.fp16.bin").is_file()
    pipe.save_pretrained(save_directory=tmp_path / "all")
    for kind, name in (
        (UNet2DConditionModel, "unet"),
        (CLIPTokenizer, "tokenizer"),
        (DDIMScheduler, "scheduler"),
    ):
        part = kind.from_pretrained(pretrained_model_name_or_path=repo, subfolder=name)
        part.save_pretrained(save_directory=tmp_path / name)
        assert {path.name for path in (tmp_path / name).iterdir()} == {
            path.name for path in (tmp_path / "all" / name).iterdir()
        }


def test_parameters_and_components_make_a_pipeline(repo: Path) -> None:
    pipe = Plain.from_pretrained(repo, requires_safety_checker=False)
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(repo, requires_safety_checker=False)
    assert pipe.parameters == {"requires_safety_checker": False}
    assert pipe.parameters.items() <= theirs.parameters.items()
    other = Plain(**pipe.components, **pipe.parameters)
    assert other.unet is pipe.unet
    assert other.config == pipe.config


def test_configs_alone_are_loaded_and_saved(repo: Path, tmp_path: Path) -> None:
    kinds: list[tuple[Any, str | None]] = [
        (UNet2DConditionModel, "unet"),
        (DDIMScheduler, "scheduler"),
        (Plain, None),
    ]
    for kind, name in kinds:
        config, unused = kind.load_config(
            repo, subfolder=name, return_unused_kwargs=True, strength=1
        )
        assert unused == {"strength": 1}
        assert config == kind.load_config(repo, subfolder=name)
        assert config == json.loads((repo / (name or "") / kind.config_name).read_text())
        theirs = getattr(diffusers, kind.__name__.replace("Plain", "StableDiffusionPipeline"))
        assert {**theirs.load_config(repo, subfolder=name)} == config
        made = Plain.from_pretrained(repo) if name is None else kind.from_config(config)
        made.save_config(tmp_path / kind.__name__)
        assert [path.name for path in (tmp_path / kind.__name__).iterdir()] == [kind.config_name]
        saved = kind.load_config(tmp_path / kind.__name__)
        assert saved["_class_name"] == kind.__name__
        assert all(saved[key] == value for key, value in config.items() if not key.startswith("_"))


def test_it_prints_its_components(repo: Path) -> None:
    printed = repr(Plain.from_pretrained(repo))
    assert printed.startswith("Plain {")
    shown = json.loads(printed.removeprefix("Plain "))
    assert shown["unet"] == ["diffusers", "UNet2DConditionModel"]
    assert shown["tokenizer"] == ["transformers", "CLIPTokenizer"]
    assert shown["image_encoder"] == [None, None]
    assert shown["requires_safety_checker"] is True


def test_the_config_follows_assignment(repo: Path, tmp_path: Path) -> None:
    pipe: Any = Plain.from_pretrained(repo)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    assert pipe.config["scheduler"] == ["diffusers", "EulerDiscreteScheduler"]
    assert pipe.config.scheduler[1] == pipe.components["scheduler"].__class__.__name__
    pipe.text_encoder = None
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "EulerDiscreteScheduler"]
    assert index["text_encoder"] == [None, None]
    assert Plain.from_pretrained(tmp_path).text_encoder is None


def test_moving_and_casting(repo: Path) -> None:
    pipe = Plain.from_pretrained(repo)
    assert (pipe.device, pipe.dtype) == (torch.device("cpu"), torch.float32)
    assert pipe.to(torch.float16) is pipe
    assert set(dtypes(pipe).values()) == {torch.float16}
    assert pipe.to("cpu", torch.bfloat16).dtype == torch.bfloat16
    assert pipe.to(device="meta", dtype=torch.float32).device.type == "meta"
    for wrong in ((torch.float16, "cpu"), ("cpu", "cpu"), ("cpu", torch.float16, 1)):
        with pytest.raises(
            ValueError, match=r"to\(\) takes a device, a dtype, or a device and a dtype"
        ):
            pipe.to(*wrong)


def test_progress_bars(capsys: pytest.CaptureFixture[str]) -> None:
    pipe = Other(None, None)
    assert list(pipe.progress_bar(range(3))) == [0, 1, 2]
    assert capsys.readouterr().err == ""  # not a terminal
    pipe.set_progress_bar_config(disable=False, desc="steps")
    with pipe.progress_bar(total=2) as bar:
        bar.update()
    assert "steps" in capsys.readouterr().err


# --- loading --------------------------------------------------------------------------------------


def test_we_load_what_diffusers_saves(repo: Path, tmp_path: Path) -> None:
    """Prefixless keys, `dtype` in configs, `tokenizer.json` alone: what transformers 5 writes."""
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(repo, safety_checker=None)
    theirs.save_pretrained(tmp_path / "theirs")
    assert {path.name for path in (tmp_path / "theirs" / "tokenizer").iterdir()} & {
        "tokenizer.json"
    }
    ours, again = Plain.from_pretrained(repo), Plain.from_pretrained(tmp_path / "theirs")
    for name in ("vae", "text_encoder", "unet"):
        assert same_weights(ours.components[name], again.components[name])
    assert ours.tokenizer("a cat").input_ids == again.tokenizer("a cat").input_ids
    assert again.scheduler.config.skip_prk_steps


@pytest.mark.parametrize("options", [{}, {"variant": "fp16"}, {"max_shard_size": "500KB"}])
def test_diffusers_loads_what_we_save(repo: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    pipe = Plain.from_pretrained(repo)
    pipe.save_pretrained(tmp_path / "ours", **options)
    variant = options.get("variant")
    again = Plain.from_pretrained(tmp_path / "ours", variant=variant)
    edit_index(tmp_path / "ours", _class_name="StableDiffusionPipeline")
    theirs = diffusers.DiffusionPipeline.from_pretrained(
        tmp_path / "ours", safety_checker=None, variant=variant
    )
    for name in ("vae", "unet", "text_encoder"):
        assert same_weights(pipe.components[name], again.components[name])
    for name in ("vae", "unet"):
        assert same_weights(pipe.components[name], theirs.components[name])
    found = {
        pipe.text_encoder.rename(key): value
        for key, value in theirs.text_encoder.state_dict().items()
    }
    assert all(
        torch.equal(tensor, found[key]) for key, tensor in pipe.text_encoder.state_dict().items()
    )
    assert theirs.tokenizer("a cat").input_ids == pipe.tokenizer("a cat").input_ids
    assert type(theirs.scheduler).__name__ == "PNDMScheduler"


def test_aliases_of_classes(copy: Path) -> None:
    edit_index(
        copy,
        tokenizer=["transformers", "CLIPTokenizerFast"],
        unet=["diffusers", "FlashPackUNet2DConditionModel"],
    )
    pipe = Plain.from_pretrained(copy)
    assert isinstance(pipe.tokenizer, CLIPTokenizer)
    assert isinstance(pipe.unet, UNet2DConditionModel)
    assert pipe.config.tokenizer == ["transformers", "CLIPTokenizer"]


@pytest.mark.parametrize(
    "entry",
    [
        ["os", "system"],
        ["diffusers", "StableDiffusionPipeline"],
        ["weightport", "convert"],
        ["json", "loads"],
    ],
)
def test_nothing_is_imported_because_a_file_names_it(copy: Path, entry: list[str]) -> None:
    edit_index(copy, unet=entry)
    with pytest.raises(
        ValueError, match=rf"the runtime has no {entry[1]} of {entry[0]}; pass unet="
    ):
        Plain.from_pretrained(copy)
    edit_index(copy, unet=["diffusers", "UNet2DConditionModel"], image_encoder=entry)
    with pytest.warns(UserWarning, match=f"image_encoder is left out: no {entry[1]}"):
        assert Plain.from_pretrained(copy).image_encoder is None


@pytest.mark.parametrize("name", ["NoSuchPipeline", "os.system", None, 3, ["a"], [], {"a": 1}])
def test_the_class_must_be_known(copy: Path, name: Any) -> None:
    edit_index(copy, _class_name=name)
    with pytest.raises(ValueError, match="the runtime has no pipeline"):
        DiffusionPipeline.from_pretrained(copy)


def test_missing_things(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"unet: there is no model_index\.json in it"):
        Plain.from_pretrained(copy / "unet")
    (copy / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(OSError, match=r"copy/scheduler: there is no scheduler_config\.json in it"):
        Plain.from_pretrained(copy)
    shutil.rmtree(copy / "vae")
    with pytest.raises(OSError, match=rf"copy/vae: there is no {D}\.safetensors"):
        Plain.from_pretrained(copy)
    edit_index(copy, vae=..., unet=...)
    with pytest.raises(ValueError, match="has no vae, unet for Plain"):
        Plain.from_pretrained(copy)


# --- components that are passed in ----------------------------------------------------------------


def test_components_passed_in_are_not_loaded(copy: Path, repo: Path) -> None:
    vae = AutoencoderKL.from_pretrained(repo, subfolder="vae", dtype=torch.float16)
    scheduler = EulerDiscreteScheduler.from_pretrained(repo, subfolder="scheduler")
    for name in ("vae", "scheduler", "text_encoder"):
        shutil.rmtree(copy / name)
    pipe = Plain.from_pretrained(
        copy, vae=vae, scheduler=scheduler, text_encoder=None, requires_safety_checker=False
    )
    assert pipe.vae is vae
    assert pipe.vae.dtype == torch.float16
    assert pipe.scheduler is scheduler
    assert pipe.text_encoder is None
    assert pipe.config.requires_safety_checker is False


def test_unknown_names_are_ignored_with_a_warning(repo: Path) -> None:
    with pytest.warns(UserWarning, match="Plain takes no sampler, use_onnx: ignored"):
        Plain.from_pretrained(repo, sampler=1, use_onnx=True)


def test_components_of_a_wrong_kind(repo: Path) -> None:
    pipe = Plain.from_pretrained(repo)
    wrong: list[tuple[str, Any]] = [
        ("unet", pipe.scheduler),
        ("unet", pipe.vae),
        ("scheduler", pipe.unet),
        ("scheduler", "euler"),
        ("tokenizer", pipe.text_encoder),
        ("tokenizer", pipe.scheduler),
        ("text_encoder", pipe.tokenizer),
    ]
    for name, value in wrong:
        with pytest.raises(
            ValueError, match=f"{name}: a {type(value).__name__} is given, but a .* is expected"
        ):
            Plain.from_pretrained(repo, **{name: value})


def test_components_of_diffusers_are_welcome(repo: Path, tmp_path: Path) -> None:
    scheduler = diffusers.DDIMScheduler.from_pretrained(repo, subfolder="scheduler")
    unet = diffusers.UNet2DConditionModel.from_pretrained(repo, subfolder="unet")
    pipe = Plain.from_pretrained(repo, scheduler=scheduler, unet=unet)
    assert pipe.scheduler is scheduler
    assert pipe.config.scheduler == ["diffusers", "DDIMScheduler"]
    pipe.save_pretrained(tmp_path, variant="fp16")
    again = Plain.from_pretrained(tmp_path, variant="fp16")
    assert isinstance(again.unet, UNet2DConditionModel)
    assert isinstance(again.scheduler, DDIMScheduler)
    assert same_weights(again.unet, unet)


# --- sharing --------------------------------------------------------------------------------------


def test_sharing_components(repo: Path) -> None:
    pipe = Plain.from_pretrained(repo, dtype={"unet": torch.bfloat16, "default": torch.float32})
    before = dtypes(pipe)
    again = Plain(**pipe.components)
    other = Other.from_pipe(pipe, strength=0.25)
    assert other.unet is pipe.unet is again.unet
    assert other.config.strength == 0.25
    assert Other.from_pipe(other).config.strength == 0.25
    same = DiffusionPipeline.from_pipe(pipe)
    assert type(same) is Plain
    assert all(same.components[name] is pipe.components[name] for name in pipe.components)
    assert dtypes(same) == dtypes(pipe) == before  # upstream casts what is shared to float32
    unet = UNet2DConditionModel.from_pretrained(repo, subfolder="unet")
    assert Plain.from_pipe(pipe, unet=unet, text_encoder=None).unet is unet
    with pytest.raises(ValueError, match="Other has no vae, text_encoder, tokenizer for Plain"):
        Plain.from_pipe(other)
    assert (
        Plain.from_pipe(other, vae=pipe.vae, text_encoder=None, tokenizer=pipe.tokenizer).unet
        is pipe.unet
    )
    with pytest.warns(UserWarning, match="Other takes no torch_dtype: ignored"):
        Other.from_pipe(pipe, torch_dtype=torch.float16)
    assert dtypes(pipe) == before


# --- variants and dtypes --------------------------------------------------------------------------


def test_a_variant_beside_the_main_weights(repo: Path, tmp_path: Path) -> None:
    pipe = Plain.from_pretrained(repo)
    pipe.save_pretrained(tmp_path)
    configs = {path: path.read_text() for path in tmp_path.rglob("*.json")}
    with torch.no_grad():
        for name in dtypes(pipe):
            for parameter in pipe.components[name].half().parameters():
                parameter += 1
    pipe.save_pretrained(tmp_path, variant="fp16")
    assert {path: path.read_text() for path in tmp_path.rglob("*.json")} == configs
    weights = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.safetensors")}
    assert weights == {
        *(f"{name}/{D}{part}.safetensors" for name in ("unet", "vae") for part in ("", ".fp16")),
        *(f"text_encoder/model{part}.safetensors" for part in ("", ".fp16")),
    }
    main, fp16 = Plain.from_pretrained(tmp_path), Plain.from_pretrained(tmp_path, variant="fp16")
    assert (
        set(dtypes(main).values()) == set(dtypes(fp16).values()) == {torch.float32}
    )  # upstream: fp16 text encoder
    assert same_weights(main.unet, Plain.from_pretrained(repo).unet)
    assert same_weights(fp16.unet, pipe.unet.float())
    assert set(dtypes(Plain.from_pretrained(tmp_path, variant="fp16", dtype="auto")).values()) == {
        torch.float16
    }


def test_only_a_variant(repo: Path, tmp_path: Path) -> None:
    Plain.from_pretrained(repo).save_pretrained(tmp_path, variant="fp16")
    with pytest.raises(
        OSError, match=rf"vae: there is no {D}\.safetensors, but there is variant='fp16'"
    ):
        Plain.from_pretrained(tmp_path)


def test_a_variant_of_one_component(copy: Path) -> None:
    (copy / "LICENSE").write_text("")
    (copy / "unet" / "LICENSE").write_text("")  # upstream: IndexError
    unet = UNet2DConditionModel.from_pretrained(copy, subfolder="unet")
    with torch.no_grad():
        unet.conv_in.weight.zero_()
    unet.save_pretrained(copy / "unet", variant="non_ema")
    with pytest.warns(
        UserWarning, match="no non_ema of vae, text_encoder; the main weights are loaded"
    ):
        pipe = Plain.from_pretrained(copy, variant="non_ema")
    assert not pipe.unet.conv_in.weight.any()
    model = UNet2DConditionModel.from_pretrained(copy, subfolder="unet", variant="non_ema")
    assert not model.conv_in.weight.any()


@pytest.mark.parametrize("variant", ["fp1", "bf16", "../x", "safetensors"])
def test_a_variant_that_nothing_has(copy: Path, variant: str) -> None:
    UNet2DConditionModel.from_pretrained(copy, subfolder="unet").save_pretrained(
        copy / "unet", variant="fp16"
    )
    with pytest.raises(ValueError, match=rf"no component has variant='{variant}'; there are fp16"):
        Plain.from_pretrained(copy, variant=variant)


def test_formats_are_chosen_for_each_component(copy: Path) -> None:
    """Upstream takes `.bin` files of all components if one has nothing else."""
    unet = UNet2DConditionModel.from_pretrained(copy, subfolder="unet")
    unet.save_pretrained(copy / "unet", safe_serialization=False)
    assert [path.suffix for path in (copy / "unet").glob(f"{D}*")] == [".bin"]
    (copy / "vae" / f"{D}.bin").write_bytes(b"never opened")
    assert same_weights(Plain.from_pretrained(copy).unet, unet)
    with pytest.raises(OSError, match=r"unet: .* the weights are in the other format"):
        Plain.from_pretrained(copy, use_safetensors=True)


def test_dtypes_of_components(repo: Path) -> None:
    half, brain, single = torch.float16, torch.bfloat16, torch.float32
    assert set(dtypes(Plain.from_pretrained(repo)).values()) == {single}
    assert set(dtypes(Plain.from_pretrained(repo, torch_dtype=half)).values()) == {half}
    assert dtypes(Plain.from_pretrained(repo, dtype={"unet": brain, "default": half})) == {
        "vae": half,
        "text_encoder": half,
        "unet": brain,
    }
    assert dtypes(Plain.from_pretrained(repo, dtype={"unet": brain, "vae": "auto"})) == {
        "vae": single,
        "text_encoder": single,
        "unet": brain,
    }
    with pytest.raises(ValueError, match="two names of one argument"):
        Plain.from_pretrained(repo, dtype={"unet": brain}, torch_dtype=half)
    with pytest.warns(UserWarning, match=r"dtype: Plain has no unett: ignored"):
        assert set(dtypes(Plain.from_pretrained(repo, dtype={"unett": half})).values()) == {single}
    with pytest.warns(UserWarning, match=r"is not a torch\.dtype"):
        assert set(dtypes(Plain.from_pretrained(repo, dtype="half")).values()) == {single}
    assert Plain.from_pretrained(repo, device_map="meta").device.type == "meta"
    with pytest.raises(ValueError, match="device_map = 'balanced' is not supported"):
        Plain.from_pretrained(repo, device_map="balanced")


# --- saving ---------------------------------------------------------------------------------------


def test_saving_over_an_earlier_save(repo: Path, tmp_path: Path) -> None:
    pipe = Plain.from_pretrained(repo)
    pipe.save_pretrained(tmp_path / "out", max_shard_size="500KB")
    (tmp_path / "out" / "README.md").write_text("mine")
    again = Plain.from_pretrained(tmp_path / "out")
    again.save_pretrained(tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*-of-*"))
    assert not list((tmp_path / "out").rglob("*.index.json"))
    assert (tmp_path / "out" / "README.md").read_text() == "mine"
    assert same_weights(pipe.unet, Plain.from_pretrained(tmp_path / "out").unet)


def test_a_failed_save_leaves_nothing(repo: Path, tmp_path: Path) -> None:
    pipe: Any = Plain.from_pretrained(repo)
    pipe.scheduler = object()
    with pytest.raises(ValueError, match="scheduler: a object cannot be saved"):
        pipe.save_pretrained(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_when_killed(repo: Path, tmp_path: Path) -> None:
    """Killed between two components, there is no folder of the name that was asked for."""
    code = """
import os, signal, sys
from weightport import AutoencoderKL, DiffusionPipeline

class Kill:
    def save_pretrained(self, folder):
        os.kill(os.getpid(), signal.SIGKILL)

pipe = DiffusionPipeline()
pipe.register_modules(vae=AutoencoderKL.from_pretrained(sys.argv[1], subfolder="vae"), unet=Kill())
pipe.save_pretrained(sys.argv[2])
"""
    ended = subprocess.run([sys.executable, "-c", code, repo, tmp_path / "out"], check=False)
    assert ended.returncode == -9
    assert not (tmp_path / "out").exists()


# --- configs of 2022 ------------------------------------------------------------------------------


def test_old_configs() -> None:
    unet = UNet2DConditionModel.from_config(UNET)
    for version, size, expected in (
        ("0.8.1", 32, 64),
        ("0.8.1", 96, 96),
        ("0.9.0", 32, 32),
        ("1.0.0", 32, 32),
        ("0.8.1", [32, 48], [32, 48]),
    ):
        unet.config = Config({**unet.config, "_diffusers_version": version, "sample_size": size})
        correct_sample_size(unet)
        assert unet.config.sample_size == expected
    correct_sample_size(None)


def test_nothing_warns(repo: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Plain.from_pretrained(repo, dtype=torch.float16).save_pretrained(tmp_path)
        CLIPTextModel.from_pretrained(tmp_path / "text_encoder")


@pytest.mark.parametrize("edge", [10**9, -1, [10**9, 8]])
def test_no_config_decides_how_large_images_are(repo: Path, edge: Any) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(repo, requires_safety_checker=False)
    pipe.unet.config = Config({**pipe.unet.config, "sample_size": edge})
    words = torch.zeros(1, 77, 32)
    asked: dict[str, Any] = {"prompt_embeds": words, "negative_prompt_embeds": words}
    with pytest.raises(ValueError, match=r"sample_size.*give height and width"):
        pipe(**asked, num_inference_steps=1)
    image = pipe(**asked, num_inference_steps=1, height=8, width=8, output_type="np").images
    assert image.shape == (1, 8, 8, 3)
