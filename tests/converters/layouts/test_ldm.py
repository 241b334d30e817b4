"""Original checkpoints in every form they come in: prefixes, averages, single parts, containers,
superfluities."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import weightport
from weightport.converters.planning.candidates import candidates
from weightport.mappings.library import load_table

from ...support.synthetic import STEMS, State, average_name, weights

P, V = "model.diffusion_model.", "first_stage_model."
C = "cond_stage_model.transformer."
FAMILIES = ("sd1", "sd2", "sdxl", "sdxl_refiner")
every_family = pytest.mark.parametrize("family", FAMILIES)


def part(state: State, prefix: str) -> State:
    return {key: value for key, value in state.items() if key.startswith(prefix)}


def bare(state: State, prefix: str) -> State:
    """One part without its prefix."""
    return {key.removeprefix(prefix): value for key, value in part(state, prefix).items()}


def convert(state: State, folder: Path, **options: Any) -> weightport.Conversion:
    """Convert a state dict that lies in a `.safetensors` file."""
    save_file(state, folder / "model.safetensors")
    return weightport.convert(
        folder / "model.safetensors", folder / "repo", residue=False, **options
    )


def written(repo: Path, component: str) -> State:
    return load_file(repo / component / f"{STEMS[component]}.safetensors")


def assert_same(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    assert all(found[key].tobytes() == expected[key].tobytes() for key in expected)


@pytest.fixture
def sd1(original_of: Callable[[str], Path]) -> State:
    return load_file(original_of("sd1"))


@pytest.fixture
def sd2(original_of: Callable[[str], Path]) -> State:
    return load_file(original_of("sd2"))


# --- what else is in them -------------------------------------------------------------------------


def test_sd2_leaves_out_what_stable_diffusion_2_does_not_use(sd2: State, tmp_path: Path) -> None:
    """The last layer, the projection and the temperature of OpenCLIP are not part of the text
    encoder."""
    encoder = "cond_stage_model.model."
    first = part(sd2, f"{encoder}transformer.resblocks.0.")
    more = {key.replace("resblocks.0.", "resblocks.23."): value for key, value in first.items()}
    more |= {
        f"{encoder}logit_scale": np.zeros((), "f4"),
        f"{encoder}attn_mask": np.zeros((77, 77), "f4"),
    }
    more |= {f"{encoder}text_projection": np.ones((64, 64), np.float32)}
    repo = convert(part(sd2, encoder) | more, tmp_path).output
    assert_same(written(repo, "text_encoder"), weights("sd2", "text_encoder"))
    table = load_table("openclip_sd2")
    assert all(map(table.ignored({"num_hidden_layers": 23}), more))
    assert len(more) == 12 + 3


def test_schedule_buffers_and_training_leftovers_are_left_out_with_a_reason(
    sd1: State, tmp_path: Path
) -> None:
    numbers = np.linspace(1, 0.01, 1000, dtype=np.float32)
    more = dict.fromkeys(
        ["betas", "alphas_cumprod", "sqrt_recip_alphas_cumprod", "posterior_variance"], numbers
    )
    more |= {"model_ema.decay": np.zeros((), "f4"), "model_ema.num_updates": np.zeros((), "i4")}
    more |= {
        "first_stage_model.loss.logvar": np.zeros((), "f4"),
        "cond_stage_model.logit_scale": np.zeros((), "f4"),
    }
    repo = convert(sd1 | more, tmp_path).output
    for name in ("unet", "vae", "text_encoder"):
        assert_same(written(repo, name), weights("sd1", name))
    left_out = weightport.inspect(tmp_path / "model.safetensors").parts[0].skipped
    assert sum(left_out.values()) == len(more)
    assert all(left_out)


def test_a_projection_beside_the_clip_encoder_is_left_out(
    original_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """Web UIs save SDXL's first encoder with the projection that transformers' class has and SDXL
    does not use."""
    prefix = "conditioner.embedders.0."
    state = part(load_file(original_of("sdxl")), prefix)
    state |= {f"{prefix}transformer.text_projection.weight": np.ones((64, 64), np.float32)}
    state |= {f"{prefix}logit_scale": np.ones((), np.float32)}
    assert_same(
        written(convert(state, tmp_path).output, "text_encoder"), weights("sdxl", "text_encoder")
    )


SPELLINGS = (
    "text_model.embeddings.position_ids",
    "text_model.encoder.text_model.embeddings.position_ids",
)


@pytest.mark.parametrize("dtype", ["int64", "float16"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_rounded_position_ids_do_not_matter(
    sd1: State, spelling: str, dtype: Any, tmp_path: Path
) -> None:
    """Merging averages them as if they were weights; a model rebuilds them as 0, 1, 2, ..."""
    ids = (np.arange(77) * 0.9999).astype(dtype)[None]
    repo = convert(part(sd1, C) | {C + spelling: ids}, tmp_path).output
    assert_same(written(repo, "text_encoder"), weights("sd1", "text_encoder"))


def test_an_integer_weight_is_refused_by_name(sd1: State, tmp_path: Path) -> None:
    """Nothing turns integers into weights, or the reverse, on the way."""
    state = part(sd1, C)
    key = f"{C}text_model.final_layer_norm.bias"
    with pytest.raises(weightport.ConversionError, match=r"final_layer_norm\.bias. holds I64"):
        convert(state | {key: state[key].astype(np.int64)}, tmp_path, dtype="float16")


# --- prefixes and single parts --------------------------------------------------------------------


@pytest.mark.parametrize("ids", [True, False])
def test_nai_prefixes_load(sd1: State, tmp_path: Path, ids: list[int]) -> None:
    """The text encoder without `text_model.`, which diffusers reports as missing."""
    state = part(sd1, P) | part(sd1, V)
    state |= {key.replace("text_model.", ""): value for key, value in part(sd1, C).items()}
    if ids:
        state[f"{C}embeddings.position_ids"] = np.arange(77)[None]
    conversion = convert(state, tmp_path)
    assert conversion.lacks == []
    assert_same(written(conversion.output, "text_encoder"), weights("sd1", "text_encoder"))


@pytest.mark.parametrize(
    ("family", "prefix"),
    [*((family, "") for family in FAMILIES), ("sd1", "model.model.diffusion_model.")],
)
def test_a_unet_alone(
    family: str, prefix: str, original_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """Without its prefix, or with it twice; every family is told from the UNet's keys and
    shapes."""
    state = {prefix + key: value for key, value in bare(load_file(original_of(family)), P).items()}
    conversion = convert(state, tmp_path, prediction_type="epsilon")
    assert conversion.family == family
    assert_same(written(conversion.output, "unet"), weights(family, "unet"))
    assert json.loads((conversion.output / "model_index.json").read_text()).keys() >= {
        "unet",
        "scheduler",
    }


@pytest.mark.parametrize("prefix", [V, ""], ids=["usual", "bare"])
def test_a_vae_alone_is_shared_and_the_choice_is_told(
    sd1: State, prefix: str, tmp_path: Path
) -> None:
    """The VAEs of all families have the same keys and shapes; the scaling factor is another in
    SDXL."""
    state = {prefix + key: value for key, value in bare(sd1, V).items()}
    conversion = convert(state, tmp_path)
    assert_same(written(conversion.output, "vae"), weights("sd1", "vae"))
    assert scaling(conversion.output) == 0.18215
    (note,) = [note for note in conversion.notes if "--family" in note]
    assert "Stable Diffusion 2.x, Stable Diffusion XL" in note
    (inspected,) = weightport.inspect(tmp_path / "model.safetensors").parts
    assert len(inspected.families) == 4
    assert any(
        fact.startswith("the same in ") and "--family" in fact for fact in inspected.evidence
    )

    chosen = convert(state, tmp_path, family="sdxl", overwrite=True)
    assert scaling(chosen.output) == 0.13025
    assert not any("--family" in note for note in chosen.notes)
    assert (
        json.loads((chosen.output / "conversion.json").read_text())["options"]["family"] == "sdxl"
    )
    scheduler = json.loads((chosen.output / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["_class_name"] == "EulerDiscreteScheduler"  # SDXL's, not KerasCV's


def scaling(repo: Path) -> float:
    return json.loads((repo / "vae" / "config.json").read_text())["scaling_factor"]


ENCODERS = {
    "sd1": ("cond_stage_model.", "text_encoder"),
    "sd2": ("cond_stage_model.", "text_encoder"),
    "sdxl": ("conditioner.embedders.1.", "text_encoder_2"),
    "sdxl_refiner": ("conditioner.embedders.0.", "text_encoder_2"),
}


@every_family
def test_a_text_encoder_alone(
    family: str, original_of: Callable[[str], Path], tmp_path: Path
) -> None:
    prefix, name = ENCODERS[family]
    conversion = convert(part(load_file(original_of(family)), prefix), tmp_path)
    assert conversion.family == family
    assert_same(written(conversion.output, name), weights(family, name))


@pytest.mark.parametrize("image_half", [False, True])
@pytest.mark.parametrize("family", ["sd2", "sdxl"])
def test_an_openclip_file(
    family: str, image_half: bool, original_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """OpenCLIP's own checkpoints have no prefix; ViT-H and ViT-bigG are told apart by their
    layers."""
    prefix = {"sd2": "cond_stage_model.model.", "sdxl": "conditioner.embedders.1.model."}[family]
    state = bare(load_file(original_of(family)), prefix)
    state |= (
        {"visual.proj": np.ones((4, 4), "f4"), "logit_scale": np.ones((), "f4")}
        if image_half
        else {}
    )
    conversion = convert(state, tmp_path)
    assert conversion.family == family
    assert_same(
        written(conversion.output, ENCODERS[family][1]), weights(family, ENCODERS[family][1])
    )


@pytest.mark.parametrize("prefix", ["text_model.", ""], ids=["until transformers 5.5", "since"])
def test_a_text_encoder_as_transformers_saves_it(sd1: State, prefix: str, tmp_path: Path) -> None:
    """Without prefix its `encoder.layers` must not be taken for a VAE's encoder."""
    state = {prefix + key: value for key, value in bare(sd1, f"{C}text_model.").items()}
    assert_same(
        written(convert(state, tmp_path).output, "text_encoder"), weights("sd1", "text_encoder")
    )


