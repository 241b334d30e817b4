"""Models of other kinds are named by one list: in files and folders, by `inspect` and `convert`."""

from __future__ import annotations

import fnmatch
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from weightport.mappings.facts import facts

from ...support.command import assert_refused, run
from ...support.synthetic import State, weights, write_repo

KINDS = facts("unsupported")
ADAPTERS = (
    "lora",
    "hada",
    "lokr",
    "ip_adapter",
)  # may be files of changes alone, or beside a model


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repo of a VAE alone."""
    return write_repo(tmp_path_factory.mktemp("small") / "repo", "sd1", components=["vae"])


def named(place: Path, source: Path, reason: str) -> None:
    """Both commands say the same of it, in one line."""
    ended = run("convert", source, "-o", place / "out")
    assert_refused(ended, source, reason)
    assert run("inspect", source) == ended


def name_of(pattern: str) -> str:
    """A name that fits a pattern."""
    name = pattern.replace("[0-9]*", "7").replace("[01]", "0").replace("[12]", "2")
    name = (
        name.replace("[024]", "2").replace("[0-9]", "7").replace("[AB]", "A").replace("[lg]", "g")
    )
    name = name.replace("[rR][dD][bB]", "RDB").replace("*", "down_blocks.0")
    assert fnmatch.fnmatchcase(name, pattern)
    return name


@pytest.mark.parametrize("pattern", KINDS["tensors"])
def test_tensor_of_another_model_beside_a_known_part(
    place: Path, small: Path, pattern: str
) -> None:
    """In a file and in the folder of a component: the same words."""
    state = weights("sd1", "vae") | {name_of(pattern): np.zeros((8, 8), np.float32)}
    folder = Path(shutil.copytree(small / "vae", place / "vae"))
    save_file(state, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    ended = run("inspect", folder)
    assert_refused(ended, folder, "looks like .*, which is not supported")
    kind = ended.err.split("looks like ")[1].split(" (`")[0]
    fitting = [kind for row, kind in KINDS["tensors"].items() if _fits(state, row)]
    assert kind == fitting[0]
    assert (
        f"looks like {kind} (`"
        in run("inspect", folder / "diffusion_pytorch_model.safetensors").err
    )


def _fits(state: State, row: str) -> bool:
    return any(fnmatch.fnmatchcase(key, row) for key in state)


CLASSES = [
    ({"_class_name": "ControlNetUnionModel"}, "ControlNet union"),
    ({"_class_name": "T2IAdapter"}, "T2I-Adapter"),
    ({"_class_name": "UNetMotionModel"}, "AnimateDiff"),
    ({"_class_name": "AutoencoderKLTemporalDecoder"}, "Stable Video Diffusion"),
    ({"_class_name": "MyOwnModel"}, "says MyOwnModel"),
    ({"_class_name": "AutoencoderKLFlux2"}, "an autoencoder of another kind"),
    ({"architectures": ["CLIPVisionModelWithProjection"]}, "CLIP image encoder"),
]


@pytest.mark.parametrize(("config", "reason"), CLASSES, ids=[reason for _, reason in CLASSES])
def test_folder_whose_config_names_another_class(
    place: Path, small: Path, config: dict[str, Any], reason: str
) -> None:
    """However alike its tensors are."""
    folder = Path(shutil.copytree(small / "vae", place / "vae"))
    (folder / "config.json").write_text(json.dumps(config))
    named(place, folder, reason)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({640: [{"linear.0.weight": torch.zeros(2, 2)}], "name": "x"}, "hypernetwork"),
        ({"state": {0: {"step": 1, "exp_avg": torch.zeros(4)}}}, "state of an optimizer"),
    ],
)
def test_pickle_of_changes(place: Path, content: object, reason: str) -> None:
    torch.save(content, place / "learned.pt")
    named(place, place / "learned.pt", reason)


# ---- weights that are not there, or lie otherwise


@pytest.mark.parametrize("all_of_them", [True, False])
def test_hollow_weights(place: Path, small: Path, all_of_them: bool) -> None:
    """What DeepSpeed's ZeRO 3 leaves of a model that was not gathered."""
    state = {
        key: np.zeros(0, np.float32) if all_of_them or array.ndim > 1 else array
        for key, array in weights("sd1", "vae").items()
    }
    folder = Path(shutil.copytree(small / "vae", place / "vae"))
    file = folder / "diffusion_pytorch_model.safetensors"
    save_file(state, file, {"format": "pt"})
    torch.save({key: torch.from_numpy(array) for key, array in state.items()}, place / "vae.bin")
    for source in (folder, file, place / "vae.bin"):
        named(place, source, "ZeRO 3.*zero_to_fp32")


@pytest.mark.parametrize(
    "extra",
    [
        {"load_in_8bit": True, "quant_method": "bitsandbytes"},
        {"quant_method": "quanto", "weights_dtype": "int8"},
    ],
)
def test_quantised_config(place: Path, small: Path, extra: dict[str, object]) -> None:
    folder = Path(shutil.copytree(small / "vae", place / "vae"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": extra}))
    named(place, folder, f"quantised with {extra['quant_method']}.*dequantised")


@pytest.mark.parametrize("ending", ["absmax", "quant_state.bitsandbytes__fp4", "SCB"])
def test_quantised_tensors(place: Path, ending: str) -> None:
    state: State = weights("sd1", "vae")
    state[f"encoder.mid_block.attentions.0.to_q.weight.{ending}"] = np.zeros(3, np.uint8)
    save_file(state, place / "vae.safetensors")
    named(place, place / "vae.safetensors", "quantised with bitsandbytes")


def paddled(state: State) -> State:
    """PaddlePaddle keeps the weights of linear layers as (in, out)."""
    return {key: np.ascontiguousarray(a.T) if a.ndim == 2 else a for key, a in state.items()}


def test_weights_of_paddle(place: Path) -> None:
    state = paddled(weights("sd1", "vae"))
    marked = {**state, "StructuredToParameterName@@": dict.fromkeys(state, "linear_0.w_0")}
    (place / "model_state.pdparams").write_bytes(pickle.dumps(marked, protocol=4))
    named(place, place / "model_state.pdparams", "PaddlePaddle")
    save_file(state, place / "model_state.safetensors", {"format": "pd"})
    named(place, place / "model_state.safetensors", "PaddlePaddle")
    save_file(state, place / "other.safetensors", {"format": "np"})
    named(place, place / "other.safetensors", "square matrices")
    (place / "vae.pkl").write_bytes(pickle.dumps(state))
    named(place, place / "vae.pkl", "square matrices")


def test_arrays_whose_shapes_tell_how_they_lie(place: Path, sd1_repo: Path) -> None:
    """A text encoder has matrices that are not square: one way round they fit."""
    state = load_file(sd1_repo / "text_encoder" / "model.safetensors")
    (place / "text.pkl").write_bytes(pickle.dumps(state))
    ended = run("convert", place / "text.pkl", "-o", place / "out")
    assert ended.status == 0, ended.err
    found = load_file(place / "out" / "text_encoder" / "model.safetensors")
    assert all(np.array_equal(found[key], array) for key, array in state.items())
    (place / "turned.pkl").write_bytes(pickle.dumps(paddled(state)))
    assert_refused(
        run("convert", place / "turned.pkl", "-o", place / "out2"), "turned", "wrong shape"
    )
