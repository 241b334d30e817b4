"""Twenty failures of other converters, each with a test that this one does not fail so."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import weightport
from weightport.converters.planning.candidates import candidates
from weightport.mappings.families import families

from ..support.synthetic import State, average_name, weights

P, V, C = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer."
ONE = np.ones((), np.float32)
Original = Callable[[str], State]


@pytest.fixture
def original(original_of: Callable[[str], Path]) -> Original:
    return lambda family: load_file(original_of(family))


def part(state: State, prefix: str) -> State:
    return {key: value for key, value in state.items() if key.startswith(prefix)}


def convert(state: State, folder: Path, **options: Any) -> Path:
    save_file(state, folder / "model.safetensors")
    output = weightport.convert(
        folder / "model.safetensors", folder / "repo", overwrite=True, **options
    ).output
    assert output is not None
    return output


def refused(state: State, folder: Path, match: str, **options: Any) -> None:
    with pytest.raises(weightport.ConversionError, match=match) as caught:
        convert(state, folder, **options)
    assert "\n" not in str(caught.value)
    assert not (folder / "repo").exists()


def planned(state: State, folder: Path) -> weightport.Conversion:
    save_file(state, folder / "model.safetensors")
    return weightport.convert(
        folder / "model.safetensors",
        folder / "repo",
        dry_run=True,
        prediction_type="epsilon",
        residue=False,
    )


def scheduler(repo: Path) -> dict[str, Any]:
    return json.loads((repo / "scheduler" / "scheduler_config.json").read_text())


def test_01_a_text_encoder_with_nai_prefixes_loads(original: Original, tmp_path: Path) -> None:
    """Elsewhere: "weights appear to be missing"."""
    state = {
        key.replace("text_model.", ""): value for key, value in part(original("sd1"), C).items()
    }
    found = load_file(convert(state, tmp_path) / "text_encoder" / "model.safetensors")
    assert all(
        np.array_equal(found[key], value) for key, value in weights("sd1", "text_encoder").items()
    )


def test_02_a_missing_layer_of_the_text_encoder_fails_with_names(
    original: Original, tmp_path: Path
) -> None:
    """Elsewhere it succeeds, and 16 parameters stay uninitialised."""
    state = {
        key: value for key, value in part(original("sd1"), C).items() if ".layers.7." not in key
    }
    refused(state, tmp_path, r"16 tensors of the CLIP .* are missing: .*layers\.7")


def test_03_one_missing_tensor_of_the_unet_fails_with_its_name(
    original: Original, tmp_path: Path
) -> None:
    """Elsewhere: "cannot copy out of meta tensor"."""
    state = part(original("sd1"), P)
    del state[f"{P}middle_block.1.norm.weight"]
    refused(
        state, tmp_path, r"1 tensors of the LDM UNet are missing: .*middle_block\.1\.norm\.weight"
    )


def test_04_markers_set_the_scheduler(original: Original, tmp_path: Path) -> None:
    """Elsewhere v-prediction models come out as epsilon; EDM models, whose schedule is another, as
    well."""
    state = part(original("sdxl"), P)
    assert scheduler(convert(state, tmp_path))["prediction_type"] == "epsilon"
    assert (
        scheduler(convert(state | {"v_pred": ONE}, tmp_path))["prediction_type"] == "v_prediction"
    )
    assert (
        scheduler(convert(state | {"v_pred": ONE, "ztsnr": ONE}, tmp_path))[
            "rescale_betas_zero_snr"
        ]
        is True
    )
    edm = {
        "edm_vpred.sigma_max": np.full(1, 120, np.float32),
        "edm_vpred.sigma_min": np.full(1, 0.002, np.float32),
    }
    config = scheduler(convert(state | edm, tmp_path))
    assert (config["_class_name"], config["prediction_type"]) == (
        "EDMEulerScheduler",
        "v_prediction",
    )
    assert (config["sigma_min"], config["sigma_max"]) == (0.002, 120)


@pytest.mark.parametrize(
    ("family", "channels", "pipeline"),
    [
        ("sd2", 5, "StableDiffusionDepth2ImgPipeline"),
        ("sd1", 8, "StableDiffusionInstructPix2PixPipeline"),
        ("sd2", 8, "StableDiffusionInstructPix2PixPipeline"),
        ("sdxl", 8, "StableDiffusionXLInstructPix2PixPipeline"),
        ("sdxl_refiner", 4, "StableDiffusionXLImg2ImgPipeline"),
        ("upscaler", 7, "StableDiffusionUpscalePipeline"),
    ],
)
def test_05_variants_are_told_by_their_unet_alone(
    family: str, channels: int, pipeline: str, original: Original, tmp_path: Path
) -> None:
    """Elsewhere depth models are "v2", SDXL's instruct-pix2pix is "xl_base"."""
    state = part(original(family), P)
    first = state[f"{P}input_blocks.0.0.weight"]
    state[f"{P}input_blocks.0.0.weight"] = np.resize(first, (len(first), channels, 3, 3))
    found = planned(state, tmp_path)
    assert found.family == family
    assert families()[family].pipelines[found.components["unet"].config["in_channels"]] == pipeline


