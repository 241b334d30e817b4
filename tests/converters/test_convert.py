"""`weightport.convert` and `weightport.inspect`: what a repo holds, where parts come from, and the
way back."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import weightport

from ..support.synthetic import PARTS, weights, write_repo

UNET, VAE, TEXT = (
    f"{folder}/{stem}.safetensors"
    for folder, stem in [
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ]
)


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _same(a: Path, b: Path) -> bool:
    return a.read_bytes() == b.read_bytes()


@pytest.fixture(scope="module")
def converted(
    sd1_keras: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> weightport.Conversion:
    output = tmp_path_factory.mktemp("converted") / "repo"
    return weightport.convert(list(sd1_keras.values()), output)


# --- the repo -------------------------------------------------------------------------------------


def test_every_tensor_is_the_original(converted: weightport.Conversion, sd1_repo: Path) -> None:
    """The model that the Keras files were made from comes back bit for bit, in every component."""
    for file in (UNET, VAE, TEXT):
        before, after = load_file(sd1_repo / file), load_file(converted.output / file)
        assert before.keys() == after.keys()
        assert all(before[key].tobytes() == after[key].tobytes() for key in before)


def test_the_repo_is_complete(converted: weightport.Conversion) -> None:
    files = {
        str(path.relative_to(converted.output))
        for path in converted.output.rglob("*")
        if path.is_file()
    }
    assert files == {
        "README.md", "model_index.json", "conversion.json", UNET, VAE, TEXT,
        "unet/config.json", "vae/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json",
        "tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer/tokenizer_config.json",
        "tokenizer/special_tokens_map.json",
    }  # fmt: skip
    assert converted.lacks == []


def test_model_index_names_what_is_there(converted: weightport.Conversion) -> None:
    index = _json(converted.output / "model_index.json")
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    assert index["vae"] == ["diffusers", "AutoencoderKL"]
    assert index["text_encoder"] == ["transformers", "CLIPTextModel"]
    assert index["tokenizer"] == ["transformers", "CLIPTokenizer"]
    assert index["scheduler"] == ["diffusers", "DDIMScheduler"]
    assert index["safety_checker"] == [None, None]
    assert "feature_extractor" not in index


def test_the_scheduler_is_kerascvs(converted: weightport.Conversion) -> None:
    config = _json(converted.output / "scheduler" / "scheduler_config.json")
    assert config["_class_name"] == "DDIMScheduler"
    assert (config["beta_schedule"], config["beta_start"], config["beta_end"]) == (
        "scaled_linear",
        0.00085,
        0.012,
    )
    assert (config["prediction_type"], config["set_alpha_to_one"], config["steps_offset"]) == (
        "epsilon",
        True,
        1,
    )
    assert config["clip_sample"] is False


def test_configs_follow_the_tensors(converted: weightport.Conversion) -> None:
    config = _json(converted.output / "unet" / "config.json")
    assert config["_class_name"] == "UNet2DConditionModel"
    assert config["block_out_channels"] == [32, 64, 96, 96]
    assert config["cross_attention_dim"] == 64
    assert _json(converted.output / "text_encoder" / "config.json")["hidden_size"] == 64


def test_diffusers_loads_the_pipeline(converted: weightport.Conversion) -> None:
    diffusers = pytest.importorskip("diffusers")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(converted.output)
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a cat", num_inference_steps=1, height=64, width=64, output_type="np").images
    assert np.isfinite(image).all()


def test_the_order_of_sources_does_not_matter(
    converted: weightport.Conversion,
    sd1_keras: dict[str, Path],
    sd1_legacy: dict[str, Path],
    tmp_path: Path,
) -> None:
    mixed = [
        sd1_keras["decoder"],
        sd1_legacy["unet"],
        sd1_legacy["image_encoder"],
        sd1_keras["text_encoder"],
    ]
    again = weightport.convert(mixed, tmp_path / "repo")
    assert all(_same(converted.output / file, again.output / file) for file in (UNET, VAE, TEXT))


# --- conversion.json ------------------------------------------------------------------------------


def test_the_report_says_where_every_tensor_comes_from(
    converted: weightport.Conversion, sd1_keras: dict[str, Path]
) -> None:
    report = _json(converted.output / "conversion.json")
    assert report == converted.report
    entry = report["components"]["unet"]["conv_in.weight"]
    assert entry == {"source": ["layers/padded_conv2d/conv2d/vars/0"], "op": "... i o -> o i ..."}
    assert report["family"] == "sd1"
    assert {source["part"] for source in report["sources"]} == set(PARTS)
    assert all("100% match" in " ".join(source["evidence"]) for source in report["sources"])
    unet = next(source for source in report["sources"] if source["part"] == "unet")
    path = sd1_keras["unet"]
    assert unet["files"] == {path.name: hashlib.sha256(path.read_bytes()).hexdigest()}
    assert set(report["tables"]) == {
        "kerascv_unet",
        "kerascv_decoder",
        "kerascv_image_encoder",
        "kerascv_text_encoder",
    }


def test_the_report_hashes_every_file(converted: weightport.Conversion) -> None:
    files = converted.report["files"]
    for path in converted.output.rglob("*"):
        if path.is_file() and path.name not in ("conversion.json", "README.md"):
            entry = files[str(path.relative_to(converted.output))]
            assert entry == {
                "nbytes": path.stat().st_size,
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            }


# --- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "name"), [("float16", "F16"), ("bfloat16", "BF16"), ("float32", "F32")]
)
def test_dtype(
    sd1_keras: dict[str, Path], sd1_repo: Path, tmp_path: Path, dtype: Any, name: str
) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file as load_torch

    output = weightport.convert(
        sd1_keras["unet"], tmp_path / "repo", dtype=dtype, variant="fp16"
    ).output
    expected = load_torch(sd1_repo / UNET)
    found = load_torch(output / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    for key in expected:  # PyTorch's own rounding is the reference
        assert torch.equal(found[key], expected[key].to(getattr(torch, dtype)))


def test_shards(sd1_keras: dict[str, Path], sd1_repo: Path, tmp_path: Path) -> None:
    output = weightport.convert(sd1_keras["unet"], tmp_path / "repo", max_shard_size="8MB").output
    index = _json(output / "unet" / "diffusion_pytorch_model.safetensors.index.json")
    names = sorted(set(index["weight_map"].values()))
    assert names[0] == f"diffusion_pytorch_model-00001-of-0000{len(names)}.safetensors"
    assert all((output / "unet" / name).stat().st_size < 8.2e6 for name in names)
    merged = {
        key: value for name in names for key, value in load_file(output / "unet" / name).items()
    }
    assert all(
        merged[key].tobytes() == value.tobytes()
        for key, value in load_file(sd1_repo / UNET).items()
    )
    again = weightport.convert(output, tmp_path / "again").output  # and shards are read
    assert load_file(again / UNET).keys() == merged.keys()


def test_dry_run_plans_and_writes_nothing(sd1_keras: dict[str, Path], tmp_path: Path) -> None:
    conversion = weightport.convert(sd1_keras["unet"], tmp_path / "repo", dry_run=True)
    assert conversion.output is None
    assert len(conversion.components["unet"].tensors) == 686
    assert list(tmp_path.iterdir()) == []


def test_component_converts_one_only(sd1_repo: Path, tmp_path: Path) -> None:
    output = weightport.convert(sd1_repo, tmp_path / "repo", component="vae").output
    assert (output / VAE).is_file()
    assert not (output / "unet").exists()
    with pytest.raises(weightport.ConversionError, match="--component unet"):
        weightport.convert(output, tmp_path / "other", component="unet")


def test_placeholder_tokens_need_a_text_encoder(sd1_keras: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(weightport.ConversionError, match="--placeholder-token"):
        weightport.convert(sd1_keras["unet"], tmp_path / "repo", placeholder_tokens=["<extra>"])


@pytest.mark.parametrize(
    ("activation", "hidden_act"), [("tanh", "gelu_pytorch_tanh"), ("erf", "gelu")]
)
def test_text_activation_of_v2(
    sd2_keras: dict[str, Path], tmp_path: Path, activation: Literal["tanh", "erf"], hidden_act: str
) -> None:
    conversion = weightport.convert(
        sd2_keras["text_encoder"], tmp_path / "repo", text_activation=activation
    )
    assert _json(conversion.output / "text_encoder" / "config.json")["hidden_act"] == hidden_act
    assert any(hidden_act in note for note in conversion.report["notes"])


def test_v2_is_recognised_and_pads_as_kerascv_does(
    sd2_keras: dict[str, Path], tmp_path: Path
) -> None:
    conversion = weightport.convert(list(sd2_keras.values()), tmp_path / "repo")
    assert conversion.family == "sd2"
    assert _json(conversion.output / "unet" / "config.json")["use_linear_projection"] is True
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(conversion.output / "tokenizer")
    assert tokenizer("a", padding="max_length").input_ids[3:] == [49407] * 74


def test_family_is_checked(sd1_keras: dict[str, Path], tmp_path: Path) -> None:
    decoder = weightport.convert(sd1_keras["decoder"], tmp_path / "sd2", family="sd2")
    assert decoder.family == "sd2"
    with pytest.raises(weightport.ConversionError, match="--family sd2 does not fit"):
        weightport.convert(sd1_keras["unet"], tmp_path / "unet", family="sd2")


# --- textual inversion ----------------------------------------------------------------------------


@pytest.fixture
def inverted(sd1_repo: Path, tmp_path: Path) -> Path:
    """A text encoder with two more token rows, as a Keras file."""
    repo = tmp_path / "inverted"
    shutil.copytree(sd1_repo / "text_encoder", repo / "text_encoder")
    (repo / "model_index.json").write_text("{}")
    state = load_file(repo / TEXT)
    table = "text_model.embeddings.token_embedding.weight"
    state[table] = np.concatenate([state[table], np.ones((2, state[table].shape[1]), np.float32)])
    save_file(state, repo / TEXT)
    place = repo / "text_encoder" / "config.json"
    place.write_text(json.dumps(_json(place) | {"vocab_size": len(state[table])}))
    output = tmp_path / "inverted.weights.h5"
    weightport.convert(repo, output, to="kerascv")
    return output


def test_placeholder_tokens_are_named(inverted: Path, tmp_path: Path) -> None:
    conversion = weightport.convert(
        inverted, tmp_path / "repo", placeholder_tokens=["<my-cat>", "<her-dog>"]
    )
    assert _json(conversion.output / "tokenizer" / "added_tokens.json") == {
        "<my-cat>": 49408,
        "<her-dog>": 49409,
    }
    assert _json(conversion.output / "text_encoder" / "config.json")["vocab_size"] == 49410
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(conversion.output / "tokenizer")
    assert 49408 in tokenizer("a photo of <my-cat>").input_ids


def test_placeholder_tokens_must_match_the_rows(
    inverted: Path, sd1_keras: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(weightport.ConversionError, match="2"):
        weightport.convert(
            inverted, tmp_path / "repo", placeholder_tokens=["<only-one>"], dry_run=True
        )
    with pytest.raises(weightport.ConversionError, match="49408 rows, 0 more"):
        weightport.convert(
            sd1_keras["text_encoder"], tmp_path / "repo", placeholder_tokens=["<extra>"]
        )


# --- base -----------------------------------------------------------------------------------------


@pytest.fixture
def other_repo(tmp_path: Path) -> Path:
    """A base with other weights, its own scheduler and tokenizer, and the older VAE attention
    names."""
    base = write_repo(tmp_path / "base", "sd1", seed=7)
    (base / "scheduler").mkdir()
    (base / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "PNDMScheduler"}')
    state = load_file(base / VAE)
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, old in names.items():
        state = {
            key.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): value
            for key, value in state.items()
        }
    save_file(state, base / VAE)
    text = load_file(base / TEXT)
    text = {key.removeprefix("text_model."): value for key, value in text.items()}
    text["embeddings.position_ids"] = np.arange(77)[None]
    save_file(text, base / TEXT)
    return base


def test_a_repo_fills_in_what_is_lacking(
    sd1_keras: dict[str, Path], sd1_repo: Path, other_repo: Path, tmp_path: Path
) -> None:
    conversion = weightport.convert(
        [sd1_keras["unet"], sd1_keras["decoder"]], tmp_path / "repo", base=other_repo
    )
    assert conversion.lacks == []
    unet, finetuned = load_file(conversion.output / UNET), load_file(sd1_repo / UNET)
    assert all(unet[key].tobytes() == finetuned[key].tobytes() for key in finetuned)
    vae, ours, theirs = (
        load_file(conversion.output / VAE),
        load_file(sd1_repo / VAE),
        weights("sd1", "vae", 7),
    )
    for key, value in vae.items():
        expected = ours if key.startswith(("decoder.", "post_quant_conv.")) else theirs
        assert value.tobytes() == expected[key].tobytes(), key
    text = load_file(conversion.output / TEXT)
    assert (
        text.keys() == weights("sd1", "text_encoder").keys()
    )  # the prefix is back, position_ids are gone
    # the UNet is KerasCV's, so the scheduler is too
    assert (
        _json(conversion.output / "scheduler" / "scheduler_config.json")["_class_name"]
        == "DDIMScheduler"
    )


def test_a_base_keeps_its_scheduler_with_its_unet(
    sd1_keras: dict[str, Path], other_repo: Path, tmp_path: Path
) -> None:
    conversion = weightport.convert(sd1_keras["text_encoder"], tmp_path / "repo", base=other_repo)
    assert (
        _json(conversion.output / "scheduler" / "scheduler_config.json")["_class_name"]
        == "PNDMScheduler"
    )
    assert _json(conversion.output / "model_index.json")["scheduler"] == [
        "diffusers",
        "PNDMScheduler",
    ]


def test_a_folder_of_stock_files_is_a_base(
    sd1_keras: dict[str, Path],
    sd1_legacy: dict[str, Path],
    converted: weightport.Conversion,
    tmp_path: Path,
) -> None:
    names = {
        "text_encoder": "kcv_encoder.h5",
        "decoder": "kcv_decoder.h5",
        "image_encoder": "vae_encoder.h5",
    }
    (tmp_path / "models").mkdir()
    for part, name in names.items():
        shutil.copy(sd1_legacy[part], tmp_path / "models" / name)
    conversion = weightport.convert(sd1_keras["unet"], tmp_path / "repo", base=tmp_path / "models")
    assert conversion.lacks == []
    assert all(
        _same(converted.output / file, conversion.output / file) for file in (UNET, VAE, TEXT)
    )


def test_a_hub_id_is_downloaded(
    sd1_keras: dict[str, Path], sd1_repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only safetensors, configs and the tokenizer are asked for; the Hub itself is not needed
    here."""
    asked: dict[str, Any] = {}

    def snapshot_download(repo_id: str, **arguments: Any) -> str:
        asked.update(arguments, repo_id=repo_id)
        return str(sd1_repo)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    conversion = weightport.convert(sd1_keras["unet"], tmp_path / "repo", base="someone/model")
    assert asked["repo_id"] == "someone/model"
    assert not any(pattern.endswith((".bin", ".py", "*")) for pattern in asked["allow_patterns"])
    assert conversion.lacks == []