def test_one_part_of_a_whole(original_of: Callable[[str], Path], tmp_path: Path) -> None:
    repo = weightport.convert(
        original_of("sdxl"), tmp_path / "repo", component="vae", residue=False
    ).output
    assert scaling(repo) == 0.13025
    assert not (repo / "unet").exists()


def test_a_separate_vae_takes_its_place_beside_a_unet(sd1: State, tmp_path: Path) -> None:
    save_file(part(sd1, P), tmp_path / "unet.safetensors")
    save_file(bare(sd1, V), tmp_path / "vae.safetensors")
    sources = [tmp_path / "unet.safetensors", tmp_path / "vae.safetensors"]
    conversion = weightport.convert(sources, tmp_path / "repo", residue=False)
    assert conversion.family == "sd1"
    assert_same(written(conversion.output, "vae"), weights("sd1", "vae"))


# --- moving averages ------------------------------------------------------------------------------


@every_family
def test_ema_names_decode_through_the_manifest(family: str) -> None:
    """LitEma removes the dots; on the keys of one model that can be undone, `1.1` and `11`
    included."""
    unet = next(c for c in candidates("ldm") if (c.part, c.family.name) == ("unet", family))
    assert len({average_name(key) for key in unet.links}) == len(unet.links)


def averages(state: State) -> State:
    return {average_name(key): value + np.float32(1) for key, value in part(state, P).items()}


