"""SD 3 and Flux: original files to repositories and back, every form that people have."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_flux_transformer_checkpoint_to_diffusers,
    convert_sd3_transformer_checkpoint_to_diffusers,
)
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch

import weightport
from weightport.errors import ConversionError
from weightport.mappings.families import families
from weightport.mappings.library import load_table

from ...support.converter_rows import assert_rows_go_where_theirs_go
from ...support.full_size import headers_only
from ...support.transformer_families import (
    FLUX,
    SD3,
    State,
    bundle,
    component,
    config,
    extras,
    original,
    t5_of,
    table_of,
    weights,
    write,
)

GOLDEN = Path(__file__).parents[2] / "golden" / "originals"
EVERY = (*SD3, *FLUX)
every_family = pytest.mark.parametrize("family", EVERY)
U = "model.diffusion_model."
T5 = "text_encoders.t5xxl.transformer."


@pytest.fixture(scope="module")
def repos(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The repo that a family's bundle becomes, made when it is asked for."""
    folder = tmp_path_factory.mktemp("transformers")

    def repo(family: str) -> Path:
        path = folder / family
        if not path.exists():
            file = write(folder / f"{family}.safetensors", bundle(family))
            weightport.convert(file, path, sync=False)
        return path

    return repo


def tensors(repo: Path, name: str) -> State:
    """The weights of a component of a repo."""
    (file,) = (repo / name).glob("*.safetensors")
    return load_file(file)


def same(one: State, other: State) -> bool:
    """Whether two state dicts have the same keys, dtypes and bytes."""
    return one.keys() == other.keys() and all(
        one[key].dtype == other[key].dtype and one[key].tobytes() == other[key].tobytes()
        for key in one
    )


# --- the original names ---------------------------------------------------------------------------


def listed(name: str) -> dict[str, tuple[int, ...]]:
    """The tensors of an original model, `key 320x4x3x3` a line."""
    rows = [line.split() for line in (GOLDEN / f"{name}.txt").read_text().splitlines()]
    return {key: tuple(map(int, sides.split("x"))) for key, sides in rows}


MODELS: list[tuple[str, str, str, dict[str, Any]]] = [
    ("sd3_medium_mmdit", "ldm_mmdit", "sd3", {}),
    ("sd35_medium_mmdit", "ldm_mmdit", "sd35_medium", {}),
    ("sd35_large_mmdit", "ldm_mmdit", "sd35_large", {}),
    ("flux_dev", "ldm_flux", "flux", {}),
    ("flux_schnell", "ldm_flux", "flux_schnell", {}),
    ("flux_fill", "ldm_flux", "flux", {"in_channels": 384, "out_channels": 64}),
    ("flux_control", "ldm_flux", "flux", {"in_channels": 128, "out_channels": 64}),
]


every_model = pytest.mark.parametrize(
    ("name", "table", "family", "own"), MODELS, ids=[name for name, *_ in MODELS]
)
FEW_BLOCKS: dict[bool, dict[str, Any]] = {  # whether it is SD 3
    True: {"num_layers": 3},
    False: {"num_layers": 2, "num_single_layers": 2},
}


@every_model
def test_full_size_tensors_are_those_of_the_original(
    name: str, table: str, family: str, own: dict[str, Any]
) -> None:
    known = component(family, "transformer")
    settings = {**known.config, **own}
    targets = known.model.tensors(settings)
    links = load_table(table).links(targets, known.model.names(settings))
    shapes = {link.sources[0].removeprefix(U): link.source_shape(targets) for link in links}
    assert shapes == listed(name)


@pytest.mark.parametrize("depth", ["few blocks", pytest.param("all", marks=pytest.mark.full)])
@every_model
def test_rows_go_where_diffusers_converter_puts_them(
    name: str, table: str, family: str, own: dict[str, Any], depth: str
) -> None:
    """At full width; told by numbers that are the same along the other axes, so that they take no
    memory."""
    known = component(family, "transformer")
    settings = {**known.config, **own}
    if depth != "all":
        settings |= FEW_BLOCKS[family in SD3]
    targets = known.model.tensors(settings)
    links = load_table(table).links(targets, known.model.names(settings))
    convert = convert_flux_transformer_checkpoint_to_diffusers
    if family in SD3:
        convert = convert_sd3_transformer_checkpoint_to_diffusers
    assert_rows_go_where_theirs_go(links, targets, convert)