def test_a_hub_error_is_one_line(
    sd1_keras: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setitem(sys.modules, "huggingface_hub", types.ModuleType("huggingface_hub"))
    with pytest.raises(weightport.ConversionError, match=r"weightport\[hub\]"):
        weightport.convert(sd1_keras["unet"], tmp_path / "repo", base="someone/model")
    with pytest.raises(weightport.ConversionError, match="no such folder"):
        weightport.convert(sd1_keras["unet"], tmp_path / "repo", base="./nowhere")


def test_without_a_base_the_gaps_are_named(sd1_keras: dict[str, Path], tmp_path: Path) -> None:
    conversion = weightport.convert(sd1_keras["decoder"], tmp_path / "repo")
    assert [gap.split(" (")[0] for gap in conversion.lacks] == [
        "unet", "the image encoder half of the vae, 108 tensors", "text_encoder"
    ]  # fmt: skip
    assert "vae" not in _json(
        conversion.output / "model_index.json"
    )  # half a VAE must not be loaded by mistake


# --- and back -------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".weights.h5", ".h5"])
@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_keras_to_repo_to_keras_is_exact(
    family: str, suffix: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source = request.getfixturevalue(f"{family}_keras")
    output = weightport.convert(list(source.values()), tmp_path / "repo").output
    weightport.convert(output, tmp_path / f"back{suffix}", to="kerascv")
    for part in PARTS:
        path = tmp_path / f"back.{part}{suffix}"
        again = weightport.convert(path, tmp_path / f"again-{part}").output
        component = {"decoder": "vae", "image_encoder": "vae"}.get(part, part)
        (file,) = (again / component).glob("*.safetensors")
        with (
            safe_open(file, "np") as after,
            safe_open(output / component / file.name, "np") as before,
        ):
            for key in after.keys():  # noqa: SIM118 - not a dict
                assert after.get_tensor(key).tobytes() == before.get_tensor(key).tobytes()


def test_one_part_is_written_under_the_given_name(sd1_repo: Path, tmp_path: Path) -> None:
    weightport.convert(sd1_repo, tmp_path / "mine.weights.h5", to="kerascv", component="unet")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.weights.h5"]
    (part,) = weightport.inspect(tmp_path / "mine.weights.h5").parts
    assert (part.part, part.count, part.missing, part.unexpected) == ("unet", 686, (), ())
    with pytest.raises(weightport.ConversionError, match="name the Keras file"):
        weightport.convert(sd1_repo, tmp_path / "folder", to="kerascv")


def test_bfloat16_survives_the_way_back(sd1_repo: Path, tmp_path: Path) -> None:
    weightport.convert(
        sd1_repo, tmp_path / "b.weights.h5", to="kerascv", component="decoder", dtype="bfloat16"
    )
    (part,) = weightport.inspect(tmp_path / "b.weights.h5").parts
    assert part.dtypes == {"BF16": 140}


# --- inspect --------------------------------------------------------------------------------------


def test_inspect_describes_a_file(sd1_legacy: dict[str, Path]) -> None:
    (part,) = weightport.inspect(sd1_legacy["unet"]).parts
    assert (part.part, part.families, part.format) == (
        "unet",
        ("Stable Diffusion 1.x",),
        "legacy HDF5 weights",
    )
    assert part.becomes == "unet/ (UNet2DConditionModel) by the table kerascv_unet"
    assert part.dtypes == {"F32": 686}
    patterns = {pattern: count for pattern, count, _, _ in part.tensors}
    assert patterns["res_block.{0..21}.entry_flow.padded_conv2d.conv2d.weight"] == 22
    assert sum(patterns.values()) == 686


def test_inspect_of_a_repo(sd1_repo: Path) -> None:
    parts = weightport.inspect(sd1_repo).parts
    assert {part.part for part in parts} == {"unet", "vae", "text_encoder"}
    assert all(part.format == "diffusers repo" for part in parts)


def _widened(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.repeat(array, 2, axis=0)


def _counted(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.zeros(array.shape, np.int32)


WRONG = [
    ("original", "model.diffusion_model.input_blocks.4.0.in_layers.2.weight", _widened),
    ("original", "first_stage_model.decoder.conv_in.bias", _counted),
    ("original", "cond_stage_model.transformer.text_model.encoder.layers.2.mlp.fc1.bias", _widened),
    ("repo", "conv_in.weight", _widened),
    ("repo", "mid_block.attentions.0.proj_in.bias", _counted),
]


def _said_by_both(source: Path, output: Path) -> str:
    """What `convert` refuses; `inspect` says the same."""
    with pytest.raises(weightport.ConversionError) as refused:
        weightport.convert(source, output)
    said = {part.becomes for part in weightport.inspect(source).parts}
    assert f"nothing as it is: {refused.value}" in said
    return str(refused.value)


@pytest.mark.parametrize(("layout", "name", "change"), WRONG)
def test_inspect_names_the_tensor_that_convert_refuses(
    layout: str,
    name: str,
    change: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]],
    sd1_repo: Path,
    original_of: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    whole = {"original": original_of("sd1"), "repo": sd1_repo / UNET}[layout]
    tensors = load_file(whole)
    source = tmp_path / "model.safetensors"
    save_file(tensors | {name: change(tensors[name])}, source)
    assert name in _said_by_both(source, tmp_path / "repo")


def test_inspect_names_the_kernel_of_keras_that_convert_refuses(
    sd1_legacy: dict[str, Path], tmp_path: Path
) -> None:
    source = Path(shutil.copy(sd1_legacy["unet"], tmp_path / "unet.h5"))
    with h5py.File(source, "r+") as file:
        layer = file.attrs["layer_names"][2]
        name = file[layer].attrs["weight_names"][0]
        kernel = file[layer][name][()]
        del file[layer][name]
        file[layer][name] = _widened(kernel)
    assert "has the wrong shape" in _said_by_both(source, tmp_path / "repo")


def test_inspect_reads_no_weights(
    sd1_legacy: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Structure only: under a tenth of the file, and no tensor."""
    from weightport.converters.checkpoint import SourceFile, Stored

    total = 0
    read = SourceFile.read

    def counted(self: SourceFile, offset: int, nbytes: int) -> bytes:
        nonlocal total
        total += nbytes
        return read(self, offset, nbytes)

    monkeypatch.setattr(SourceFile, "read", counted)
    monkeypatch.setattr(Stored, "numpy", None)
    monkeypatch.setattr(SourceFile, "read_into", None)
    weightport.inspect(sd1_legacy["text_encoder"])
    assert total < sd1_legacy["text_encoder"].stat().st_size / 10


# --- without checksums, without waiting for the disk ----------------------------------------------


def test_hashes_and_sync_can_be_left_out(
    sd1_keras: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files are the same; the report has no sha256, and nothing waits for the disk."""
    source = sd1_keras["decoder"]
    weightport.convert(source, tmp_path / "with")
    synced: list[int] = []
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, synced.append)
    weightport.convert(source, tmp_path / "without", hashes=False, sync=False)
    assert not synced
    weights = "vae/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "with" / weights).read_bytes() == (
        tmp_path / "without" / weights
    ).read_bytes()
    reports = {
        name: json.loads((tmp_path / name / "conversion.json").read_text())
        for name in ("with", "without")
    }
    assert reports["with"]["sources"][0]["files"][source.name]
    assert reports["with"]["files"][weights].keys() == {"nbytes", "sha256"}
    assert reports["without"]["sources"][0]["files"] == {}
    assert reports["without"]["files"][weights].keys() == {"nbytes"}
    weightport.convert(source, tmp_path / "again", hashes=False)
    assert synced
