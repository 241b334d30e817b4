"""Models from folders and back: layouts of both generations, variants, shards, dtypes; diffusers is
the oracle."""

from __future__ import annotations

import copy
import gc
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import weightport
from weightport import (
    AutoencoderKL,
    AutoModel,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    ControlNetModel,
    UNet2DConditionModel,
)

from ...support.synthetic import write_controlnet, write_repo

D = "diffusion_pytorch_model"


def state(model: Any) -> dict[str, Any]:
    return dict(model.state_dict())


def equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a
    )


@pytest.fixture
def vae(sd1_repo: Path, tmp_path: Path) -> Path:
    """A copy of a VAE, to break."""
    return Path(shutil.copytree(sd1_repo / "vae", tmp_path / "vae"))


@pytest.fixture(scope="module")
def xl_repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_repo(tmp_path_factory.mktemp("xl") / "repo", "sdxl", components=["text_encoder_2"])


# --- against diffusers and transformers -----------------------------------------------------------

KINDS: dict[str, tuple[type[Any], type[Any]]] = {
    "unet": (UNet2DConditionModel, diffusers.UNet2DConditionModel),
    "vae": (AutoencoderKL, diffusers.AutoencoderKL),
    "text_encoder": (CLIPTextModel, transformers.CLIPTextModel),
    "text_encoder_2": (CLIPTextModelWithProjection, transformers.CLIPTextModelWithProjection),
    "controlnet": (ControlNetModel, diffusers.ControlNetModel),
}


@pytest.fixture(params=KINDS)
def both(
    request: pytest.FixtureRequest, sd1_repo: Path, xl_repo: Path, tmp_path: Path
) -> tuple[Any, Any, Path]:
    """Our class, the oracle's, and a folder of such a model."""
    name = request.param
    if name == "controlnet":
        return *KINDS[name], write_controlnet(tmp_path / "controlnet", "sd1")
    return *KINDS[name], (xl_repo if name == "text_encoder_2" else sd1_repo) / name


def strictly(kind: Any, folder: Path, **options: Any) -> Any:
    """Load with the oracle, which would only warn of keys that do not fit."""
    model, info = kind.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


SHARDED_VARIANT = {"variant": "fp16", "max_shard_size": "200KB"}


@pytest.mark.parametrize(
    "options", [{}, {"variant": "fp16"}, {"max_shard_size": "200KB"}, SHARDED_VARIANT]
)
def test_they_load_what_we_save(
    both: tuple[Any, Any, Path], tmp_path: Path, options: dict[str, Any]
) -> None:
    ours, theirs, folder = both
    model = ours.from_pretrained(folder)
    model.save_pretrained(tmp_path / "saved", **options)
    variant = options.get("variant")
    for name in [
        path.name for path in (tmp_path / "saved").iterdir() if path.name != "config.json"
    ]:
        assert variant is None or re.search(rf"\.{variant}[.-]", name)
    if "max_shard_size" in options:
        assert len(list((tmp_path / "saved").glob("*-of-*.safetensors"))) > 1
    other = strictly(theirs, tmp_path / "saved", variant=variant)
    again = ours.from_pretrained(tmp_path / "saved", variant=variant)
    assert equal(state(model), state(again))
    theirs_state = {ours.rename(key): tensor for key, tensor in other.state_dict().items()}
    theirs_state.pop(None, None)
    assert equal(state(model), theirs_state)


@pytest.mark.parametrize(
    "options", [{}, {"variant": "fp16"}, {"max_shard_size": "200KB"}, SHARDED_VARIANT]
)
def test_we_load_what_they_save(
    both: tuple[Any, Any, Path], tmp_path: Path, options: dict[str, Any]
) -> None:
    """transformers 5 writes no `text_model.`, and `dtype` into the config."""
    ours, theirs, folder = both
    strictly(theirs, folder).save_pretrained(tmp_path / "saved", **options)
    found = ours.from_pretrained(tmp_path / "saved", variant=options.get("variant"))
    assert equal(state(ours.from_pretrained(folder)), state(found))