def test_ambiguous_ema_names_find_their_tensors(sd1: State) -> None:
    """`input_blocks11...` is `1.1` (an attention) or `11` (a resnet): both are in SD 1.x."""
    names = averages(sd1)
    for key in (f"{P}input_blocks.1.1.norm.weight", f"{P}input_blocks.11.0.in_layers.0.weight"):
        assert np.array_equal(
            names["model_ema.diffusion_model" + key.removeprefix(P).replace(".", "")], sd1[key] + 1
        )


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_ema_alone_is_taken(
    family: str, original_of: Callable[[str], Path], tmp_path: Path
) -> None:
    state = load_file(original_of(family))
    repo = convert(averages(state), tmp_path).output
    assert_same(
        written(repo, "unet"), {key: value + 1 for key, value in weights(family, "unet").items()}
    )


def test_ema_beside_the_weights_is_taken_on_demand(sd1: State, tmp_path: Path) -> None:
    state = part(sd1, P) | averages(sd1) | {"model_ema.decay": np.zeros((), "f4")}
    plain = convert(state, tmp_path)
    assert_same(written(plain.output, "unet"), weights("sd1", "unet"))
    report = weightport.inspect(tmp_path / "model.safetensors").parts[0].skipped
    assert any("--ema" in reason and count == 686 for reason, count in report.items())

    averaged = convert(state, tmp_path, ema=True, overwrite=True)
    assert_same(
        written(averaged.output, "unet"), {k: v + 1 for k, v in weights("sd1", "unet").items()}
    )
    assert json.loads((averaged.output / "conversion.json").read_text())["options"]["ema"] is True