@pytest.mark.parametrize(("key", "shape", "model"), [
    ("label_emb.0.0.weight", (4, 2048), "Stable unCLIP"),
    ("label_emb.0.0.weight", (4, 768), "Stable Video Diffusion"),
    ("input_blocks.1.0.time_mixer.mix_factor", (1,), "Stable Video Diffusion"),
])  # fmt: skip
def test_05_unclip_and_svd_are_refused_by_name(
    key: str, shape: tuple[int, ...], model: str, original: Original, tmp_path: Path
) -> None:
    """Elsewhere they are "v2", because their cross-attention is 1024 wide."""
    refused(part(original("sd2"), P) | {P + key: np.ones(shape, np.float32)}, tmp_path, model)


@pytest.mark.parametrize("prefix", [P, ""], ids=["usual", "bare"])
def test_06_an_sdxl_unet_alone_is_sdxl(prefix: str, original: Original, tmp_path: Path) -> None:
    """Elsewhere it is "v1", the default."""
    state = {
        prefix + key.removeprefix(P): value for key, value in part(original("sdxl"), P).items()
    }
    assert planned(state, tmp_path).family == "sdxl"


@pytest.mark.parametrize("length", [36864, 147456, 12345])
def test_07_what_is_left_of_sd3_of_any_size_is_refused_by_name(length: int, tmp_path: Path) -> None:
    """Elsewhere an unexpected length raises UnboundLocalError."""
    state = {
        f"{P}pos_embed": np.ones((1, length, 1), np.float32),
        f"{P}joint_blocks.0.x_block.attn.qkv.weight": ONE,
    }
    refused(state, tmp_path, r"nearest is the MMDiT \(Stable Diffusion 3\)")


def test_08_a_vae_alone_is_shared(original: Original, tmp_path: Path) -> None:
    """Elsewhere it is "v1", or its base is read from the file's name."""
    convert(part(original("sd1"), V), tmp_path, residue=False)
    (found,) = weightport.inspect(tmp_path / "model.safetensors").parts
    assert len(found.families) == 4
    notes = json.loads((tmp_path / "repo" / "conversion.json").read_text())["notes"]
    assert any(
        "the weights fit Stable Diffusion 2.x, Stable Diffusion XL" in note for note in notes
    )


def test_09_the_text_projection_is_turned_round(original: Original, tmp_path: Path) -> None:
    """OpenCLIP computes `x @ W`, a linear layer `x @ W.T`; elsewhere one is taken for the other, of
    the same shape."""
    state = part(original("sdxl"), "conditioner.embedders.1.")
    repo = convert(state, tmp_path, residue=False)
    linear = load_file(repo / "text_encoder_2" / "model.safetensors")["text_projection.weight"]
    w = state["conditioner.embedders.1.model.text_projection"]
    x = np.random.default_rng(0).standard_normal((2, len(w)), np.float32)
    np.testing.assert_allclose(x @ linear.T, x @ w, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "key", ["single_blocks.0.linear1.weight", "double_blocks.0.img_attn.qkv.weight"]
)
def test_10_flux_is_refused_rather_than_split_wrongly(key: str, tmp_path: Path) -> None:
    """Elsewhere its unequal parts are cut into equal ones."""
    state = {P + key: np.ones((7, 2), np.float32), f"{P}double_blocks.0.img_mod.lin.bias": ONE}
    refused(state, tmp_path, "nearest is the Flux")


def test_11_models_with_swapped_scale_and_shift_are_refused(tmp_path: Path) -> None:
    """Elsewhere `norm_out` is renamed and its halves are not swapped."""
    state = {
        f"{P}final_layer.adaLN_modulation.1.weight": ONE,
        f"{P}joint_blocks.23.context_block.attn.qkv.bias": ONE,
    }
    refused(state, tmp_path, "nearest is the MMDiT")


@pytest.mark.parametrize("family", families())
def test_12_flattened_names_are_unambiguous_and_a_lora_is_refused(
    family: str, tmp_path: Path
) -> None:
    """kohya writes `_` for every dot: that can be undone by look-up only, and elsewhere is
    guessed."""
    for component in families()[family].components.values():
        modules = {key.rpartition(".")[0] for key in component.manifest()}
        assert len({module.replace(".", "_") for module in modules}) == len(modules)
    name = "lora_unet_down_blocks_0_attentions_0_proj_in"
    refused({f"{name}.lora_up.weight": ONE, f"{name}.alpha": ONE}, tmp_path, "an adapter, which")


