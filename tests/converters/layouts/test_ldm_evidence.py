"""What an original checkpoint is and what its UNet predicts: told by evidence, overridden on
demand, never guessed."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import diffusers
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import weightport
from weightport.converters.layouts.ldm_evidence import prediction
from weightport.converters.layouts.source import Source
from weightport.converters.layouts.sources import open_source
from weightport.mappings.families import families

from ...support.synthetic import State, weights

P = "model.diffusion_model."
Unet = Callable[[str], State]


@pytest.fixture(scope="module")
def unet_of(original_of: Callable[[str], Path]) -> Unet:
    """Family -> the UNet of the original checkpoint, keys with their prefix."""
    return lambda family: {
        k: v for k, v in load_file(original_of(family)).items() if k.startswith(P)
    }


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def convert(
    state: State, folder: Path, metadata: dict[str, str] | None = None, **options: Any
) -> Path:
    save_file(state, folder / "model.safetensors", metadata)
    return weightport.convert(
        folder / "model.safetensors", folder / "repo", residue=False, overwrite=True, **options
    ).output


def scheduler(repo: Path) -> dict[str, Any]:
    return _json(repo / "scheduler" / "scheduler_config.json")


# --- what it predicts -----------------------------------------------------------------------------

ONE = np.ones((), np.float32)
NOTHING = np.zeros(0, np.float32)
SCHEDULE = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).astype(np.float32)
ZERO = SCHEDULE - SCHEDULE[-1]
EPSILON: Literal["epsilon"] = "epsilon"
V: Literal["v_prediction"] = "v_prediction"


def betas_of(schedule: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The share of noise that each step adds."""
    kept = schedule.astype(np.float64)
    return (1 - kept / np.append(1, kept[:-1])).astype(np.float32)


# tensors, metadata -> what is predicted, whether the schedule ends at zero signal, a word of the
# evidence
EVIDENCE: dict[str, tuple[State, dict[str, str], str, bool, str]] = {
    "nothing": ({}, {}, EPSILON, False, "no marker"),
    "v_pred": ({"v_pred": ONE}, {}, V, False, "`v_pred`"),
    "empty v_pred": ({"v_pred": NOTHING}, {}, V, False, "`v_pred`"),
    "v_pred, ztsnr": ({"v_pred": ONE, "ztsnr": ONE}, {}, V, True, "`v_pred`"),
    "ztsnr": ({"ztsnr": ONE}, {}, V, True, "zero signal"),
    "modelspec v": ({}, {"modelspec.prediction_type": "v"}, V, False, "modelspec.prediction_type"),
    "modelspec epsilon": (
        {},
        {"modelspec.prediction_type": "epsilon"},
        EPSILON,
        False,
        "modelspec.prediction_type",
    ),
    "kohya v": ({}, {"ss_v_parameterization": "True"}, V, False, "ss_v_parameterization"),
    "kohya zero": (
        {},
        {"ss_v_parameterization": "True", "ss_zero_terminal_snr": "True"},
        V,
        True,
        "ss_v_param",
    ),
    "kohya no v": ({}, {"ss_v_parameterization": "False"}, EPSILON, False, "no marker"),
    "schedule": ({"alphas_cumprod": SCHEDULE}, {}, EPSILON, False, "no marker"),
    "zero schedule": ({"alphas_cumprod": ZERO}, {}, V, True, "zero signal"),
    "betas": ({"betas": betas_of(SCHEDULE)}, {}, EPSILON, False, "no marker"),
    "zero betas": ({"betas": betas_of(ZERO)}, {}, V, True, "zero signal"),
    "zero schedule in half": (
        {"alphas_cumprod": ZERO.astype(np.float16)},
        {},
        V,
        True,
        "zero signal",
    ),
    "metadata like a marker": (
        {},
        {"v_pred": "x", "final_alpha_cumprod": "many"},
        EPSILON,
        False,
        "no marker",
    ),
}


@pytest.mark.parametrize("case", EVIDENCE)
def test_markers_metadata_and_the_schedule_are_evidence(
    case: str, unet_of: Unet, tmp_path: Path
) -> None:
    tensors, metadata, kind, zero, word = EVIDENCE[case]
    path = tmp_path / "model.safetensors"
    save_file(unet_of("sd1") | tensors, path, metadata)
    (unet,) = open_source(Source(path))
    found = prediction("sd1", unet, None)
    assert (found.kind, found.zero_snr) == (kind, zero)
    (part,) = weightport.inspect(path).parts
    assert any(fact.startswith(f"predicts {kind}: ") and word in fact for fact in part.evidence)


