"""Chroma, Z-Image and Flux.2: original files to repositories and back, judged by diffusers."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_chroma_transformer_checkpoint_to_diffusers,
    convert_flux2_transformer_checkpoint_to_diffusers,
    convert_z_image_transformer_checkpoint_to_diffusers,
)
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch

import weightport
from weightport.errors import ConversionError
from weightport.mappings.families import families

from ...support.converter_rows import assert_rows_go_where_theirs_go
from ...support.full_size import headers_only
from ...support.transformer_families import (
    CHROMA,
    FLUX2,
    ZIMAGE,
    State,
    component,
    config,
    original,
    table_of,
    weights,
    write,
)

U = "model.diffusion_model."
CONVERTERS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "ChromaTransformer2DModel": convert_chroma_transformer_checkpoint_to_diffusers,
    "ZImageTransformer2DModel": convert_z_image_transformer_checkpoint_to_diffusers,
    "Flux2Transformer2DModel": convert_flux2_transformer_checkpoint_to_diffusers,
}
DISTINCT = ("chroma", "zimage_turbo", "flux2", "flux2_klein_4b")
"""Of families with the same tensors the one that is preferred."""
every_model = pytest.mark.parametrize("family", DISTINCT)
every_family = pytest.mark.parametrize("family", [*CHROMA, *ZIMAGE, *FLUX2])


def bare(state: State) -> State:
    """The tensors without the place that ComfyUI has for them."""
    return {key.removeprefix(U): array for key, array in state.items()}


def same(one: State, other: State) -> bool:
    """Whether two state dicts have the same keys, dtypes and bytes."""
    return one.keys() == other.keys() and all(
        one[key].dtype == other[key].dtype and one[key].tobytes() == other[key].tobytes()
        for key in one
    )


def written(repo: Path) -> State:
    """The weights of the transformer of a repo."""
    (file,) = (repo / "transformer").glob("*.safetensors")
    return load_file(file)


# --- there and back -------------------------------------------------------------------------------


@pytest.mark.parametrize("front", ["", U, "module."])
@every_model
def test_there_and_back_bit_for_bit(family: str, front: str, tmp_path: Path) -> None:
    """Diffusers' own class loads what is written, every tensor of it; and the file comes back."""
    state = {front + key: array for key, array in bare(original(family, "transformer")).items()}
    file = write(tmp_path / "m.safetensors", state)
    result = weightport.convert(file, tmp_path / "repo", sync=False)
    assert result.family == family
    assert same(written(tmp_path / "repo"), weights(family, "transformer"))
    kind: Any = getattr(diffusers, component(family, "transformer").class_name)
    model, told = kind.from_pretrained(tmp_path / "repo" / "transformer", output_loading_info=True)
    assert not any(told.values()), told
    loaded = {key: tensor.numpy() for key, tensor in model.state_dict().items()}
    assert same(loaded, weights(family, "transformer"))
    expected = config(family, "transformer")
    assert {key: model.config[key] for key in expected} == expected
    weightport.convert(tmp_path / "repo", tmp_path / "back.safetensors", to="ldm", sync=False)
    assert same(load_file(tmp_path / "back.safetensors"), state)


@every_model
def test_rows_go_where_diffusers_converter_puts_them(family: str) -> None:
    """At full width, which its converter of Chroma asks for; told by numbers that are the same
    along the other axes, so that they take no memory."""
    known = component(family, "transformer")
    few = {"num_layers": 1, "num_single_layers": 1, "n_layers": 2, "n_refiner_layers": 1}
    settings = known.config | {key: few[key] for key in few if key in known.config}
    targets = known.model.tensors(settings)
    links = table_of(family, "transformer").links(targets, known.model.names(settings))
    assert_rows_go_where_theirs_go(links, targets, CONVERTERS[known.class_name], prefix=U)


@every_family
def test_full_size_is_planned_from_the_header_alone(family: str, tmp_path: Path) -> None:
    """Both ways, in under a second of CPU; and nothing is read."""
    known = component(family, "transformer")
    targets = known.manifest()
    links = table_of(family, "transformer").links(targets, known.model.names(known.config))
    shapes = {link.sources[0].removeprefix(U): link.source_shape(targets) for link in links}
    file = headers_only(tmp_path / "m.safetensors", shapes)
    folder = tmp_path / "diffusers"
    folder.mkdir()
    headers_only(folder / "diffusion_pytorch_model.safetensors", targets)
    stated = {"_class_name": known.class_name, **known.config}
    (folder / "config.json").write_text(json.dumps(stated))
    ways = ((file, tmp_path / "repo", None), (folder, tmp_path / "back.safetensors", "ldm"))
    for source, output, to in ways:
        options: dict[str, Any] = {"family": family, "dry_run": True}
        options |= {"to": to} if to else {}
        weightport.convert(source, output, **options)  # what is read once: tables
        start = time.process_time()
        result = weightport.convert(source, output, **options)
        assert time.process_time() - start < 1
        assert result.family == family
        assert result.components["transformer"].config.items() >= known.config.items()