@pytest.mark.parametrize("baked", [True, False], ids=["--vae", "a second source"])
def test_ema_needs_an_average_of_the_unet_only(sd1: State, baked: bool, tmp_path: Path) -> None:
    save_file(part(sd1, P) | averages(sd1), tmp_path / "unet.safetensors")
    save_file(
        sd1 if baked else part(sd1, V), tmp_path / "vae.safetensors"
    )  # one with a UNet of its own
    sources, vae = [tmp_path / "unet.safetensors"], tmp_path / "vae.safetensors"
    options: dict[str, Any] = {"vae": vae} if baked else {}
    repo = weightport.convert(
        [*sources, *([] if baked else [vae])], tmp_path / "repo", ema=True, **options
    ).output
    assert_same(written(repo, "unet"), {k: v + 1 for k, v in weights("sd1", "unet").items()})
    assert_same(written(repo, "vae"), weights("sd1", "vae"))


def test_ema_that_is_not_there_or_not_known_is_refused(sd1: State, tmp_path: Path) -> None:
    for prefix in (P, V):
        with pytest.raises(
            weightport.ConversionError, match="--ema, but the file holds no moving average"
        ):
            convert(part(sd1, prefix), tmp_path, ema=True)
    with pytest.raises(
        weightport.ConversionError,
        match=r"1 averages belong to no tensor of a known part: .*blocks9junk",
    ):
        convert(
            averages(sd1) | {"model_ema.diffusion_modelinput_blocks9junk": np.ones(1, "f4")},
            tmp_path,
        )
    lacking = averages(sd1)
    del lacking["model_ema.diffusion_modelinput_blocks110in_layers0weight"]
    with pytest.raises(
        weightport.ConversionError, match=r"1 tensors .* are missing: .*input_blocks\.11\.0"
    ):
        convert(lacking, tmp_path)


# --- containers -----------------------------------------------------------------------------------


def test_every_container_of_one_state_dict_gives_the_same_repo(sd1: State, tmp_path: Path) -> None:
    """Torch zip and legacy pickles, nested as trainers nest them or not, and sharded
    safetensors."""
    state = {key: torch.from_numpy(value) for key, value in (part(sd1, P) | part(sd1, V)).items()}
    nested = {
        "state_dict": state,
        "global_step": 470000,
        "epoch": 3,
        "optimizer_states": [{"lr": 1e-4}],
    }
    torch.save(nested, tmp_path / "zip.ckpt")
    torch.save(nested, tmp_path / "legacy.ckpt", _use_new_zipfile_serialization=False)
    torch.save(state, tmp_path / "plain.ckpt")
    save_file({key: tensor.numpy() for key, tensor in state.items()}, tmp_path / "one.safetensors")
    sharded(sd1.keys() & state.keys(), sd1, tmp_path)
    sources = [
        "zip.ckpt",
        "legacy.ckpt",
        "plain.ckpt",
        "one.safetensors",
        "model.safetensors.index.json",
    ]
    first, *others = (
        weightport.convert(tmp_path / name, tmp_path / f"{name}-repo", residue=False).output
        for name in sources
    )
    files = sorted(str(path.relative_to(first)) for path in first.rglob("*") if path.is_file())
    assert "unet/diffusion_pytorch_model.safetensors" in files
    for other in others:
        assert (
            sorted(str(path.relative_to(other)) for path in other.rglob("*") if path.is_file())
            == files
        )
        for name in set(files) - {"conversion.json", "README.md"}:  # these name the source
            assert (first / name).read_bytes() == (other / name).read_bytes(), name


def sharded(keys: set[str], state: State, folder: Path) -> None:
    """Write a state dict as two shards and an index."""
    ordered = sorted(keys)
    shards = {f"model-0000{n + 1}-of-00002.safetensors": ordered[n::2] for n in (0, 1)}
    for name, mine in shards.items():
        save_file({key: state[key] for key in mine}, folder / name)
    weight_map = {key: name for name, mine in shards.items() for key in mine}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )


# --- and back -------------------------------------------------------------------------------------


