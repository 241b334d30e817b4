"""The way back to an original checkpoint: exact from every form of a repo; without residue, what is
made is listed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import weightport
from weightport.mappings.families import families

from ...support.synthetic import State, write_controlnet, write_repo

FAMILIES = ("sd1", "sd2", "sdxl", "sdxl_refiner", "upscaler")
P, V, C = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer."
FORMS: dict[str, dict[str, Any]] = {
    "float32": {},
    "float16": {"dtype": "float16"},
    "sharded": {"max_shard_size": "300KB"},
    "variant": {"dtype": "float16", "variant": "fp16", "max_shard_size": "300KB"},
}


def same(found: State, expected: State) -> bool:
    return found.keys() == expected.keys() and all(
        (found[key].dtype, found[key].tobytes()) == (expected[key].dtype, expected[key].tobytes())
        for key in expected
    )


def there_and_back(
    state: State, folder: Path, metadata: dict[str, str] | None = None, **options: Any
) -> State:
    """An original state dict through a repo, with its residue."""
    save_file(state, folder / "model.safetensors", metadata)
    weightport.convert(folder / "model.safetensors", folder / "repo", **options)
    weightport.convert(folder / "repo", folder / "again.safetensors", to="ldm")
    return load_file(folder / "again.safetensors")


# --- with residue ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "form"),
    [("sd1", form) for form in FORMS] + [(family, "variant") for family in FAMILIES[1:]],
)
def test_from_every_form_of_a_repo(
    family: str, form: str, original_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """Shards, variants and halves: the same tensors, in the precision that the repo has."""
    state = load_file(original_of(family)) | {"alphas_cumprod": np.linspace(1, 0.01, 1000)}
    again = there_and_back(state, tmp_path, prediction_type="epsilon", **FORMS[form])
    parts = len(list((tmp_path / "repo" / "unet").glob("*.safetensors")))
    assert (parts > 1) == ("max_shard_size" in FORMS[form])
    half = np.float16 if "dtype" in FORMS[form] else np.float32
    assert same(
        again,
        {
            key: value if value.dtype == np.float64 else value.astype(half)
            for key, value in state.items()
        },
    )


@pytest.mark.parametrize(
    ("family", "form"), [("sd1", "sharded"), ("sd2", "float16"), ("sdxl", "variant")]
)
def test_a_controlnet_from_every_form(family: str, form: str, tmp_path: Path) -> None:
    write_controlnet(tmp_path / "source", family)
    weightport.convert(tmp_path / "source", tmp_path / "control.safetensors", to="ldm")
    state = load_file(tmp_path / "control.safetensors")
    half = np.float16 if "dtype" in FORMS[form] else np.float32
    again = there_and_back(state, tmp_path, **FORMS[form])
    assert same(again, {key: value.astype(half) for key, value in state.items()})


CHANNELS = [
    (family, channels)
    for family in FAMILIES
    for channels in families()[family].pipelines
    if channels not in (4, 7)
]


@pytest.mark.parametrize(("family", "channels"), CHANNELS)
def test_inpainting_editing_and_depth_models(
    family: str, channels: int, original_of: Callable[[str], Path], tmp_path: Path
) -> None:
    state = load_file(original_of(family))
    first = state[f"{P}input_blocks.0.0.weight"]
    rng = np.random.default_rng(channels)
    state[f"{P}input_blocks.0.0.weight"] = rng.standard_normal(
        (len(first), channels, 3, 3), np.float32
    )
    if channels == 5:
        state["depth_model.model.pretrained.model.cls_token"] = np.ones((1, 1, 4), np.float32)
    assert same(there_and_back(state, tmp_path, prediction_type="epsilon"), state)


PARTS = {
    "UNet": P,
    "VAE": V,
    "text encoder": C,
    "text encoder without `text_model.`": f"{C}text_model.",
}


@pytest.mark.parametrize("alone", [True, False], ids=["without prefix", "with prefix"])
@pytest.mark.parametrize("part", ["UNet", "VAE"])
def test_files_of_one_part(
    part: str, alone: str, original_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """The prefix comes back if it was there, and only then."""
    mine = {
        key: value
        for key, value in load_file(original_of("sd1")).items()
        if key.startswith(PARTS[part])
    }
    state = {key.removeprefix(PARTS[part]): value for key, value in mine.items()} if alone else mine
    assert same(there_and_back(state, tmp_path), state)


@pytest.mark.parametrize("nai", [True, False], ids=["NAI naming", "usual naming"])
def test_files_of_a_text_encoder(
    nai: bool, original_of: Callable[[str], Path], tmp_path: Path
) -> None:
    state = {
        key: value for key, value in load_file(original_of("sd1")).items() if key.startswith(C)
    }
    state = {key.replace("text_model.", "") if nai else key: value for key, value in state.items()}
    state |= {f"{C}{'' if nai else 'text_model.'}embeddings.position_ids": np.arange(77)[None]}
    assert same(there_and_back(state, tmp_path), state)


def test_metadata_and_training_step_come_back(
    original_of: Callable[[str], Path], tmp_path: Path
) -> None:
    state = load_file(original_of("sd1"))
    there_and_back(state, tmp_path, {"modelspec.title": "mine", "global_step": "470000"})
    with safe_open(tmp_path / "again.safetensors", "np") as file:
        assert file.metadata()["modelspec.title"] == "mine"
        assert file.metadata()["global_step"] == "470000"


# --- without residue ------------------------------------------------------------------------------


def back(repo: Path, folder: Path, **options: Any) -> tuple[State, weightport.Conversion]:
    conversion = weightport.convert(repo, folder / "back.safetensors", to="ldm", **options)
    return load_file(folder / "back.safetensors"), conversion


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_regenerated_is_listed(
    family: str, repo_of: Callable[[str], Path], original_of: Callable[[str], Path], tmp_path: Path
) -> None:
    state, conversion = back(repo_of(family), tmp_path)
    made = conversion.report["regenerated"]
    assert state.keys() == load_file(original_of(family)).keys() | made.keys()
    assert made
    assert all(made.values())
    listed = [
        note
        for note in conversion.notes
        if note.startswith("regenerated, as no residue holds it: ")
    ]
    assert len(listed) == len(set(made.values()))
    assert not any(key in note and how not in note for note in listed for key, how in made.items())


def test_a_residue_leaves_nothing_to_regenerate(
    original_of: Callable[[str], Path], tmp_path: Path
) -> None:
    weightport.convert(original_of("sd1"), tmp_path / "repo")
    kept, conversion = back(tmp_path / "repo", tmp_path)
    assert conversion.report["regenerated"] == {}
    (tmp_path / "back.safetensors").unlink()
    made, conversion = back(tmp_path / "repo", tmp_path, residue=False)
    assert made.keys() - kept.keys() == conversion.report["regenerated"].keys()


def test_position_ids_and_the_schedule_are_those_of_the_original(
    repo_of: Callable[[str], Path], tmp_path: Path
) -> None:
    state, _ = back(repo_of("sd1"), tmp_path)
    ids = state[f"{C}text_model.embeddings.position_ids"]
    assert (ids.dtype, ids.tolist()) == (np.int64, [list(range(77))])
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    kept = np.cumprod(1 - betas)
    assert state["betas"].dtype == np.float32
    np.testing.assert_allclose(state["betas"], betas, rtol=1e-6)
    np.testing.assert_allclose(state["alphas_cumprod"], kept, rtol=1e-6)
    np.testing.assert_allclose(
        state["sqrt_recipm1_alphas_cumprod"], np.sqrt(1 / kept - 1), rtol=1e-6
    )
    assert state["posterior_variance"][0] == 0


def test_openclips_unused_layer_is_made_up(repo_of: Callable[[str], Path], tmp_path: Path) -> None:
    state, conversion = back(repo_of("sd2"), tmp_path)
    layers = "cond_stage_model.model.transformer.resblocks."
    unused = {key for key in state if key.startswith(f"{layers}23.")}
    assert len(unused) == 12
    assert all(
        state[key].tobytes() == state[key.replace(".23.", ".22.")].tobytes() for key in unused
    )
    assert np.array_equal(state["cond_stage_model.model.text_projection"], np.eye(64))
    assert all("not trained" in conversion.report["regenerated"][key] for key in unused)


@pytest.mark.parametrize("markers", [("v_pred",), ("v_pred", "ztsnr")], ids=" ".join)
@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_what_it_predicts_survives_without_residue(
    family: str, markers: tuple[str, ...], original_of: Callable[[str], Path], tmp_path: Path
) -> None:
    state = load_file(original_of(family)) | dict.fromkeys(markers, np.zeros(0, np.float32))
    save_file(state, tmp_path / "model.safetensors")
    weightport.convert(tmp_path / "model.safetensors", tmp_path / "repo", residue=False)
    found, _ = back(tmp_path / "repo", tmp_path)
    assert ({"v_pred", "ztsnr"} & found.keys()) == (set(markers) if family == "sdxl" else set())
    weightport.convert(tmp_path / "back.safetensors", tmp_path / "again", residue=False)
    config = "scheduler/scheduler_config.json"
    assert (tmp_path / "again" / config).read_text() == (tmp_path / "repo" / config).read_text()


@pytest.mark.parametrize("markers", [("v_pred",), ("v_pred", "ztsnr")], ids=" ".join)
@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_what_it_predicts_survives_from_file_to_file(
    family: str, markers: tuple[str, ...], original_of: Callable[[str], Path], tmp_path: Path
) -> None:
    save_file(
        load_file(original_of(family)) | dict.fromkeys(markers, np.zeros(0, "f4")),
        tmp_path / "model.safetensors",
    )
    weightport.convert(
        tmp_path / "model.safetensors", tmp_path / "back.safetensors", to="ldm", residue=False
    )
    for name in ("model", "back"):
        weightport.convert(tmp_path / f"{name}.safetensors", tmp_path / name, residue=False)
    config = "scheduler/scheduler_config.json"
    assert (tmp_path / "back" / config).read_text() == (tmp_path / "model" / config).read_text()


def test_a_file_that_does_not_say_what_it_predicts_makes_none_that_does(
    original_of: Callable[[str], Path], tmp_path: Path
) -> None:
    weightport.convert(original_of("sd2"), tmp_path / "back.safetensors", to="ldm", residue=False)
    with safe_open(tmp_path / "back.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_repo_of_some_components_gets_no_schedule(tmp_path: Path) -> None:
    state, _ = back(write_repo(tmp_path / "repo", "sd1", components=["vae"]), tmp_path)
    assert all(key.startswith(V) for key in state)


def test_any_layout_reaches_any_other(
    sd1_keras: dict[str, Path], original_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """KerasCV -> original -> KerasCV, and original -> KerasCV -> original, the models' tensors bit
    for bit."""
    weightport.convert(list(sd1_keras.values()), tmp_path / "one.safetensors", to="ldm")
    assert not weightport.diff(tmp_path / "one.safetensors", original_of("sd1")).differences
    weightport.convert(tmp_path / "one.safetensors", tmp_path / "model.weights.h5", to="kerascv")
    for part in sd1_keras:
        assert not weightport.diff(
            tmp_path / f"model.{part}.weights.h5", sd1_keras[part]
        ).differences


@pytest.mark.parametrize("to", ["ldm", "kerascv"])
def test_a_variant_is_of_a_repo(
    to: Literal["ldm", "kerascv"], repo_of: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(weightport.ConversionError, match="--variant fp16: names files of a repo"):
        weightport.convert(repo_of("sd1"), tmp_path / "back.safetensors", to=to, variant="fp16")