def test_bin_files_are_written_for_diffusers(sd1_repo: Path, tmp_path: Path) -> None:
    model = UNet2DConditionModel.from_pretrained(sd1_repo, subfolder="unet")
    model.save_pretrained(tmp_path, safe_serialization=False, max_shard_size="2MB")
    assert {path.suffix for path in tmp_path.iterdir()} == {".bin", ".json"}
    assert equal(
        state(model), state(UNet2DConditionModel.from_pretrained(tmp_path))
    )  # diffusers #14811
    strictly(diffusers.UNet2DConditionModel, tmp_path, use_safetensors=False)
    encoder = CLIPTextModel.from_pretrained(sd1_repo, subfolder="text_encoder")
    encoder.save_pretrained(tmp_path / "text", safe_serialization=False)
    assert (tmp_path / "text" / "model.safetensors").is_file()


# --- layouts --------------------------------------------------------------------------------------


def test_subfolder_or_root(sd1_repo: Path) -> None:
    model = UNet2DConditionModel.from_pretrained(sd1_repo, subfolder="unet")
    assert equal(state(model), state(UNet2DConditionModel.from_pretrained(str(sd1_repo / "unet"))))
    assert equal(
        state(model),
        state(UNet2DConditionModel.from_pretrained(sd1_repo / "unet", subfolder="unet")),
    )
    assert not model.training
    assert model.name_or_path == str(sd1_repo / "unet")
    assert (model.dtype, model.device) == (torch.float32, torch.device("cpu"))
    assert isinstance(model.config.sample_size, int)


def test_auto_model_finds_the_class(sd1_repo: Path, xl_repo: Path, tmp_path: Path) -> None:
    for name in ("unet", "vae", "text_encoder"):
        kind = KINDS[name][0]
        kind.from_pretrained(sd1_repo, subfolder=name).save_pretrained(tmp_path / name)
        model = AutoModel.from_pretrained(tmp_path, subfolder=name, dtype=torch.float16)
        assert type(model) is kind
        assert model.dtype == torch.float16
    CLIPTextModelWithProjection.from_pretrained(xl_repo / "text_encoder_2").save_pretrained(
        tmp_path / "text_encoder"
    )
    assert type(AutoModel.from_pretrained(tmp_path / "text_encoder")) is CLIPTextModelWithProjection


@pytest.mark.parametrize(
    "config", [{}, {"_class_name": "system"}, {"architectures": []}, {"_class_name": ["a"]}]
)
def test_auto_model_knows_its_classes_only(vae: Path, config: dict[str, Any]) -> None:
    (vae / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="not a model of the runtime"):
        AutoModel.from_pretrained(vae)


