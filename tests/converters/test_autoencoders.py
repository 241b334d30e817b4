"""VAEs of other classes than `AutoencoderKL`: TAESD's files and diffusers' tiny and asymmetric ones,
alone and in the place of a pipeline's own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import weightport
from tests.support import narrow_models

FAST: dict[str, Any] = {"sync": False, "hashes": False}
KINDS = {"tiny": "AutoencoderTiny", "asymmetric": "AsymmetricAutoencoderKL"}
CONFIGS: dict[str, dict[str, Any]] = {
    "tiny": {
        "encoder_block_out_channels": [8, 8, 8],
        "decoder_block_out_channels": [4, 4],
        "num_encoder_blocks": [1, 2, 1],
        "num_decoder_blocks": [3, 1],
    },
    "asymmetric": {
        "down_block_out_channels": [32, 64, 64],
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "layers_per_down_block": 1,
        "up_block_out_channels": [48, 48, 48],
        "up_block_types": ["UpDecoderBlock2D"] * 3,
        "layers_per_up_block": 2,
        "norm_num_groups": 16,  # the most that divides them all
    },
}
State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of diffusers for each kind."""
    folder = tmp_path_factory.mktemp("autoencoders")
    for name, kind in KINDS.items():
        narrow_models.build(kind, CONFIGS[name]).save_pretrained(folder / name)
    return {name: folder / name for name in KINDS}


def weights(folder: Path) -> State:
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def original(state: Mapping[str, torch.Tensor]) -> dict[str, State]:
    """The halves of a TAESD under the names that its own code gives them: an `nn.Sequential`, in
    which the decoder begins with a layer that clamps."""
    found: dict[str, State] = {"encoder": {}, "decoder": {}}
    for key, tensor in state.items():
        half, _, number, rest = key.split(".", 3)
        found[half][f"{int(number) + (half == 'decoder')}.{rest}"] = tensor
    return found


def joined(state: Mapping[str, torch.Tensor], front: str) -> State:
    halves = original(state).items()
    return {f"{front}{half}.{key}": one for half, found in halves for key, one in found.items()}