def test_13_averages_are_decoded_by_the_key_list(original: Original, tmp_path: Path) -> None:
    """LitEma removes the dots: `input_blocks11` is `1.1` or `11`; elsewhere the file is "v1" and
    has no UNet."""
    for candidate in candidates("ldm"):
        assert len({average_name(key) for key in candidate.links}) == len(candidate.links)
    state = {average_name(key): value for key, value in part(original("sd1"), P).items()}
    found = load_file(convert(state, tmp_path) / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(np.array_equal(found[key], value) for key, value in weights("sd1", "unet").items())


def test_14_rounded_position_ids_become_whole_numbers_again(
    original: Original, tmp_path: Path
) -> None:
    """Mergers average them as if they were weights; elsewhere 75.9975 becomes 75."""
    ids = (np.arange(77) * 0.9999).astype(np.float16)[None]
    repo = convert(original("sd1") | {f"{C}text_model.embeddings.position_ids": ids}, tmp_path)
    weightport.convert(repo, tmp_path / "back.safetensors", to="ldm", residue=False)
    made = load_file(tmp_path / "back.safetensors")[f"{C}text_model.embeddings.position_ids"]
    assert made.dtype == np.int64
    assert made.tolist() == [list(range(77))]


def test_15_two_conversions_do_not_influence_each_other(original: Original, tmp_path: Path) -> None:
    """Elsewhere the first model's prediction type stays in a shared default."""
    state = part(original("sdxl"), P)
    before = scheduler(convert(state, tmp_path))
    assert scheduler(convert(state | {"v_pred": ONE, "ztsnr": ONE}, tmp_path)) != before
    assert scheduler(convert(state, tmp_path)) == before


def test_16_original_to_repo_to_original_is_exact(original: Original, tmp_path: Path) -> None:
    """Elsewhere it fails: layers, buffers and prefixes are gone."""
    state = original("sd2") | {
        "cond_stage_model.model.logit_scale": ONE,
        "betas": np.linspace(0, 1, 1000),
    }
    state |= {
        f"cond_stage_model.model.transformer.resblocks.23.{name}": ONE
        for name in ("ln_1.bias", "ln_2.bias")
    }
    repo = convert(state, tmp_path, prediction_type="v_prediction")
    weightport.convert(repo, tmp_path / "back.safetensors", to="ldm")
    back = load_file(tmp_path / "back.safetensors")
    assert {key: (value.dtype, value.tobytes()) for key, value in back.items()} == {
        key: (value.dtype, value.tobytes()) for key, value in state.items()
    }


def test_17_half_leaves_integers_alone(original: Original, tmp_path: Path) -> None:
    """Elsewhere `--half` turns every tensor into float16."""
    ids: State = {
        f"{C}text_model.embeddings.position_ids": np.arange(77)[None],
        "model_ema.num_updates": np.array(7, np.int32),
    }
    repo = convert(original("sd1") | ids, tmp_path, dtype="float16")
    weightport.convert(repo, tmp_path / "back.safetensors", to="ldm", dtype="float16")
    back = load_file(tmp_path / "back.safetensors")
    assert all(
        (back[key].dtype, back[key].tobytes()) == (value.dtype, value.tobytes())
        for key, value in ids.items()
    )
    assert {value.dtype for key, value in back.items() if key not in ids} == {np.dtype(np.float16)}


@pytest.mark.parametrize("suffix", ["lora_down.weight", "lora_A.weight", "hada_w1_a", "lokr_w1"])
def test_18_a_lora_of_fused_weights_is_refused_rather_than_approximated(
    suffix: str, tmp_path: Path
) -> None:
    """Elsewhere it is cut apart as if its halves were shared, or left out without a word."""
    refused(
        {f"transformer.double_blocks_0_img_attn_qkv.{suffix}": np.ones((4, 4), "f4")},
        tmp_path,
        "an adapter, which changes a model",
    )


def test_19_a_pickle_that_names_a_function_is_refused_and_not_run(
    original: Original, tmp_path: Path
) -> None:
    """Elsewhere users are told to switch the check off."""

    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    class System:
        def __reduce__(self) -> tuple[Any, ...]:
            import os

            return os.system, (f"touch {tmp_path / 'ran'}",)

    for payload in (Payload(), System()):
        torch.save(
            {"state_dict": {"a": torch.ones(1)}, "callbacks": payload}, tmp_path / "model.ckpt"
        )
        with pytest.raises(weightport.ConversionError, match=r"model\.ckpt") as caught:
            weightport.convert(tmp_path / "model.ckpt", tmp_path / "repo")
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "ran").exists()
    assert "system" in str(caught.value)


def test_20_nothing_asks_the_network(
    original: Original, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Elsewhere configs and tokenizers are downloaded from repos that may be gone."""

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("the network was asked")

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)
    repo = convert(original("sd1"), tmp_path)
    assert (
        json.loads((repo / "model_index.json").read_text())["_class_name"]
        == "StableDiffusionPipeline"
    )
    assert (repo / "tokenizer" / "vocab.json").is_file()
