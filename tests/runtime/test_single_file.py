"""`from_single_file`: what converting first and loading then gives, without the files between."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.numpy import load_file as load_numpy
from safetensors.torch import load_file, save_file
from torch import nn

import weightport
from weightport import ConversionError, DiffusionPipeline
from weightport.runtime.models.clip import CLIPTextModelWithProjection

from ..support import transformer_families
from ..support.synthetic import write_controlnet
from ..support.transformer_families import bundle, write

pytestmark = pytest.mark.filterwarnings("ignore:there is no safety checker")


def full(value: Any) -> Any:
    return pytest.param(value, marks=pytest.mark.full)


def assert_same(found: Any, expected: Any) -> None:
    """The same class, config and weights, bit for bit."""
    assert type(found) is type(expected)
    if isinstance(found, nn.Module):
        ours, theirs = found.state_dict(), expected.state_dict()
        assert ours.keys() == theirs.keys()
        for key, tensor in ours.items():
            assert tensor.dtype is theirs[key].dtype
            assert torch.equal(tensor, theirs[key]), key
        assert not found.training
    if hasattr(found, "get_vocab"):
        assert found.get_vocab() == expected.get_vocab()
        assert found.pad_token == expected.pad_token
    elif found is not None:
        assert found.config == expected.config


def assert_equal_pipelines(
    sources: Path | Sequence[Path],
    tmp_path: Path,
    plan: dict[str, Any] | None = None,
    **options: Any,
) -> DiffusionPipeline:
    repo = tmp_path / "converted"
    plan = plan or {}
    weightport.convert(sources, repo, residue=False, hashes=False, sync=False, **plan)
    before = sorted(path for path in tmp_path.rglob("*"))
    expected = DiffusionPipeline.from_pretrained(repo, **options)
    found = DiffusionPipeline.from_single_file(sources, **plan, **options)
    assert sorted(path for path in tmp_path.rglob("*")) == before
    assert type(found) is type(expected)
    assert found.config == expected.config
    for name, component in expected.components.items():
        assert_same(found.components[name], component)
    return found


@pytest.mark.parametrize(
    "family", ["sd1", "sd2", "sdxl", *(full("sdxl_refiner"), full("upscaler"))]
)
def test_original_checkpoints(
    family: str, original_of: Callable[[str], Path], tmp_path: Path
) -> None:
    plan = {"prediction_type": "v_prediction"} if family == "sd2" else {}
    pipe = assert_equal_pipelines(original_of(family), tmp_path, plan)
    assert pipe.name_or_path == str(original_of(family))


@pytest.mark.parametrize("files", ["sd1_keras", full("sd1_legacy"), full("sd2_keras")])
def test_kerascv(files: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    parts: dict[str, Path] = request.getfixturevalue(files)
    assert_equal_pipelines(list(parts.values()), tmp_path)


def test_a_base_fills_up(sd1_keras: dict[str, Path], sd1_repo: Path, tmp_path: Path) -> None:
    some = [sd1_keras["text_encoder"], sd1_keras["decoder"]]
    assert_equal_pipelines(some, tmp_path, {"base": sd1_repo})
    with pytest.raises(ValueError, match=r"lacks unet \(give its file, or a --base"):
        DiffusionPipeline.from_single_file(some)


@pytest.mark.parametrize("dtype", [torch.float16, full(torch.bfloat16), full("auto")])
def test_dtypes(dtype: Any, original_of: Callable[[str], Path], tmp_path: Path) -> None:
    assert_equal_pipelines(original_of("sd1"), tmp_path, dtype=dtype)


def test_a_folder_of_several_files(original_of: Callable[[str], Path], tmp_path: Path) -> None:
    tensors = load_file(original_of("sd1"))
    parts = tmp_path / "parts"
    parts.mkdir()
    unet = {key: tensors.pop(key) for key in list(tensors) if key.startswith("model.")}
    save_file(unet, parts / "unet.safetensors")
    save_file(tensors, parts / "others.safetensors")
    assert_equal_pipelines(parts, tmp_path)


def test_a_pickle(original_of: Callable[[str], Path], tmp_path: Path) -> None:
    file = tmp_path / "model.ckpt"
    torch.save({"state_dict": load_file(original_of("sd1")), "global_step": 3}, file)
    assert_equal_pipelines(file, tmp_path)


def test_a_repo(sd1_repo: Path, tmp_path: Path) -> None:
    assert_equal_pipelines(sd1_repo, tmp_path)


def test_models_alone(
    original_of: Callable[[str], Path], sd1_keras: dict[str, Path], tmp_path: Path
) -> None:
    repo = tmp_path / "converted"
    weightport.convert(original_of("sdxl"), repo, residue=False)
    for name, kind in (
        ("unet", weightport.UNet2DConditionModel),
        ("vae", weightport.AutoencoderKL),
        ("text_encoder", weightport.CLIPTextModel),
        ("text_encoder_2", CLIPTextModelWithProjection),
    ):
        found = kind.from_single_file(original_of("sdxl"))
        assert_same(found, kind.from_pretrained(repo, subfolder=name))
    unet = weightport.UNet2DConditionModel.from_single_file(sd1_keras["unet"])
    assert unet.config.cross_attention_dim
    with pytest.raises(ValueError, match="there is no AutoencoderKL in it, but unet"):
        weightport.AutoencoderKL.from_single_file(sd1_keras["unet"])
    with pytest.raises(ValueError, match="vae: does not fit AutoencoderKL: missing encoder"):
        weightport.AutoencoderKL.from_single_file(sd1_keras["decoder"])
    with pytest.raises(TypeError, match=r"AutoencoderKL\.from_single_file\(\) takes no colour"):
        weightport.AutoencoderKL.from_single_file(original_of("sdxl"), colour="red")


def test_a_controlnet(tmp_path: Path) -> None:
    folder = write_controlnet(tmp_path / "net", "sd1")
    file = tmp_path / "original.safetensors"
    weightport.convert(folder, file, to="ldm", residue=False)
    expected = weightport.ControlNetModel.from_pretrained(folder)
    found = weightport.ControlNetModel.from_single_file(file)
    assert all(map(torch.equal, found.state_dict().values(), expected.state_dict().values()))
    with pytest.raises(ValueError, match=r"ControlNetModel\.from_single_file loads it"):
        DiffusionPipeline.from_single_file(file)


@pytest.mark.parametrize("has_t5", [True, False])
def test_sd3(tmp_path: Path, has_t5: bool) -> None:
    state = bundle("sd3")
    if not has_t5:
        state = {key: array for key, array in state.items() if "t5xxl" not in key}
    file = write(tmp_path / "sd3.safetensors", state)
    repo = tmp_path / "repo"
    weightport.convert(file, repo, family="sd3")
    found: Any = DiffusionPipeline.from_single_file(file, family="sd3", dtype=torch.float16)
    expected: Any = DiffusionPipeline.from_pretrained(repo, dtype=torch.float16)
    assert type(found) is weightport.StableDiffusion3Pipeline
    assert (found.text_encoder_3 is not None) is has_t5
    for name, component in expected.components.items():
        assert_same(found.components[name], component)


def test_flux(tmp_path: Path) -> None:
    """A transformer of one head, as wide as the rotary axes of every Flux ask for."""
    config = transformer_families.config("flux", "transformer")
    config |= {"attention_head_dim": 128, "num_attention_heads": 1}
    config |= {"pooled_projection_dim": 16, "joint_attention_dim": 16}  # of the bundle's encoders
    model = weightport.FluxTransformer2DModel.from_config(config)
    model.save_pretrained(tmp_path / "model" / "transformer")
    alone = tmp_path / "alone.safetensors"
    weightport.convert(tmp_path / "model" / "transformer", alone, to="ldm", residue=False)
    narrow = transformer_families.original("flux", "transformer")
    state = {key: array for key, array in bundle("flux").items() if key not in narrow}
    file = write(tmp_path / "flux.safetensors", state | load_numpy(alone))
    repo = tmp_path / "repo"
    weightport.convert(file, repo, family="flux")
    found: Any = DiffusionPipeline.from_single_file(file, family="flux", dtype=torch.bfloat16)
    expected: Any = DiffusionPipeline.from_pretrained(repo, dtype=torch.bfloat16)
    assert type(found) is weightport.FluxPipeline
    for name, component in expected.components.items():
        assert_same(found.components[name], component)
    with torch.no_grad():
        image = found("a cat", height=32, width=32, num_inference_steps=1, output_type="latent")[0]
    assert image.isfinite().all()


def test_components_that_are_given_are_taken(original_of: Callable[[str], Path]) -> None:
    euler = weightport.EulerDiscreteScheduler()
    pipe = weightport.StableDiffusionImg2ImgPipeline.from_single_file(
        original_of("sd1"), scheduler=euler, vae=None
    )
    assert pipe.scheduler is euler
    assert pipe.vae is None
    assert isinstance(pipe, weightport.StableDiffusionImg2ImgPipeline)
    with pytest.raises(ValueError, match="unet: a EulerDiscreteScheduler is given"):
        DiffusionPipeline.from_single_file(original_of("sd1"), unet=euler)


def test_weights_are_mapped_and_writable(
    original_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """What lies in the file as it is used takes no memory; a change stays out of the file."""
    file = shutil.copy(original_of("sd1"), tmp_path / "copy.safetensors")
    content = Path(file).read_bytes()
    unet = weightport.UNet2DConditionModel.from_single_file(file)
    mapped = [tensor for tensor in unet.state_dict().values() if in_map(tensor, file)]
    assert len(mapped) >= 0.9 * len(unet.state_dict())
    with torch.no_grad():
        unet.conv_in.weight.zero_()
    assert Path(file).read_bytes() == content


def in_map(tensor: torch.Tensor, file: str | Path) -> bool:
    """Whether the tensor's memory is that of a mapped file."""
    address = tensor.data_ptr()
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        span, *_, name = line.split()
        start, end = (int(side, 16) for side in span.split("-"))
        if start <= address < end:
            return name == str(file)
    return False