def kept(betas: Any) -> np.ndarray[Any, Any]:
    return np.cumprod(1 - np.asarray(betas)).astype(np.float32)


BENT = 0.0001 + 0.02 * np.linspace(0, 1, 1000) ** 3
SCHEDULES: dict[
    str, tuple[State, dict[str, Any]]
] = {  # tensors -> what the config says that the family's does not
    "stock": ({"alphas_cumprod": SCHEDULE}, {}),
    "stock betas": ({"betas": betas_of(SCHEDULE)}, {}),
    "linear": (
        {"alphas_cumprod": kept(np.linspace(1e-4, 0.02, 1000))},
        {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    ),
    "linear in the roots": (
        {"betas": (np.linspace(0.0015**0.5, 0.0195**0.5, 1000) ** 2).astype(np.float32)},
        {"beta_start": 0.0015, "beta_end": 0.0195},
    ),
    "of another kind": ({"alphas_cumprod": kept(BENT)}, {"trained_betas": BENT}),
    "half precision": ({"alphas_cumprod": SCHEDULE.astype(np.float16)}, {}),
    "no schedule": ({"alphas_cumprod": np.full(1000, np.nan, np.float32)}, {}),
}


@pytest.mark.parametrize("case", SCHEDULES)
def test_the_schedule_is_the_one_in_the_file(case: str, unet_of: Unet, tmp_path: Path) -> None:
    tensors, said = SCHEDULES[case]
    stock = scheduler(convert(unet_of("sd1"), tmp_path))
    config = scheduler(convert(unet_of("sd1") | tensors, tmp_path))
    assert config.keys() - stock.keys() <= said.keys()
    changed = {key: value for key, value in config.items() if stock.get(key) != value}
    assert changed.keys() == said.keys()
    for key, value in said.items():
        assert changed[key] == (
            value if isinstance(value, str) else pytest.approx(value, rel=2e-2, abs=1e-6)
        )
    theirs = diffusers.DDIMScheduler.from_config(config).alphas_cumprod.numpy()
    expected = tensors.get(
        "alphas_cumprod", SCHEDULE if not said else kept(tensors.get("betas", 0))
    )
    if case not in ("half precision", "no schedule"):
        np.testing.assert_allclose(theirs, expected, rtol=2e-3)
    notes = weightport.inspect(tmp_path / "model.safetensors").parts[0].evidence
    assert any("says of its schedule" in note for note in notes) == bool(said)


EDM: dict[
    str, tuple[State, str, dict[str, Any], dict[str, Any]]
] = {  # markers -> scheduler, its config, the VAE's
    "CosXL": (
        {"edm_vpred.sigma_max": np.array(120, "f4"), "edm_vpred.sigma_min": np.array(0.002, "f4")},
        "EDMEulerScheduler",
        {"sigma_max": 120.0, "sigma_min": 0.002, "sigma_data": 1.0, "prediction_type": V},
        {"scaling_factor": 0.13025},
    ),
    "Playground 2.5": (
        {
            "edm_mean": (
                np.array([-1.6574, 1.886, -1.383, 2.5155], np.float32).reshape(1, 4, 1, 1)
            ),
            "edm_std": (np.array([8.4927, 5.9022, 6.5498, 5.2299], np.float32).reshape(1, 4, 1, 1)),
        },
        "EDMDPMSolverMultistepScheduler",
        {"sigma_max": 80.0, "sigma_min": 0.002, "sigma_data": 0.5, "prediction_type": EPSILON},
        {
            "latents_mean": [-1.6574, 1.886, -1.383, 2.5155],
            "latents_std": [8.4927, 5.9022, 6.5498, 5.2299],
            "scaling_factor": 0.5,
        },
    ),
}


@pytest.mark.parametrize("case", EDM)
def test_markers_of_an_edm_schedule(
    case: str, original_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """The configs are those of diffusers' own conversion; the markers come back, with residue and
    without."""
    tensors, name, config, vae = EDM[case]
    state = load_file(original_of("sdxl")) | {
        key: np.asarray(value) for key, value in tensors.items()
    }
    repo = convert(state, tmp_path)
    found = scheduler(repo)
    assert found["_class_name"] == name
    assert found | config == found
    assert "beta_start" not in found
    getattr(diffusers, name).from_pretrained(repo / "scheduler").set_timesteps(4)
    described = _json(repo / "vae" / "config.json")
    assert described | vae == described
    pipeline = weightport.DiffusionPipeline.from_pretrained(repo)
    assert type(pipeline.scheduler).__name__ == name
    for source in (repo, tmp_path / "model.safetensors"):
        back = weightport.convert(
            source, tmp_path / "back.safetensors", to="ldm", overwrite=True, residue=False
        )
        again = load_file(back.output)
        assert {key for key in again if key.startswith(("edm_", "v_pred"))} == tensors.keys()
        for key, value in tensors.items():
            assert again[key].shape == np.shape(value)
            np.testing.assert_allclose(again[key], value, rtol=1e-6)


FILES = {  # tensors and metadata beside an SD 2.x UNet -> what it predicts
    "marker": ({"v_pred": ONE}, {}, V),
    "modelspec v": ({}, {"modelspec.prediction_type": "v"}, V),
    "modelspec epsilon": ({}, {"modelspec.prediction_type": "epsilon"}, EPSILON),
    "zero schedule": ({"alphas_cumprod": ZERO}, {}, V),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_with_diffusers_names_is_held_to_the_same_evidence(
    case: str, tmp_path: Path
) -> None:
    """It has no scheduler beside it either: nothing may be taken for granted."""
    tensors, metadata, kind = FILES[case]
    save_file(weights("sd2", "unet") | tensors, tmp_path / "model.safetensors", metadata)
    (part,) = weightport.inspect(tmp_path / "model.safetensors").parts
    assert any(fact.startswith(f"predicts {kind}: ") for fact in part.evidence)
    repo = weightport.convert(tmp_path / "model.safetensors", tmp_path / "repo").output
    assert scheduler(repo)["prediction_type"] == kind
    assert _json(repo / "unet" / "config.json")["sample_size"] == (96 if kind == V else 64)


def test_a_file_with_diffusers_names_and_no_evidence(tmp_path: Path) -> None:
    save_file(weights("sd2", "unet"), tmp_path / "model.safetensors")
    with pytest.raises(weightport.ConversionError, match="nothing in the file says"):
        weightport.convert(tmp_path / "model.safetensors", tmp_path / "repo")
    repo = weightport.convert(
        tmp_path / "model.safetensors", tmp_path / "repo", prediction_type=V
    ).output
    assert scheduler(repo)["prediction_type"] == V


def test_what_is_asked_for_holds_for_a_repo_too(
    repo_of: Callable[[str], Path], tmp_path: Path
) -> None:
    asked: dict[str, Any] = {"prediction_type": V, "image_size": 768}
    repo = weightport.convert(repo_of("sd1"), tmp_path / "repo", **asked).output
    assert scheduler(repo)["prediction_type"] == V
    sizes = [_json(repo / name / "config.json")["sample_size"] for name in ("unet", "vae")]
    assert sizes == [96, 768]
    for size in (0, -8, 513):
        with pytest.raises(
            weightport.ConversionError, match=rf"--image-size {size}: must be a multiple of 8"
        ):
            weightport.convert(repo_of("sd1"), tmp_path / "other", image_size=size)


@pytest.mark.parametrize("markers", [(), ("v_pred", "ztsnr")], ids=" ".join)
@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_markers_set_a_scheduler_that_knows_its_options(
    family: str, markers: tuple[str, ...], unet_of: Unet, tmp_path: Path
) -> None:
    """PNDM, for one, cannot end at zero signal: it would ignore that it is asked to."""
    asked: dict[str, Any] = {} if markers else {"prediction_type": EPSILON}
    written = scheduler(convert(unet_of(family) | dict.fromkeys(markers, ONE), tmp_path, **asked))
    made = getattr(diffusers, written["_class_name"]).from_config(written)
    known = {key for key in written if not key.startswith("_")}
    if written["_class_name"] == "PNDMScheduler":
        known.remove("clip_sample")  # is in the stock repository although PNDM has no such option
    assert known <= set(inspect.signature(type(made)).parameters)
    assert made.config.prediction_type == (V if markers else EPSILON)
    assert (abs(float(made.alphas_cumprod[-1])) < 1e-6) == ("ztsnr" in markers)
    assert (written.get("timestep_spacing") == "trailing") == ("ztsnr" in markers)


def test_the_refiner_has_the_scheduler_of_the_base() -> None:
    assert families()["sdxl_refiner"].scheduler == families()["sdxl"].scheduler


STEPS = {875000: EPSILON, 220000: EPSILON, 110000: V, 140000: V}


@pytest.mark.parametrize("step", STEPS)
def test_the_step_of_stabilitys_files_is_evidence(step: int, unet_of: Unet, tmp_path: Path) -> None:
    """It lies beside the nested weights, where it is lost to those that unwrap them first."""
    state = {key: torch.from_numpy(value) for key, value in unet_of("sd2").items()}
    torch.save({"state_dict": state, "global_step": step}, tmp_path / "model.ckpt")
    repo = weightport.convert(tmp_path / "model.ckpt", tmp_path / "repo", residue=False).output
    assert scheduler(repo)["prediction_type"] == STEPS[step]
    assert _json(repo / "unet" / "config.json")["sample_size"] == (96 if STEPS[step] == V else 64)


@pytest.mark.parametrize("metadata", [{}, {"global_step": "470000"}], ids=["none", "another step"])
def test_sd2_without_evidence_is_refused(
    metadata: dict[str, str], unet_of: Unet, tmp_path: Path
) -> None:
    advice = (
        r"nothing in the file says .* --prediction-type epsilon \(512-pixel models\) or"
        r" v_prediction \(768"
    )
    with pytest.raises(weightport.ConversionError, match=advice) as caught:
        convert(unet_of("sd2"), tmp_path, metadata)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "repo").exists()
    (part,) = weightport.inspect(tmp_path / "model.safetensors").parts
    assert "nothing says what it predicts" in part.evidence


def test_what_is_asked_for_overrides_the_evidence_and_is_recorded(
    unet_of: Unet, tmp_path: Path
) -> None:
    state = unet_of("sd2") | {"v_pred": ONE}
    repo = convert(state, tmp_path, prediction_type=EPSILON, image_size=512, family="sd2")
    assert scheduler(repo)["prediction_type"] == EPSILON
    assert _json(repo / "unet" / "config.json")["sample_size"] == 64
    report = _json(repo / "conversion.json")
    asked = {"prediction_type": EPSILON, "image_size": 512, "family": "sd2"}
    assert asked.items() <= report["options"].items()
    assert any("--prediction-type epsilon" in note for note in report["notes"])
    assert (
        _json(convert(state, tmp_path, image_size=1024) / "unet" / "config.json")["sample_size"]
        == 128
    )


def test_the_report_tells_the_evidence(unet_of: Unet, tmp_path: Path) -> None:
    report = _json(convert(unet_of("sd1") | {"v_pred": ONE}, tmp_path) / "conversion.json")
    assert "the UNet predicts v_prediction: the marker `v_pred`" in report["notes"]


def test_two_conversions_do_not_influence_each_other(unet_of: Unet, tmp_path: Path) -> None:
    """A tool that keeps its defaults in one shared dict gives the second model the first one's
    scheduler."""
    before = scheduler(convert(unet_of("sd1"), tmp_path))
    assert scheduler(convert(unet_of("sd1") | {"v_pred": ONE, "ztsnr": ONE}, tmp_path)) != before
    assert scheduler(convert(unet_of("sd1"), tmp_path)) == before


SIZES = {
    "modelspec": ({"modelspec.resolution": "768x768"}, 768),
    "not square": ({"modelspec.resolution": "1024x768"}, 1024),
    "kohya": ({"ss_resolution": "(640, 640)"}, 640),
    "nothing": ({}, 512),
    "nonsense": ({"modelspec.resolution": "huge"}, 512),
    "no multiple of 8": ({"modelspec.resolution": "513x513"}, 512),
    "too large": ({"modelspec.resolution": "99999999x8"}, 512),
}


@pytest.mark.parametrize("case", SIZES)
def test_the_header_tells_the_image_size(case: str, unet_of: Unet, tmp_path: Path) -> None:
    metadata, pixels = SIZES[case]
    repo = convert(unet_of("sd1"), tmp_path, metadata)
    assert _json(repo / "unet" / "config.json")["sample_size"] == pixels // 8
    told = [
        f"made for {pixels} pixels: metadata `{name}`: {value}" for name, value in metadata.items()
    ]
    notes, (part,) = (
        _json(repo / "conversion.json")["notes"],
        weightport.inspect(tmp_path / "model.safetensors").parts,
    )
    for fact in told:
        assert (fact in notes) == (fact in part.evidence) == (pixels != 512)
    asked = convert(unet_of("sd1"), tmp_path, metadata, image_size=256)
    assert _json(asked / "unet" / "config.json")["sample_size"] == 32


@pytest.mark.parametrize(
    ("family", "kind", "upcast"), [("sd2", V, True), ("sd2", EPSILON, None), ("sd1", V, None)]
)
def test_attention_is_upcast_where_sd2_predicts_v(
    family: str, kind: str, upcast: bool | None, unet_of: Unet, tmp_path: Path
) -> None:
    """As in the configs of Stable Diffusion 2.1: in float16 its attention overflows."""
    config = _json(
        convert(unet_of(family), tmp_path, prediction_type=kind) / "unet" / "config.json"
    )
    assert config.get("upcast_attention") == upcast


def test_a_depth_model_says_that_it_lacks_its_depth_estimator(
    unet_of: Unet, tmp_path: Path
) -> None:
    said: Any = {"prediction_type": "epsilon", "dry_run": True}
    save_file(widened(unet_of("sd2"), 5), tmp_path / "model.safetensors")
    planned = weightport.convert(tmp_path / "model.safetensors", tmp_path / "repo", **said)
    assert any("depth_estimator" in gap and "DPTForDepthEstimation" in gap for gap in planned.lacks)
    save_file(unet_of("sd2"), tmp_path / "model.safetensors")
    planned = weightport.convert(tmp_path / "model.safetensors", tmp_path / "repo", **said)
    assert not any("depth_estimator" in gap for gap in planned.lacks)


# --- what it is -----------------------------------------------------------------------------------

PIPELINES = [
    ("sd1", 4, "StableDiffusionPipeline"),
    ("sd1", 8, "StableDiffusionInstructPix2PixPipeline"),
    ("sd1", 9, "StableDiffusionInpaintPipeline"),
    ("sd2", 4, "StableDiffusionPipeline"),
    ("sd2", 5, "StableDiffusionDepth2ImgPipeline"),
    ("sd2", 8, "StableDiffusionInstructPix2PixPipeline"),
    ("sd2", 9, "StableDiffusionInpaintPipeline"),
    ("sdxl", 4, "StableDiffusionXLPipeline"),
    ("sdxl", 8, "StableDiffusionXLInstructPix2PixPipeline"),
    ("sdxl", 9, "StableDiffusionXLInpaintPipeline"),
    ("sdxl_refiner", 4, "StableDiffusionXLImg2ImgPipeline"),
]


def widened(state: State, channels: int) -> State:
    """A UNet with that many input channels."""
    first = state[f"{P}input_blocks.0.0.weight"]
    wide = np.zeros((first.shape[0], channels, 3, 3), np.float32)
    wide[:, : first.shape[1]] = first[:, :channels]
    return state | {f"{P}input_blocks.0.0.weight": wide}


@pytest.mark.parametrize(("family", "channels", "pipeline"), PIPELINES)
def test_family_and_pipeline_by_keys_and_shapes_of_the_unet_alone(
    family: str, channels: int, pipeline: str, unet_of: Unet, tmp_path: Path
) -> None:
    """Text to image (4), depth (5), instruct-pix2pix (8), inpainting (9), of every family that has
    them."""
    repo = convert(widened(unet_of(family), channels), tmp_path, prediction_type=EPSILON)
    assert _json(repo / "conversion.json")["family"] == family
    assert _json(repo / "model_index.json")["_class_name"] == pipeline
    assert hasattr(diffusers, pipeline)
    assert _json(repo / "unet" / "config.json")["in_channels"] == channels


def test_another_number_of_input_channels_is_refused(unet_of: Unet, tmp_path: Path) -> None:
    with pytest.raises(
        weightport.ConversionError, match="the unet has 6 input channels; known: 4, 8, 9"
    ):
        convert(widened(unet_of("sd1"), 6), tmp_path)


def test_a_family_that_does_not_fit_is_refused(unet_of: Unet, tmp_path: Path) -> None:
    with pytest.raises(
        weightport.ConversionError, match=r"--family sdxl does not fit .*unet of sd1"
    ):
        convert(unet_of("sd1"), tmp_path, family="sdxl")


# --- what is not supported or not known -----------------------------------------------------------

NAMED = {
    "noise_augmentor.data_mean": "Stable unCLIP",
    f"{P}input_blocks.1.0.time_mixer.mix_factor": "Stable Video Diffusion",
    "down_blocks.0.motion_modules.0.temporal_transformer.norm.weight": "AnimateDiff",
    f"{P}nerf_blocks.0.norm.scale": "Chroma Radiance",
    f"{P}noise_refiner.0.adaLN_modulation.1.weight": "Lumina 2",
    "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": "a LoRA",
    "unet.mid_block.attentions.0.proj_in.lora_A.weight": "a LoRA",
    "lora_unet_mid_block.hada_w1_a": "LoHa", "lora_unet_mid_block.lokr_w1": "LoKr",
    "emb_params": "a model with a textual inversion", "clip_l": "a textual inversion of SDXL",
    "ip_adapter.1.to_k_ip.weight": "an IP-Adapter", "adapter.body.0.block1.weight": "a T2I-Adapter",
}  # fmt: skip


@pytest.mark.parametrize("key", NAMED)
def test_other_models_are_refused_by_name(key: str, unet_of: Unet, tmp_path: Path) -> None:
    """Each holds a UNet, or something like one, that might be taken for one of ours."""
    state = unet_of("sd2") | {key: ONE}
    with pytest.raises(weightport.ConversionError, match=NAMED[key]) as caught:
        convert(state, tmp_path, prediction_type=EPSILON)
    assert "\n" not in str(caught.value)
    assert key.split(".")[0] in str(caught.value)
    assert "supported are Stable Diffusion 1.x" in str(caught.value)


WIDTHS = {2048: "Stable unCLIP", 1536: "Stable unCLIP", 768: "Stable Video Diffusion"}


@pytest.mark.parametrize("width", WIDTHS)
def test_other_models_are_refused_by_their_unet_alone(
    width: int, unet_of: Unet, tmp_path: Path
) -> None:
    """An SD 2.x UNet with one more embedding, whose width tells whose it is."""
    state = unet_of("sd2") | {f"{P}label_emb.0.0.weight": np.ones((4, width), "f4")}
    with pytest.raises(weightport.ConversionError, match=WIDTHS[width]):
        convert(state, tmp_path, prediction_type=EPSILON)


def matrix(*shape: int) -> np.ndarray[Any, Any]:
    return np.ones(shape, np.float32)


UNKNOWN: dict[str, State] = {
    "empty": {},
    "junk": {"a.weight": matrix(3), "b": matrix(2, 2)},
    "LLM": {
        f"model.layers.{i}.self_attn.{part}_proj.weight": matrix(8, 8)
        for i in range(4)
        for part in "qkvo"
    },
    "BART": {
        f"{half}.layers.{i}.fc1.weight": matrix(8, 8)
        for half in ("encoder", "decoder")
        for i in range(3)
    },
}


@pytest.mark.parametrize("what", UNKNOWN)
def test_unknown_says_unknown(what: str, tmp_path: Path) -> None:
    """With the nearest part and what is missing; none is "the default", Stable Diffusion 1."""
    save_file(UNKNOWN[what], tmp_path / "model.safetensors")
    for part in weightport.inspect(tmp_path / "model.safetensors").parts:
        assert (part.part, part.families, part.becomes) == ("unknown", (), "nothing")
        assert part.evidence[0].startswith("nearest: ")
        assert any(family.title in part.evidence[0] for family in families().values())
        assert "--family" not in " ".join(part.evidence)
        assert part.missing
    with pytest.raises(weightport.ConversionError, match="not recognised") as caught:
        weightport.convert(tmp_path / "model.safetensors", tmp_path / "repo")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "repo").exists()


def test_a_stray_part_of_a_model_is_shown_as_unknown(unet_of: Unet, tmp_path: Path) -> None:
    save_file(unet_of("sd1") | {"mystery.weight": ONE}, tmp_path / "model.safetensors")
    known, unknown = weightport.inspect(tmp_path / "model.safetensors").parts
    assert (known.part, known.unexpected) == ("unet", ())
    assert (unknown.part, unknown.unexpected) == ("unknown", ("mystery.weight",))


def test_a_damaged_unet_says_what_is_missing(unet_of: Unet, tmp_path: Path) -> None:
    state = {key: value for key, value in unet_of("sd1").items() if "output_blocks.3." not in key}
    save_file(state, tmp_path / "model.safetensors")
    (part,) = weightport.inspect(tmp_path / "model.safetensors").parts
    assert part.part == "unet"
    assert all("output_blocks.3." in key for key in part.missing)