def same(one: Mapping[str, torch.Tensor], two: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def repo_equals(repo: Path, folder: Path, kind: str) -> None:
    """The VAE of a repo loads strictly, computes the same, and is named by the index."""
    loaded = narrow_models.load(kind, repo / "vae")
    theirs = narrow_models.load(kind, folder)
    for ours, expected in zip(
        narrow_models.outputs(kind, loaded), narrow_models.outputs(kind, theirs), strict=True
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    assert same(loaded.state_dict(), theirs.state_dict())
    index = json.loads((repo / "model_index.json").read_text(encoding="utf-8"))
    assert index["vae"] == ["diffusers", kind]


def files_of(folder: Path, place: Path) -> dict[str, list[Path]]:
    """A TAESD in every form that people have."""
    state = weights(folder)
    halves = original(state)
    scales = {"vae_scale": torch.tensor(0.13025), "vae_shift": torch.tensor(0.0)}
    for half, tensors in halves.items():
        torch.save(tensors, place / f"taesd_{half}.pth")
        save_file(tensors, place / f"{half[:3]}.safetensors")
    wrapped = {f"module.{key}": one for key, one in halves["decoder"].items()}
    save_file(wrapped, place / "wrapped.safetensors")
    forms = {
        "diffusers": state,
        "comfy": joined(state, "taesd_") | scales,
        "module": joined(state, ""),
        "in a checkpoint": {
            f"first_stage_model.{k}": v for k, v in joined(state, "taesd_").items()
        },
    }
    for name, tensors in forms.items():
        save_file(tensors, place / f"{name}.safetensors")
    files = {name: [place / f"{name}.safetensors"] for name in forms}
    files["halves"] = [place / "taesd_decoder.pth", place / "taesd_encoder.pth"]
    files["oddly named"] = [place / "enc.safetensors", place / "wrapped.safetensors"]
    return files


def test_every_form_of_a_tiny_vae(models: dict[str, Path], tmp_path: Path) -> None:
    folder = models["tiny"]
    for name, sources in files_of(folder, tmp_path).items():
        repo = tmp_path / f"repo {name}"
        weightport.convert(sources, repo, **FAST)
        repo_equals(repo, folder, KINDS["tiny"])
        parts = [weightport.inspect(source).parts[0] for source in sources]
        assert all("AutoencoderTiny" in part.becomes for part in parts)
    comfy = tmp_path / "comfy.safetensors"
    back = tmp_path / "back.safetensors"
    weightport.convert(tmp_path / "repo comfy", back, to="ldm", **FAST)
    assert same(load_file(back), load_file(comfy))


def test_back_to_the_files_of_taesd(models: dict[str, Path], tmp_path: Path) -> None:
    """Both halves in one file, or one under the bare numbers of its own."""
    folder = models["tiny"]
    halves = original(weights(folder))
    out = tmp_path / "out.safetensors"
    for component, expected in (
        (None, joined(weights(folder), "taesd_")),
        ("vae", joined(weights(folder), "taesd_")),
        ("decoder", halves["decoder"]),
        ("image_encoder", halves["encoder"]),
    ):
        weightport.convert(folder, out, to="ldm", component=component, overwrite=True, **FAST)
        assert same(load_file(out), expected)


def test_half_of_a_tiny_vae(models: dict[str, Path], tmp_path: Path) -> None:
    """It is read, written again, and said to be half; another VAE's half does not fill it up."""
    halves = original(weights(models["tiny"]))
    file = tmp_path / "anything.pt"
    torch.save(halves["decoder"], file)
    done = weightport.convert(file, tmp_path / "repo", **FAST)
    assert any(gap.startswith("the image encoder half of the vae") for gap in done.lacks)
    weightport.convert(file, tmp_path / "out.safetensors", to="ldm", **FAST)
    assert same(load_file(tmp_path / "out.safetensors"), halves["decoder"])
    base = tmp_path / "base"
    vae = narrow_models.build("AutoencoderKL", {"block_out_channels": [32]})
    vae.save_pretrained(base / "vae")
    (base / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(weightport.ConversionError, match=r"the decoder in .* is one of an"):
        weightport.convert(file, tmp_path / "mixed", base=base, **FAST)


def test_asymmetric_files(models: dict[str, Path], tmp_path: Path) -> None:
    """Under diffusers' names and its own code's; what only training used is left out."""
    folder = models["asymmetric"]
    state = weights(folder)
    save_file(state, tmp_path / "state.safetensors")
    weightport.convert(tmp_path / "state.safetensors", tmp_path / "a", **FAST)
    repo_equals(tmp_path / "a", folder, KINDS["asymmetric"])
    file = tmp_path / "original.safetensors"
    weightport.convert(folder, file, to="ldm", **FAST)
    found = load_file(file)
    assert torch.equal(
        found["decoder.encoder.layers.2.weight"], state["decoder.condition_encoder.layers.2.weight"]
    )
    assert not [key for key in found if key.startswith("first_stage_model")]
    torch.save({"state_dict": found | {"loss.logvar": torch.zeros(())}}, tmp_path / "trained.ckpt")
    weightport.convert(tmp_path / "trained.ckpt", tmp_path / "b", **FAST)
    repo_equals(tmp_path / "b", folder, KINDS["asymmetric"])


@pytest.mark.parametrize("name", KINDS)
def test_options_of_a_folder(models: dict[str, Path], name: str, tmp_path: Path) -> None:
    repo = tmp_path / "repo"
    options: dict[str, Any] = {"dtype": "float16", "max_shard_size": 20_000, "variant": "fp16"}
    weightport.convert(models[name], repo, **options, **FAST)
    assert list((repo / "vae").glob("*.index.fp16.json"))
    kind = getattr(__import__("diffusers"), KINDS[name])
    loaded = kind.from_pretrained(repo / "vae", variant="fp16", torch_dtype=torch.float16)
    expected = {key: one.half() for key, one in weights(models[name]).items()}
    assert same(loaded.state_dict(), expected)


@pytest.mark.parametrize("name", KINDS)
def test_the_vae_of_a_pipeline(
    models: dict[str, Path], name: str, sd1_repo: Path, tmp_path: Path
) -> None:
    """In a repo, and put into one by `--vae`; there is no original checkpoint of the whole."""
    source = tmp_path / "source"
    shutil.copytree(sd1_repo, source)
    shutil.rmtree(source / "vae")
    shutil.copytree(models[name], source / "vae")
    index = json.loads((source / "model_index.json").read_text(encoding="utf-8"))
    index["vae"] = ["diffusers", KINDS[name]]
    (source / "model_index.json").write_text(json.dumps(index))
    weightport.convert(source, tmp_path / "whole", **FAST)
    weightport.convert(sd1_repo, tmp_path / "given", vae=models[name], **FAST)
    for repo in (tmp_path / "whole", tmp_path / "given"):
        repo_equals(repo, models[name], KINDS[name])
    no_place = f"an {KINDS[name]} has no place in an original checkpoint beside"
    with pytest.raises(weightport.ConversionError, match=no_place):
        weightport.convert(source, tmp_path / "one.safetensors", to="ldm", **FAST)
    with pytest.raises(weightport.ConversionError, match=f"KerasCV has no {KINDS[name]}"):
        weightport.convert(source, tmp_path / "one.weights.h5", to="kerascv", **FAST)
    assert {path.name for path in tmp_path.iterdir()} == {"source", "whole", "given"}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda state: state.pop("3.conv.2.weight"), "1 tensors of the TAESD decoder are missing"),
        (lambda state: state.update({"99.conv.0.weight": torch.zeros(1)}), "not part of the TAESD"),
        (lambda state: state.update({"3.pool.0.weight": torch.zeros(1)}), "TAEF2"),
        (
            lambda state: state.update({"3.conv.2.weight": torch.zeros(5, 5, 3, 3)}),
            r"`3.conv.2.weight` has the wrong shape \[5, 5, 3, 3\]",
        ),
    ],
)
def test_damaged_halves(
    models: dict[str, Path], damage: Callable[[State], Any], message: str, tmp_path: Path
) -> None:
    state = original(weights(models["tiny"]))["decoder"]
    damage(state)
    file = tmp_path / "taesd_decoder.safetensors"
    save_file(state, file)
    with pytest.raises(weightport.ConversionError, match=message) as error:
        weightport.convert(file, tmp_path / "repo", **FAST)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "repo").exists()