# --- what the repo says ---------------------------------------------------------------------------

SAID = {  # family -> the pipeline, and what else its index says
    "chroma": ("ChromaPipeline", {}),
    "zimage": ("ZImagePipeline", {}),
    "flux2": ("Flux2Pipeline", {}),
    "flux2_klein_4b": ("Flux2KleinPipeline", {"is_distilled": True}),
    "flux2_klein_base_9b": ("Flux2KleinPipeline", {"is_distilled": False}),
}


@pytest.mark.parametrize("family", SAID)
def test_the_repo_is_of_the_pipeline_and_schedule_of_its_family(
    family: str, tmp_path: Path
) -> None:
    file = write(tmp_path / "m.safetensors", original(family, "transformer"))
    result = weightport.convert(file, tmp_path / "repo", family=family, sync=False)
    index = json.loads((tmp_path / "repo" / "model_index.json").read_text())
    kind, more = SAID[family]
    assert index["_class_name"] == kind
    assert hasattr(diffusers, kind)
    assert more.items() <= index.items()
    stated = json.loads((tmp_path / "repo" / "scheduler" / "scheduler_config.json").read_text())
    scheduler = families()[family].scheduler
    assert scheduler.items() <= stated.items()
    known = getattr(diffusers, scheduler["_class_name"]).from_config(stated).config
    assert all(known[key] == value for key, value in scheduler.items() if key[0] != "_")
    for name, (library, class_name) in families()[family].copied.items():
        assert f"{name} ({class_name} of {library}" in " ".join(result.lacks)
        assert name not in index
    card = (tmp_path / "repo" / "README.md").read_text()
    assert "from weightport import" not in card


@pytest.mark.parametrize(
    ("family", "others"),
    [
        ("chroma", "Chroma1-Base, Chroma1-Flash"),
        ("zimage_turbo", "Z-Image"),
        ("flux2_klein_9b", "FLUX.2 klein base 9B"),
    ],
)
def test_what_tensors_cannot_tell_is_said(family: str, others: str, tmp_path: Path) -> None:
    known = component(family, "transformer")
    links = table_of(family, "transformer").links(known.manifest(), known.config)
    shapes = {link.sources[0]: link.source_shape(known.manifest()) for link in links}
    file = headers_only(tmp_path / "m.safetensors", shapes)
    result = weightport.convert(file, tmp_path / "repo", dry_run=True)
    assert result.family == family
    assert any(f"the weights fit {others} as well: --family" in note for note in result.notes)
    (part,) = weightport.inspect(file).parts
    assert part.evidence


def test_chroma_is_whole_with_the_vae_of_flux_and_t5(tmp_path: Path) -> None:
    """Each a file, as people have them."""
    files = [
        write(tmp_path / f"{name}.safetensors", bare(original("chroma", name)))
        for name in ("transformer", "vae", "text_encoder")
    ]
    result = weightport.convert(files, tmp_path / "repo", sync=False)
    assert not result.lacks
    index = json.loads((tmp_path / "repo" / "model_index.json").read_text())
    assert index["text_encoder"] == ["transformers", "T5EncoderModel"]
    assert (tmp_path / "repo" / "tokenizer" / "tokenizer.json").is_file()
    pipe: Any = diffusers.ChromaPipeline
    loaded = pipe.from_pretrained(tmp_path / "repo", local_files_only=True)
    found = {key: tensor.numpy() for key, tensor in loaded.transformer.state_dict().items()}
    assert same(found, weights("chroma", "transformer"))