@every_model
def test_full_size_is_planned_from_the_header_alone(
    name: str, table: str, family: str, own: dict[str, Any], tmp_path: Path
) -> None:
    """With every encoder, in under a second of CPU; and nothing is read."""
    shapes = {U + key: shape for key, shape in listed(name).items()}
    for part in families()[family].components:
        if part != "transformer":
            shapes |= full_size(family, part)
    file = headers_only(tmp_path / "m.safetensors", shapes)
    weightport.convert(file, tmp_path / "repo", dry_run=True)  # what is read once: tables
    start = time.process_time()
    result = weightport.convert(file, tmp_path / "repo", dry_run=True)
    assert time.process_time() - start < 1
    assert result.family == family
    assert not result.lacks
    expected = {**component(family, "transformer").config, **own}
    assert result.components["transformer"].config == expected


def full_size(family: str, name: str) -> dict[str, tuple[int, ...]]:
    """The original tensors of a stock component."""
    stock = component(family, name)
    table = table_of(family, name)
    targets = stock.manifest()
    links = table.links(targets, stock.model.names(stock.config))
    return {link.sources[0]: link.source_shape(targets) for link in links}


# --- bundles, there and back ----------------------------------------------------------------------


@every_family
def test_a_bundle_becomes_a_repo_that_diffusers_knows(
    family: str, repos: Callable[[str], Path]
) -> None:
    repo = repos(family)
    for name in families()[family].components:
        assert same(tensors(repo, name), weights(family, name)), name
        written = json.loads((repo / name / "config.json").read_text())
        told = {key: written[key] for key in config(family, name) if key in written}
        expected = {key: config(family, name)[key] for key in told if key != "torch_dtype"}
        assert {key: told[key] for key in expected} == expected, name
    index = json.loads((repo / "model_index.json").read_text())
    kind = "FluxPipeline" if family in FLUX else "StableDiffusion3Pipeline"
    assert index["_class_name"] == kind
    assert index["scheduler"] == ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    encoder = t5_of(family)
    assert index[encoder] == ["transformers", "T5EncoderModel"]
    tokenizer = encoder.replace("text_encoder", "tokenizer")
    assert index[tokenizer] == ["transformers", "T5TokenizerFast"]
    assert (repo / tokenizer / "tokenizer.json").is_file()
    scheduler = json.loads((repo / "scheduler" / "scheduler_config.json").read_text())
    assert families()[family].scheduler.items() <= scheduler.items()


@every_family
def test_and_back_bit_for_bit(family: str, repos: Callable[[str], Path], tmp_path: Path) -> None:
    back = tmp_path / "back.safetensors"
    weightport.convert(repos(family), back, to="ldm", sync=False)
    assert same(load_file(back), bundle(family))


@every_family
def test_a_token_table_that_is_there_twice_is_not_kept_twice(
    family: str, repos: Callable[[str], Path]
) -> None:
    repo = repos(family)
    kept = load_file(repo.with_name(f"{family}.residue.safetensors"))
    assert not any("embed_tokens" in key for key in kept)
    assert kept.keys() == extras(family).keys() - {f"{T5}encoder.embed_tokens.weight"}


def test_without_residue_the_models_come_back(repos: Callable[[str], Path], tmp_path: Path) -> None:
    back = tmp_path / "back.safetensors"
    weightport.convert(repos("sd3"), back, to="ldm", residue=False, sync=False)
    models: State = {}
    for name in families()["sd3"].components:
        models |= original("sd3", name)
    assert same(load_file(back), models)