@pytest.mark.parametrize("four_dimensions", [False, True])
def test_old_names_in_the_vae(vae: Path, four_dimensions: bool) -> None:
    before = state(AutoencoderKL.from_pretrained(vae))
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for key, tensor in load_file(vae / f"{D}.safetensors").items():
        for new, name in old.items():
            if f"attentions.0.{new}." in key:
                key = key.replace(new, name)
                tensor = (
                    tensor[:, :, None, None] if four_dimensions and tensor.ndim == 2 else tensor
                )
        renamed[key] = tensor
    assert sum("proj_attn" in key for key in renamed) == 4
    save_file(renamed, vae / f"{D}.safetensors")
    assert equal(before, state(AutoencoderKL.from_pretrained(vae)))
    half = dict(list(renamed.items())[:50])
    save_file(half, vae / f"{D}-00001-of-00002.safetensors")  # in shards too, unlike upstream
    save_file(
        {key: renamed[key] for key in renamed.keys() - half.keys()},
        vae / f"{D}-00002-of-00002.safetensors",
    )
    weight_map = {key: f"{D}-0000{1 if key in half else 2}-of-00002.safetensors" for key in renamed}
    (vae / f"{D}.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (vae / f"{D}.safetensors").unlink()
    assert equal(before, state(AutoencoderKL.from_pretrained(vae)))


def test_text_encoders_of_any_age(sd1_repo: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sd1_repo / "text_encoder", tmp_path / "text_encoder"))
    before = state(CLIPTextModel.from_pretrained(folder))
    weights = load_file(folder / "model.safetensors")
    weights["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    weights["text_projection.weight"] = torch.zeros(64, 64)
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    loaded: Any = CLIPTextModel.from_pretrained(folder, output_loading_info=True)
    model, info = loaded
    assert equal(before, state(model))
    assert sorted(info.pop("unexpected_keys")) == [
        "text_model.embeddings.position_ids",
        "text_projection.weight",
    ]
    assert info == {"missing_keys": [], "mismatched_keys": [], "error_msgs": []}


def test_legacy_names_of_shards(vae: Path) -> None:
    model = AutoencoderKL.from_pretrained(vae)
    model.save_pretrained(vae, variant="fp16", max_shard_size="1MB")
    index = json.loads((vae / f"{D}.safetensors.index.fp16.json").read_text())
    legacy = {
        name: name.replace(".fp16-", "-").replace(".safetensors", ".fp16.safetensors")
        for name in set(index["weight_map"].values())
    }
    for name, new in legacy.items():
        (vae / name).rename(vae / new)
    index["weight_map"] = {key: legacy[name] for key, name in index["weight_map"].items()}
    (vae / f"{D}.safetensors.index.fp16.json").unlink()
    (vae / f"{D}.safetensors.fp16.index.json").write_text(json.dumps(index))
    assert equal(state(model), state(AutoencoderKL.from_pretrained(vae, variant="fp16")))
    model.save_pretrained(vae, variant="fp16")
    assert [path.name for path in sorted(vae.glob("*fp16*"))] == [f"{D}.fp16.safetensors"]


# --- options --------------------------------------------------------------------------------------


def test_dtypes(sd1_repo: Path, tmp_path: Path) -> None:
    folder = sd1_repo / "vae"
    half = AutoencoderKL.from_pretrained(folder, dtype=torch.float16)
    assert equal(
        state(half), state(AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float16))
    )
    assert half.dtype == torch.float16
    half.save_pretrained(tmp_path, variant="fp16")
    assert AutoencoderKL.from_pretrained(tmp_path, variant="fp16").dtype == torch.float32
    assert (
        AutoencoderKL.from_pretrained(tmp_path, variant="fp16", dtype="auto").dtype == torch.float16
    )
    with pytest.raises(ValueError, match="two names of one argument"):
        AutoencoderKL.from_pretrained(folder, dtype=torch.float16, torch_dtype=torch.float16)
    with pytest.raises(ValueError, match="not a floating-point dtype"):
        AutoencoderKL.from_pretrained(folder, dtype=torch.int8)
    with pytest.warns(UserWarning, match=r"not a torch\.dtype"):
        assert AutoencoderKL.from_pretrained(folder, dtype="float16").dtype == torch.float32


def test_a_variant_leaves_the_config_alone(sd1_repo: Path, tmp_path: Path) -> None:
    """transformers writes the dtype of the variant, and loads the main weights in it: float16
    beside float32."""
    encoder = CLIPTextModel.from_pretrained(sd1_repo / "text_encoder")
    encoder.save_pretrained(tmp_path)
    before = (tmp_path / "config.json").read_text()
    encoder.half().save_pretrained(tmp_path, variant="fp16")
    assert (tmp_path / "config.json").read_text() == before
    assert CLIPTextModel.from_pretrained(tmp_path).dtype == torch.float32
    assert transformers.CLIPTextModel.from_pretrained(tmp_path).dtype == torch.float32
    (tmp_path / "config.json").write_text(json.dumps({**json.loads(before), "dtype": "float16"}))
    assert CLIPTextModel.from_pretrained(tmp_path).dtype == torch.float32


def test_a_model_alone_does_not_fall_back(vae: Path) -> None:
    with pytest.raises(
        OSError, match=rf"vae: there is no {D}\.bf16\.safetensors, but there is variant=None"
    ):
        AutoencoderKL.from_pretrained(vae, variant="bf16")
    (vae / f"{D}.safetensors").rename(vae / f"{D}.fp16.safetensors")
    with pytest.raises(
        OSError, match=rf"vae: there is no {D}\.safetensors, but there is variant='fp16'"
    ):
        AutoencoderKL.from_pretrained(vae)