@every_family
def test_original_to_repo_to_original_is_exact(
    family: str, original_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """Every tensor, byte for byte, with what a repo cannot hold, under names of another spelling,
    in any dtype."""
    state = load_file(original_of(family))
    state |= {
        "betas": np.linspace(0, 1, 1000),
        "v_pred": np.ones((), "f4"),
        "scale_factor": np.ones((), "f2"),
    }
    state |= {"model_ema.decay": np.ones((), "f4"), "model_ema.num_updates": np.ones((), "i4")}
    state |= averages(state)
    state |= {f"{prefix}.position_ids": np.arange(77)[None] for prefix in POSITIONS[family]}
    if family == "sd1":  # NAI naming
        state = {key.replace(f"{C}text_model.", C): value for key, value in state.items()}
    save_file(state, tmp_path / "model.safetensors", {"modelspec.title": "mine"})
    repo = weightport.convert(tmp_path / "model.safetensors", tmp_path / "repo").output
    weightport.convert(repo, tmp_path / "again.safetensors", to="ldm")
    again = load_file(tmp_path / "again.safetensors")
    assert_same(again, state)
    assert all(again[key].dtype == state[key].dtype for key in state)
    with safe_open(tmp_path / "again.safetensors", "np") as file:
        assert file.metadata()["modelspec.title"] == "mine"


POSITIONS = {
    "sd1": [f"{C}text_model.embeddings"],
    "sd2": [],
    "sdxl": ["conditioner.embedders.0.transformer.text_model.embeddings"],
    "sdxl_refiner": [],
}


# --- damage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "named"),
    [
        (f"{P}middle_block.1.norm.weight", "middle_block"),
        (f"{C}text_model.encoder.layers.7.mlp.fc1.bias", r"layers\.7\.mlp\.fc1\.bias"),
        (f"{V}decoder.conv_in.bias", r"decoder\.conv_in\.bias"),
    ],
    ids=["unet", "text encoder", "vae"],
)
def test_one_missing_tensor_fails_with_its_name(
    sd1: State, key: str, named: str, tmp_path: Path
) -> None:
    """Elsewhere it stays uninitialised without a word, or fails without saying which."""
    del sd1[key]
    with pytest.raises(
        weightport.ConversionError, match=f"1 tensors of the .* are missing: .*{named}"
    ):
        convert(sd1, tmp_path)
    assert not (tmp_path / "repo").exists()


def test_a_missing_layer_of_the_text_encoder_fails_with_names(sd1: State, tmp_path: Path) -> None:
    lost = part(sd1, f"{C}text_model.encoder.layers.7.")
    with pytest.raises(
        weightport.ConversionError, match=r"16 tensors of the CLIP .* are missing: .*layers\.7"
    ):
        convert({key: value for key, value in sd1.items() if key not in lost}, tmp_path)


@pytest.mark.parametrize("key", [f"{P}junk.weight", f"{V}junk", "junk.weight"])
def test_a_stray_tensor_is_refused_by_name(sd1: State, key: str, tmp_path: Path) -> None:
    with pytest.raises(weightport.ConversionError, match=r"1 tensors .*junk"):
        convert(sd1 | {key: np.ones(3, np.float32)}, tmp_path)


@pytest.mark.parametrize(
    "key",
    [
        f"{P}time_embed.0.bias",
        f"{V}encoder.conv_in.bias",
        f"{C}text_model.final_layer_norm.bias",
    ],
)
@pytest.mark.parametrize("around", ["", "module."])
def test_a_wrong_shape_is_refused_by_its_name_in_the_file(
    sd1: State, key: str, around: str, tmp_path: Path
) -> None:
    longer = np.zeros(len(sd1[key]) + 1, sd1[key].dtype)
    state = {around + name: array for name, array in (sd1 | {key: longer}).items()}
    told = rf"`{around}{key}` has the wrong shape \[{len(longer)}\], expected \[{len(sd1[key])}\]"
    with pytest.raises(weightport.ConversionError, match=told):
        convert(state, tmp_path)


def test_parts_of_different_families_are_refused(
    sd1: State, original_of: Callable[[str], Path], tmp_path: Path
) -> None:
    mixed = part(load_file(original_of("sdxl")), P) | part(sd1, C)
    with pytest.raises(
        weightport.ConversionError, match=r"not of one family: .*text_encoder of sd1.*unet of sdxl"
    ):
        convert(mixed, tmp_path)