def test_damaged_files_are_refused_in_one_line(
    original_of: Callable[[str], Path], tmp_path: Path
) -> None:
    file = tmp_path / "half.safetensors"
    file.write_bytes(original_of("sd1").read_bytes()[:5000])
    with pytest.raises(ConversionError, match=r"half\.safetensors"):
        DiffusionPipeline.from_single_file(file)
    tensors = load_file(original_of("sd1"))
    tensors.popitem()
    save_file(tensors, file)
    with pytest.raises(ConversionError, match=r"half\.safetensors"):
        DiffusionPipeline.from_single_file(file)


def test_a_stock_tokenizer_is_read_when_it_is_used(
    original_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its vocabulary is ours, so that nothing about it can be wrong; it stays what it is set to."""
    read: list[Any] = []
    known = weightport.CLIPTokenizer.from_pretrained

    def from_pretrained(*arguments: Any, **options: Any) -> Any:
        read.append(arguments)
        return known(*arguments, **options)

    monkeypatch.setattr(weightport.CLIPTokenizer, "from_pretrained", from_pretrained)
    pipe = DiffusionPipeline.from_single_file(original_of("sd1"))
    tokenizer = pipe.tokenizer
    tokenizer.model_max_length = 5
    again = pickle.loads(pickle.dumps(tokenizer))
    assert not read
    assert tokenizer("a photo of a cat", truncation=True).input_ids == [
        49406,
        320,
        1125,
        539,
        49407,
    ]
    assert len(tokenizer) == 49408
    assert len(read) == 1
    assert again.encode("a") == [49406, 320, 49407]
    assert not hasattr(tokenizer, "no_such_thing")