def test_formats(vae: Path) -> None:
    model = AutoencoderKL.from_pretrained(vae, use_safetensors=True)
    with pytest.raises(
        OSError, match=rf"there is no {D}\.bin; the weights are in the other format"
    ):
        AutoencoderKL.from_pretrained(vae, use_safetensors=False)
    torch.save({key: tensor + 1 for key, tensor in state(model).items()}, vae / f"{D}.bin")
    assert equal(state(model), state(AutoencoderKL.from_pretrained(vae)))
    assert not equal(state(model), state(AutoencoderKL.from_pretrained(vae, use_safetensors=False)))


def test_devices(vae: Path) -> None:
    assert AutoencoderKL.from_pretrained(vae, device_map="cpu").device.type == "cpu"
    assert AutoencoderKL.from_pretrained(vae, device_map=torch.device("meta")).device.type == "meta"
    for device_map in ("auto", "balanced", {"": 0}):
        with pytest.raises(ValueError, match="give one device"):
            AutoencoderKL.from_pretrained(vae, device_map=device_map)


def test_disable_mmap(vae: Path) -> None:
    """What is read into memory does not change with the file."""
    model = AutoencoderKL.from_pretrained(vae, disable_mmap=True)
    before = {key: tensor.clone() for key, tensor in state(model).items()}
    path = vae / f"{D}.safetensors"
    path.write_bytes(bytes(path.stat().st_size))
    assert equal(before, state(model))


# --- what is wrong --------------------------------------------------------------------------------


def test_an_unknown_option_is_told_by_name(vae: Path) -> None:
    with pytest.raises(
        TypeError, match=r"AutoencoderKL\.from_pretrained\(\) takes no dtyp, cache$"
    ):
        AutoencoderKL.from_pretrained(vae, dtyp=torch.float16, cache="here")