def test_the_projection_of_sd3_is_the_identity_whatever_the_bundle_holds(
    repos: Callable[[str], Path], tmp_path: Path
) -> None:
    """The original programs pool before it, diffusers' class applies it."""
    found = tensors(repos("sd3"), "text_encoder")["text_projection.weight"]
    assert np.array_equal(found, np.eye(16, dtype=np.float32))
    report = json.loads((repos("sd3") / "conversion.json").read_text())
    assert "identity" in json.dumps(report["components"]["text_encoder"])
    state = {
        key: array
        for key, array in bundle("sd3").items()
        if "clip_l.transformer.text_proj" not in key
    }
    weightport.convert(write(tmp_path / "a.safetensors", state), tmp_path / "repo", sync=False)
    assert np.array_equal(
        tensors(tmp_path / "repo", "text_encoder")["text_projection.weight"], found
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sharded_half_precision_repos_back_to_one_file(dtype: str, tmp_path: Path) -> None:
    file = write(tmp_path / "m.safetensors", bundle("flux"))
    repo = tmp_path / "repo"
    weightport.convert(
        file, repo, dtype=dtype, variant="fp16", max_shard_size="100KB", residue=False, sync=False
    )
    assert len(list((repo / "transformer").glob("*.safetensors"))) > 2
    assert (repo / "transformer" / "diffusion_pytorch_model.safetensors.index.fp16.json").is_file()
    weightport.convert(repo, tmp_path / "back.safetensors", to="ldm", dtype="keep", sync=False)
    with (tmp_path / "back.safetensors").open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        header = json.loads(opened.read(length))
    word = {"float16": "F16", "bfloat16": "BF16"}[dtype]
    del header["__metadata__"]
    assert {entry["dtype"] for entry in header.values()} == {word}


# --- other forms ----------------------------------------------------------------------------------


def bare(state: State, front: str) -> State:
    """The same without the prefix of the part."""
    return {key.removeprefix(front): array for key, array in state.items()}


def test_a_bare_transformer_and_encoders_in_files_of_their_own(tmp_path: Path) -> None:
    """As Black Forest Labs and ComfyUI publish Flux."""
    files = [
        write(tmp_path / "flux1-dev.safetensors", bare(original("flux", "transformer"), U)),
        write(tmp_path / "ae.safetensors", bare(original("flux", "vae"), "first_stage_model.")),
        write(tmp_path / "clip_l.safetensors", weights("flux", "text_encoder")),
        write(tmp_path / "t5xxl.safetensors", weights("flux", "text_encoder_2")),
    ]
    result = weightport.convert(files, tmp_path / "repo", sync=False)
    assert (result.family, result.lacks) == ("flux", [])
    for name in families()["flux"].components:
        assert same(tensors(tmp_path / "repo", name), weights("flux", name)), name


@pytest.mark.parametrize("family", SD3)
def test_a_bare_mmdit_and_clips_without_t5(family: str, tmp_path: Path) -> None:
    """Trainers write it bare; CLIP-L comes without a projection, and T5 may be left out."""
    clip_l = dict(weights(family, "text_encoder"))
    del clip_l["text_projection.weight"]
    front = "text_encoders.clip_g.transformer."
    files = [
        write(tmp_path / "mmdit.safetensors", bare(original(family, "transformer"), U)),
        write(tmp_path / "vae.safetensors", bare(original(family, "vae"), "first_stage_model.")),
        write(tmp_path / "clip_l.safetensors", clip_l),
        write(
            tmp_path / "clip_g.safetensors",
            {front + key: array for key, array in weights(family, "text_encoder_2").items()},
        ),
    ]
    result = weightport.convert(files, tmp_path / "repo", sync=False)
    assert (result.family, result.lacks) == (family, [])
    for name in result.components:
        assert same(tensors(tmp_path / "repo", name), weights(family, name)), name
    index = json.loads((tmp_path / "repo" / "model_index.json").read_text())
    assert index["text_encoder_3"] == index["tokenizer_3"] == [None, None]
    assert not (tmp_path / "repo" / "tokenizer_3").exists()
    weightport.convert(tmp_path / "repo", tmp_path / "back.safetensors", to="ldm", sync=False)


def test_a_new_transformer_on_a_base(repos: Callable[[str], Path], tmp_path: Path) -> None:
    """What a fine-tune changed; T5 keeps its place, whatever the file is called."""
    new = weights("flux", "transformer", seed=1)
    files = [
        write(tmp_path / "tuned.safetensors", bare(original("flux", "transformer", new), U)),
        write(tmp_path / "t5.safetensors", weights("flux", "text_encoder_2")),
    ]
    result = weightport.convert(files, tmp_path / "repo", base=repos("flux"), sync=False)
    assert not result.lacks
    assert same(tensors(tmp_path / "repo", "transformer"), new)
    assert same(tensors(tmp_path / "repo", "vae"), weights("flux", "vae"))


@pytest.mark.parametrize(
    ("channels", "kind"), [(384, "FluxFillPipeline"), (128, "FluxControlPipeline")]
)
def test_input_channels_tell_the_pipeline_of_flux(channels: int, kind: str, tmp_path: Path) -> None:
    state = dict(weights("flux", "transformer"))
    state["x_embedder.weight"] = np.zeros((32, channels), np.float32)
    file = write(tmp_path / "m.safetensors", bare(original("flux", "transformer", state), U))
    weightport.convert(file, tmp_path / "repo", sync=False)
    assert json.loads((tmp_path / "repo" / "model_index.json").read_text())["_class_name"] == kind
    written = json.loads((tmp_path / "repo" / "transformer" / "config.json").read_text())
    assert (written["in_channels"], written["out_channels"]) == (channels, 64)


@pytest.mark.parametrize(("name", "family"), [("vae", "flux"), ("text_encoder_2", "flux")])
def test_what_keys_cannot_tell_is_asked_for(name: str, family: str, tmp_path: Path) -> None:
    state = (
        weights(family, name)
        if name != "vae"
        else bare(original(family, name), "first_stage_model.")
    )
    file = write(tmp_path / "m.safetensors", state)
    with pytest.raises(ConversionError, match=r"say --family sd3 or .* or flux or flux_schnell"):
        weightport.convert(file, tmp_path / "repo", dry_run=True)
    result = weightport.convert(file, tmp_path / "repo", family=family, sync=False)
    assert list(result.components) == [name]
    assert same(tensors(tmp_path / "repo", name), weights(family, name))
    written = json.loads((tmp_path / "repo" / name / "config.json").read_text())
    if name == "vae":
        assert (written["scaling_factor"], written["shift_factor"]) == (0.3611, 0.1159)


def fp8(state: State, folder: Path) -> Path:
    """A file whose matrices are floats of eight bits, and the others of sixteen."""
    path = folder / "fp8.safetensors"
    tensors = {
        key: torch.from_numpy(array).to(torch.float8_e4m3fn if array.ndim > 1 else torch.bfloat16)
        for key, array in state.items()
    }
    save_torch(tensors, path)
    return path


def test_floats_of_eight_bits_are_decoded_exactly(tmp_path: Path) -> None:
    """Fused ones too."""
    file = fp8(bare(original("flux", "transformer"), U), tmp_path)
    result = weightport.convert(file, tmp_path / "repo", sync=False)
    assert any("float8_e4m3fn become bfloat16" in note for note in result.notes)
    weights_file = tmp_path / "repo" / "transformer" / "diffusion_pytorch_model.safetensors"
    found = load_torch(weights_file)
    for key, array in weights("flux", "transformer").items():
        expected = torch.from_numpy(array)
        expected = expected.to(torch.float8_e4m3fn) if array.ndim > 1 else expected
        assert torch.equal(found[key], expected.to(torch.bfloat16)), key


def test_scales_of_eight_bits_are_multiplied_in(tmp_path: Path) -> None:
    """As ComfyUI's scaled files have them, beside fused weights."""
    state = bare(original("flux", "transformer"), U)
    name = "double_blocks.0.img_attn.qkv"
    scaled = {
        key: torch.from_numpy(array).to(torch.float8_e4m3fn if array.ndim > 1 else torch.float32)
        for key, array in state.items()
    }
    scaled[f"{name}.scale_weight"] = torch.tensor(0.5)
    scaled["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    save_torch(scaled, tmp_path / "m.safetensors")
    weightport.convert(tmp_path / "m.safetensors", tmp_path / "repo", dtype="float32", sync=False)
    found = tensors(tmp_path / "repo", "transformer")["transformer_blocks.0.attn.to_k.weight"]
    expected = scaled[f"{name}.weight"].float()[32:64] * 0.5
    assert np.array_equal(found, expected.numpy())


def test_the_card_speaks_of_what_runs_the_model(repos: Callable[[str], Path]) -> None:
    cards = [(repos(family) / "README.md").read_text() for family in ("flux", "sd3")]
    assert "- flux\n" in cards[0]
    for card in cards:
        assert "from diffusers import DiffusionPipeline" in card
        assert "from weightport import DiffusionPipeline" in card


# --- damaged and strange --------------------------------------------------------------------------

Change = Callable[[State], State]


def without(part: str) -> Change:
    return lambda state: {key: array for key, array in state.items() if part not in key}


def with_tensor(key: str, shape: tuple[int, ...]) -> Change:
    return lambda state: {**state, key: np.zeros(shape, np.float32)}


DAMAGED: list[tuple[str, str, Change, str]] = [
    (
        "flux",
        "a missing tensor",
        without("double_blocks.1.img_mlp.0.bias"),
        r"double_blocks\.1\.img_mlp",
    ),
    ("flux", "a missing block", without("single_blocks.1."), r"single_blocks\.[12]"),
    ("sd3", "a missing block", without("joint_blocks.1."), r"joint_blocks\."),
    (
        "flux",
        "a row short",
        with_tensor(f"{U}single_blocks.0.linear1.weight", (223, 32)),
        r"single_blocks\.0\.linear1\.weight.*223.*shares",
    ),
    ("sd3", "no square", with_tensor(f"{U}pos_embed", (1, 35, 128)), r"pos_embed"),
    (
        "sd3",
        "a row short",
        with_tensor(f"{U}joint_blocks.0.x_block.attn.qkv.weight", (383, 128)),
        r"x_block\.attn\.qkv\.weight.*383",
    ),
    (
        "flux",
        "another table",
        with_tensor(f"{T5}encoder.embed_tokens.weight", (32128, 16)),
        r"embed_tokens\.weight` is not what `.*shared\.weight` is",
    ),
    (
        "flux",
        "a table of other size",
        with_tensor(f"{T5}encoder.embed_tokens.weight", (32127, 16)),
        r"embed_tokens\.weight` is not what",
    ),
    (
        "flux",
        "a LoRA inside",
        with_tensor(f"{U}double_blocks.0.img_attn.proj.lora_A.weight", (4, 32)),
        r"lora_A",
    ),
]


@pytest.mark.parametrize(
    ("family", "what", "change", "message"), DAMAGED, ids=[f"{d[0]} {d[1]}" for d in DAMAGED]
)
def test_damage_is_one_line_that_names_the_original_key(
    family: str, what: str, change: Change, message: str, tmp_path: Path
) -> None:
    file = write(tmp_path / "m.safetensors", change(bundle(family)))
    with pytest.raises(ConversionError, match=message) as error:
        weightport.convert(file, tmp_path / "repo", sync=False)
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.safetensors"]


def test_pruned_models_and_other_position_tables_are_models(tmp_path: Path) -> None:
    """Depths are counted, sides are measured; nothing is matched with literal sizes."""
    file = write(tmp_path / "m.safetensors", bundle("sd35_medium"))
    result = weightport.convert(file, tmp_path / "repo", dry_run=True)
    written = result.components["transformer"].config
    assert (written["num_layers"], written["pos_embed_max_size"]) == (3, 6)
    assert written["dual_attention_layers"] == [0, 1]


def test_prediction_type_makes_no_sense_for_a_flow(tmp_path: Path) -> None:
    file = write(tmp_path / "m.safetensors", bare(original("flux", "transformer"), U))
    with pytest.raises(ConversionError, match=r"--prediction-type epsilon: .*flow"):
        weightport.convert(file, tmp_path / "repo", prediction_type="epsilon")