# --- components that are not converted ------------------------------------------------------------


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A repo of Z-Image with a text encoder of another class, as diffusers has it."""
    files = [
        write(tmp_path / f"{name}.safetensors", original("zimage", name))
        for name in ("transformer", "vae")
    ]
    repo = tmp_path / "base"
    weightport.convert(files, repo, family="zimage", sync=False)
    place = repo / "model_index.json"
    index = json.loads(place.read_text())
    for name, entry in families()["zimage"].copied.items():
        (repo / name).mkdir()
        index[name] = entry
    (repo / "text_encoder" / "config.json").write_text('{"architectures": ["Qwen3ForCausalLM"]}')
    write(repo / "text_encoder" / "model.safetensors", {"model.norm.weight": np.ones(3, "f4")})
    (repo / "tokenizer" / "tokenizer_config.json").write_text("{}")
    place.write_text(json.dumps(index))
    return repo


def test_a_repo_keeps_the_components_that_are_not_converted(base: Path, tmp_path: Path) -> None:
    result = weightport.convert(base, tmp_path / "out", dtype="float16", sync=False)
    assert not result.lacks
    assert any("taken over as they are" in note for note in result.notes)
    _check_copied(base, tmp_path / "out")


def test_a_file_gets_them_from_a_base(base: Path, tmp_path: Path) -> None:
    new = weights("zimage", "transformer", seed=1)
    file = write(tmp_path / "tuned.safetensors", bare(original("zimage", "transformer", new)))
    result = weightport.convert(file, tmp_path / "out", base=base, family="zimage", sync=False)
    assert not result.lacks
    assert not any("left out" in note for note in result.notes)
    assert same(written(tmp_path / "out"), new)
    _check_copied(base, tmp_path / "out")


def _check_copied(base: Path, repo: Path) -> None:
    for place in ("text_encoder/model.safetensors", "tokenizer/tokenizer_config.json"):
        assert (repo / place).read_bytes() == (base / place).read_bytes()
    theirs, ours = (json.loads((one / "model_index.json").read_text()) for one in (base, repo))
    assert ours == theirs


def test_without_them_a_base_is_no_help_and_they_are_named(base: Path, tmp_path: Path) -> None:
    shutil.rmtree(base / "text_encoder")
    file = write(tmp_path / "m.safetensors", bare(original("zimage", "transformer")))
    result = weightport.convert(file, tmp_path / "out", base=base, family="zimage", sync=False)
    assert [gap.partition(" ")[0] for gap in result.lacks] == ["text_encoder"]


# --- forms of the files ---------------------------------------------------------------------------


@every_model
def test_floats_of_eight_bits_are_decoded_exactly(family: str, tmp_path: Path) -> None:
    """Plain and scaled."""
    state = bare(original(family, "transformer"))
    narrow = {
        key: torch.from_numpy(array).to(torch.float8_e4m3fn if array.ndim > 1 else torch.bfloat16)
        for key, array in state.items()
    }
    scaled = next(key for key, array in state.items() if key.endswith("qkv.weight"))
    narrow[scaled.replace(".weight", ".scale_weight")] = torch.tensor(0.5)
    narrow["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    save_torch(narrow, tmp_path / "m.safetensors")
    result = weightport.convert(tmp_path / "m.safetensors", tmp_path / "repo", sync=False)
    assert any("float8_e4m3fn become bfloat16" in note for note in result.notes)
    (file,) = (tmp_path / "repo" / "transformer").glob("*.safetensors")
    found = load_torch(file)
    table = table_of(family, "transformer")
    names = component(family, "transformer").model.names(config(family, "transformer"))
    for link in table.links(found, names):
        key = link.sources[0].removeprefix(U)
        source = narrow[key].float() * (0.5 if key == scaled else 1)
        results = link.op.apply([source.numpy()], len(link.targets)) if link.op else [source]
        for target, array in zip(link.targets, results, strict=True):
            expected = torch.as_tensor(np.ascontiguousarray(array)).bfloat16()
            assert torch.equal(found[target], expected), target


def test_a_norm_that_z_image_does_not_apply_comes_back(tmp_path: Path) -> None:
    state = {**bare(original("zimage", "transformer")), "norm_final.weight": np.ones(128, "f4")}
    file = write(tmp_path / "m.safetensors", state)
    weightport.convert(file, tmp_path / "repo", family="zimage", sync=False)
    weightport.convert(tmp_path / "repo", tmp_path / "back.safetensors", to="ldm", sync=False)
    assert same(load_file(tmp_path / "back.safetensors"), state)


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("chroma", "distilled_guidance_layer.norms.1.scale", r"norms\.1\.scale"),
        ("zimage_turbo", "noise_refiner.0.attention.qkv.weight", r"noise_refiner\.0"),
        ("flux2", "single_blocks.1.linear2.weight", r"single_blocks\.1\.linear2"),
    ],
)
def test_damage_is_named_by_the_original_key(
    family: str, change: str, message: str, tmp_path: Path
) -> None:
    state = bare(original(family, "transformer"))
    del state[change]
    file = write(tmp_path / "m.safetensors", state)
    with pytest.raises(ConversionError, match=message):
        weightport.convert(file, tmp_path / "repo", sync=False)
    assert not (tmp_path / "repo").exists()


@pytest.mark.parametrize(
    ("key", "what"),
    [
        ("noise_refiner.0.adaLN_modulation.1.weight", "Lumina 2"),
        ("nerf_blocks.0.norm.scale", "Chroma Radiance"),
    ],
)
def test_what_looks_like_one_of_them_is_named(key: str, what: str, tmp_path: Path) -> None:
    family = "chroma" if "nerf" in key else "zimage_turbo"
    state = {**bare(original(family, "transformer")), key: np.ones((2, 2), "f4")}
    with pytest.raises(ConversionError, match=f"looks like {what}"):
        weightport.convert(write(tmp_path / "m.safetensors", state), tmp_path / "repo")