@pytest.mark.parametrize("enabled", [True, False])
def test_loading_leaves_the_collector_as_it_was(
    vae: Path, enabled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    during = []

    def rename(key: str) -> str:
        during.append(gc.isenabled())
        return key

    monkeypatch.setattr(AutoencoderKL, "rename", rename)
    (gc.enable if enabled else gc.disable)()
    try:
        AutoencoderKL.from_pretrained(vae)
        assert gc.isenabled() == enabled
        with pytest.raises(ValueError, match="unknown option"):
            ControlNetModel.from_pretrained(vae)  # fails within
        assert gc.isenabled() == enabled
    finally:
        gc.enable()
    assert during
    assert not any(during)


def test_a_config_is_read_only(vae: Path) -> None:
    """Upstream a config can be changed, and nobody notices."""
    model = AutoencoderKL.from_pretrained(vae)
    before = dict(model.config)
    for change in (
        lambda c: c.update(scaling_factor=2),
        lambda c: c.pop("scaling_factor"),
        lambda c: c.__setitem__("scaling_factor", 2),
        lambda c: setattr(c, "scaling_factor", 2),
        lambda c: c.__ior__({"scaling_factor": 2}),
        lambda c: c.__delitem__("scaling_factor"),
        lambda c: c.setdefault("new", 2),
        lambda c: c.clear(),
    ):
        with pytest.raises(TypeError, match="read-only"):
            change(model.config)
        assert model.config == before
    for same in (
        copy.deepcopy(model).config,
        pickle.loads(pickle.dumps(model.config)),
        copy.copy(model.config),
    ):
        assert (type(same), same) == (type(model.config), before)
    assert (
        AutoencoderKL.from_config({**model.config, "scaling_factor": 2}).config.scaling_factor == 2
    )


def test_missing_things(vae: Path, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nowhere: there is no such folder"):
        AutoencoderKL.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(OSError, match=r"a file, not a folder; `weightport convert`"):
        AutoencoderKL.from_pretrained(vae / f"{D}.safetensors")
    with pytest.raises(ValueError, match="a/b/c: neither a folder nor the id of a repository"):
        AutoencoderKL.from_pretrained("a/b/c")
    (vae / "config.json").rename(vae / "x.json")
    with pytest.raises(OSError, match=r"vae: there is no config\.json in it"):
        AutoencoderKL.from_pretrained(vae)
    (vae / "config.json").write_text("[")
    with pytest.raises(ValueError, match=r"vae/config\.json: the JSON in it cannot be read"):
        AutoencoderKL.from_pretrained(vae)


def test_no_tensor_stays_without_weights(vae: Path) -> None:
    """Upstream leaves them on meta, or uninitialised."""
    weights = load_file(vae / f"{D}.safetensors")
    del weights["encoder.conv_in.weight"]
    save_file(weights, vae / f"{D}.safetensors")
    with pytest.raises(
        ValueError, match=r"does not fit AutoencoderKL: missing encoder\.conv_in\.weight$"
    ):
        AutoencoderKL.from_pretrained(vae)


def test_shards(vae: Path) -> None:
    model = AutoencoderKL.from_pretrained(vae)
    model.save_pretrained(vae, max_shard_size="1MB")
    assert not (vae / f"{D}.safetensors").exists()
    index = vae / f"{D}.safetensors.index.json"
    shards = sorted(vae.glob("*-of-*"))
    assert shards[0].name == f"{D}-00001-of-{len(shards):05}.safetensors"
    assert json.loads(index.read_text())["metadata"]["total_size"] == sum(
        t.nbytes for t in state(model).values()
    )
    shards[1].rename(vae / "elsewhere")
    with pytest.raises(OSError, match=rf"index\.json names {shards[1].name}, which is missing"):
        AutoencoderKL.from_pretrained(vae)
    content = json.loads(index.read_text())
    content["weight_map"]["encoder.conv_in.weight"] = "../vae/elsewhere"
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"is not a plain \.safetensors file name"):
        AutoencoderKL.from_pretrained(vae)


@pytest.mark.parametrize("size", ["", "10 apples", "-1GB", 0, "0MB"])
def test_sizes_that_make_no_sense(vae: Path, size: Any, tmp_path: Path) -> None:
    model = AutoencoderKL.from_pretrained(vae)
    with pytest.raises(ValueError, match="not a size"):
        model.save_pretrained(tmp_path / "x", max_shard_size=size)
    with pytest.raises(ValueError, match="cannot be part of a file name"):
        model.save_pretrained(tmp_path / "x", variant="../x")
    assert not (tmp_path / "x").exists()


# --- saving is safe -------------------------------------------------------------------------------


def test_a_model_can_be_saved_over_itself(vae: Path) -> None:
    model = AutoencoderKL.from_pretrained(vae)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    model.save_pretrained(vae)
    assert equal(state(model), state(AutoencoderKL.from_pretrained(vae)))
    assert sorted(path.name for path in vae.iterdir()) == ["config.json", f"{D}.safetensors"]


def test_a_failed_save_changes_nothing(vae: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoencoderKL.from_pretrained(vae)
    before = {path.name: path.read_bytes() for path in vae.iterdir()}

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(vae)
    assert {path.name: path.read_bytes() for path in vae.iterdir()} == before
    assert sorted(path.name for path in vae.parent.iterdir()) == ["vae"]


def test_a_file_is_in_the_way(vae: Path) -> None:
    with pytest.raises(OSError, match=r"config\.json: not a folder"):
        AutoencoderKL.from_pretrained(vae).save_pretrained(vae / "config.json")


# --- what is imported -----------------------------------------------------------------------------


def run(code: str) -> str:
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_local_folders_need_no_hub_and_no_oracle(sd1_repo: Path) -> None:
    code = (
        "from weightport import UNet2DConditionModel as U;"
        f" U.from_pretrained({str(sd1_repo / 'unet')!r})\n"
    )
    modules = set(run(code + "import sys; print(*sys.modules)").split())
    assert not modules & {
        "huggingface_hub",
        "diffusers",
        "transformers",
        "tokenizers",
        "PIL",
        "accelerate",
    }


@pytest.mark.parametrize("name", weightport.__all__)
def test_public_names_exist(name: str) -> None:
    assert getattr(weightport, name).__name__ == name
    assert name in dir(weightport)


def test_unknown_names() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        weightport.Nothing  # noqa: B018