# --- attention outside the middle -----------------------------------------------------------------

OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
MATRICES = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0", "norm": "group_norm"}


def spelled(state: State, names: Mapping[str, str]) -> State:
    """The attention of a VAE, in every block, under other names."""
    found = {}
    for key, tensor in state.items():
        front, dot, leaf = key.rpartition(".")
        new = next((old for old in names if ".att" in front and front.endswith(f".{old}")), None)
        renamed = f"{front.removesuffix(new)}{names[new]}" if new else front
        found[f"{renamed}{dot}{leaf}"] = tensor[..., 0, 0] if tensor.dim() == 4 and new else tensor
    assert found.keys() != state.keys()
    return found


def test_attention_in_stages_in_every_spelling(tmp_path: Path) -> None:
    """As diffusers named it before 0.17, in folder and file; and matrices in an original file."""
    kind = "AutoencoderKL"
    config = {
        "block_out_channels": [32, 32],
        "down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
        "up_block_types": ["AttnUpDecoderBlock2D", "UpDecoderBlock2D"],
    }
    folder = tmp_path / "vae"
    narrow_models.build(kind, config).save_pretrained(folder)
    weightport.convert(folder, tmp_path / "original.safetensors", to="ldm", **FAST)
    old = tmp_path / "old"
    shutil.copytree(folder, old)
    save_file(spelled(weights(folder), OLD), old / "diffusion_pytorch_model.safetensors")
    save_file(spelled(weights(folder), OLD), tmp_path / "old.safetensors")
    matrices = spelled(load_file(tmp_path / "original.safetensors"), MATRICES)
    save_file(matrices, tmp_path / "matrices.safetensors")
    for source in (old, tmp_path / "old.safetensors", tmp_path / "matrices.safetensors"):
        repo = tmp_path / f"from {source.name}"
        weightport.convert(source, repo, family="sd1", **FAST)
        repo_equals(repo, folder, kind)
    back = tmp_path / "back.safetensors"
    weightport.convert(tmp_path / "from matrices.safetensors", back, to="ldm", **FAST)
    assert same(load_file(back), matrices)


def test_a_checkpoint_whose_vae_is_tiny(
    models: dict[str, Path], original_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """As ComfyUI saves it: its VAE goes back to its place. The one that `--vae` takes the place of
    is not kept for the way back."""
    whole = load_file(original_of("sd1"))
    rest = {key: one for key, one in whole.items() if not key.startswith("first_stage_model.")}
    tiny = joined(weights(models["tiny"]), "first_stage_model.taesd_")
    file = tmp_path / "file.safetensors"
    save_file(rest | tiny, file)
    weightport.convert(file, tmp_path / "repo", **FAST)
    repo_equals(tmp_path / "repo", models["tiny"], KINDS["tiny"])
    weightport.convert(tmp_path / "repo", tmp_path / "back.safetensors", to="ldm", **FAST)
    assert same(load_file(tmp_path / "back.safetensors"), rest | tiny)
    weightport.convert(original_of("sd1"), tmp_path / "given", vae=models["tiny"], **FAST)
    left = load_file(tmp_path / "given.residue.safetensors")
    assert not [key for key in left if key.startswith("first_stage_model.")]


def test_kerascv_has_no_place_for_part_of_a_model(sd1_repo: Path, tmp_path: Path) -> None:
    """A UNet with one tensor more, which was left out once without a word."""
    repo = tmp_path / "repo"
    shutil.copytree(sd1_repo, repo)
    config = json.loads((repo / "unet/config.json").read_text(encoding="utf-8"))
    options = {key: value for key, value in config.items() if not key.startswith("_")}
    unet = narrow_models.build("UNet2DConditionModel", options | {"time_cond_proj_dim": 8})
    unet.save_pretrained(repo / "unet")
    message = "no place for 1 of its tensors: time_embedding.cond_proj.weight; --component"
    with pytest.raises(weightport.ConversionError, match=message):
        weightport.convert(repo, tmp_path / "out.weights.h5", to="kerascv", **FAST)
    assert not list(tmp_path.glob("*.h5"))
    weightport.convert(repo, tmp_path / "out.h5", to="kerascv", component="text_encoder", **FAST)
