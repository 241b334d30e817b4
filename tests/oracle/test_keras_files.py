"""Files that real Keras wrote: every weight of every component is found, from each format and each
way of training."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import weightport
from weightport.converters.checkpoint import Computed
from weightport.converters.layouts.source import Source
from weightport.converters.layouts.sources import open_source
from weightport.converters.planning.recognise import Recognition, complete, recognise
from weightport.errors import ConversionError

from ..support.keras_files import KerasFiles, keras_files
from ..support.keras_skeletons import golden_keys

TEXT_ENCODER = "text_encoder/model.safetensors"
RUNS = {
    "k2 plain": "--images 4,6 --formats weights.h5,h5,model.h5,keras,ckpt,tf_checkpoint",
    "k2 folder": "--formats saved_model --components image_encoder",
    "k2 shuffled frozen": "--shuffle --freeze --formats weights.h5,h5,model.h5,ckpt",
    "k2 second of one": (
        "--second --components image_encoder --formats weights.h5,h5,model.h5,keras,ckpt"
    ),
    "k2 optimizer": (
        "--optimizer --components decoder --formats weights.h5,h5,model.h5,keras,ckpt,tf_checkpoint"
    ),
    "k2 trainer of copies": (
        "--trainer --deepcopy --components text_encoder --formats weights.h5,h5,ckpt"
    ),
    "k2 float16": (
        "--dtype float16 --vocab 49410 --components text_encoder --formats weights.h5,h5,keras,ckpt"
    ),
    "k2 bfloat16": "--dtype bfloat16 --components text_encoder --formats weights.h5,h5,ckpt",
    "k3 plain": "--images 4,6 --formats weights.h5,model.h5,keras,tf_checkpoint,sharded",
    "k3 folders": "--formats saved_model,export --components image_encoder",
    "k3 optimizer": (
        "--optimizer --components decoder --formats weights.h5,model.h5,keras,tf_checkpoint,sharded"
    ),
    "k3 trainer": (
        "--trainer --components text_encoder,unet,image_encoder --formats weights.h5,sharded"
    ),
    "k3 float16": (
        "--dtype float16 --vocab 49410 --components text_encoder --formats"
        " weights.h5,model.h5,sharded"
    ),
    "k3 v2": "--version v2 --components text_encoder,unet --formats weights.h5,model.h5",
    "k3 bfloat16": (
        "--dtype bfloat16 --components image_encoder --formats"
        " weights.h5,model.h5,keras,tf_checkpoint"
    ),
}
MORE_RUNS = {
    "k2 trainer of copies, both": (
        "--trainer --deepcopy --components text_encoder,unet --formats weights.h5,h5,ckpt"
    ),
    "k2 folders": "--formats saved_model",
    "k2 second shuffled frozen": (
        "--second --shuffle --freeze --formats weights.h5,h5,model.h5,ckpt"
    ),
    "k2 second": "--second --formats weights.h5,h5,model.h5,keras,ckpt,tf_checkpoint,saved_model",
    "k2 shuffled": "--shuffle --formats weights.h5,h5,model.h5,keras,ckpt,tf_checkpoint",
    "k2 frozen": "--freeze --formats weights.h5,h5,model.h5,keras,ckpt,tf_checkpoint",
    "k2 optimizer, all": "--optimizer --formats weights.h5,h5,model.h5,keras,ckpt,tf_checkpoint",
    "k2 copies": "--deepcopy --components text_encoder,unet --formats weights.h5,h5,model.h5,ckpt",
    "k2 trainer": (
        "--trainer --freeze --components text_encoder,unet,image_encoder --formats"
        " weights.h5,h5,ckpt"
    ),
    "k2 v2": "--version v2 --second --formats weights.h5,h5,model.h5,keras,ckpt",
    "k2 mixed": "--dtype mixed_float16 --formats weights.h5,h5,ckpt",
    "k2 float64": "--dtype float64 --components decoder --formats weights.h5,h5,ckpt",
    "k3 folders, all": "--formats saved_model,export",
    "k3 second shuffled frozen": "--second --shuffle --freeze --formats weights.h5,model.h5",
    "k3 second": (
        "--second --formats weights.h5,model.h5,keras,tf_checkpoint,saved_model,export,sharded"
    ),
    "k3 shuffled": "--shuffle --formats weights.h5,model.h5,keras,tf_checkpoint,sharded",
    "k3 frozen": "--freeze --formats weights.h5,model.h5,keras,tf_checkpoint,export,sharded",
    "k3 optimizer, all": "--optimizer --formats weights.h5,model.h5,keras,tf_checkpoint,sharded",
    "k3 trainer, frozen": (
        "--trainer --second --freeze --components text_encoder,unet --formats weights.h5,sharded"
    ),
    "k3 v2": "--version v2 --second --formats weights.h5,model.h5,keras,tf_checkpoint,sharded",
    "k3 mixed": "--dtype mixed_bfloat16 --formats weights.h5,model.h5",
    "k3 float64": (
        "--dtype float64 --components decoder --formats weights.h5,model.h5,tf_checkpoint"
    ),
}
QUANTISED = {
    "k3 int8": (
        "--quantize int8 --components text_encoder --formats"
        " weights.h5,model.h5,keras,tf_checkpoint,sharded"
    ),
    "k3 int4": (
        "--quantize int4 --components text_encoder --formats"
        " weights.h5,model.h5,keras,tf_checkpoint,sharded"
    ),
}
LORA = (
    "--lora --components text_encoder --formats"
    " weights.h5,model.h5,keras,tf_checkpoint,sharded,export"
)
State = dict[str, np.ndarray[Any, Any]]


def made_by(run: str, arguments: str) -> KerasFiles:
    """The files of a run, with every format that it asks for."""
    files = keras_files(run[:2], *arguments.split())
    assert not files.made["skipped"]
    return files


def opened(path: Path, alpha: float | None = None) -> dict[str, Recognition]:
    """What a path holds, by part."""
    recognitions = [recognise(checkpoint) for checkpoint in open_source(Source(path, alpha))]
    return {recognition.part: recognition for recognition in recognitions}


def weights(recognition: Recognition) -> State:
    """Every tensor of a checkpoint, which must be complete; bfloat16 as float32, as the truth has
    it."""
    complete(recognition)
    values = {key: tensor.numpy() for key, tensor in recognition.checkpoint.tensors.items()}
    return {
        key: value.astype("f4") if value.dtype.kind == "V" else value
        for key, value in values.items()
    }


def assert_equal(found: State, truth: State, where: str) -> None:
    assert found.keys() == truth.keys(), where
    for key, expected in truth.items():
        assert found[key].dtype == expected.dtype, f"{where}: {key}"
        assert np.array_equal(found[key], expected), f"{where}: {key}"


def assert_all_found(files: KerasFiles) -> None:
    """Each file holds the parts it should, with the values that Keras had in memory."""
    truth = {part: files.truth(part) for part in files.made["truth"]}
    for file in (file for file in files.made["files"] if "incomplete" not in file):
        found = opened(files.folder / file["path"])
        assert set(found) == (
            set(truth) if file["component"] == "trainer" else {file["component"]}
        ), file
        for part, recognition in found.items():
            assert_equal(weights(recognition), truth[part], f"{file['path']}, {part}")


@pytest.mark.parametrize("run", RUNS)
def test_every_weight_is_found(run: str) -> None:
    assert_all_found(made_by(run, RUNS[run]))


@pytest.mark.full
@pytest.mark.parametrize("run", MORE_RUNS)
def test_every_weight_is_found_in_more_files(run: str) -> None:
    assert_all_found(made_by(run, MORE_RUNS[run]))


ONE_CALL = {
    **{run: RUNS[run] for run in ("k2 plain", "k3 plain", "k2 float16", "k3 v2")},
    **QUANTISED,
    "k3 lora": LORA,
}


@pytest.mark.full
@pytest.mark.parametrize("run", ONE_CALL)
def test_every_format_loads_by_one_call(run: str, tmp_path: Path) -> None:
    """`from_single_file` gives what converting first gives, or refuses with the same words."""
    files = made_by(run, ONE_CALL[run])
    for file in files.made["files"]:
        if file["component"] != "text_encoder":
            continue
        place = files.folder / file["path"]
        output = tmp_path / file["format"]
        kind = weightport.CLIPTextModel
        try:
            weightport.convert(place, output, residue=False, lora_alpha=4.0)
        except ConversionError as error:
            with pytest.raises(ConversionError, match=re.escape(str(error))):
                kind.from_single_file(place, lora_alpha=4.0)
            continue
        expected = kind.from_pretrained(output, subfolder="text_encoder", dtype="auto")
        found = kind.from_single_file(place, lora_alpha=4.0, dtype="auto")
        assert found.config == expected.config
        for key, tensor in expected.state_dict().items():
            same = found.state_dict()[key]
            assert same.dtype is tensor.dtype
            assert torch.equal(same, tensor), f"{file['format']}: {key}"


@pytest.mark.parametrize("part", ["text_encoder", "unet", "decoder", "image_encoder"])
@pytest.mark.parametrize("run", ["k2 plain", "k3 plain"])
def test_golden_keys_are_in_the_order_of_creation(run: str, part: str) -> None:
    assert list(made_by(run, RUNS[run]).truth(part)) == golden_keys(part)


def test_checkpoint_of_keras_3_that_lost_layers_is_refused() -> None:
    files = made_by("k3 plain", RUNS["k3 plain"])
    (recognition,) = opened(files.path("unet", "tf_checkpoint")).values()
    with pytest.raises(
        ConversionError,
        match=r"Keras 3 `tf\.train\.Checkpoint`, which loses layers kept in Python lists",
    ):
        complete(recognition)


@pytest.mark.parametrize("run", QUANTISED)
def test_quantised_weights_are_what_keras_computes_with(run: str) -> None:
    """To the bit: the same two float32 operations, each rounded once, as `keras.src.quantizers`
    does them."""
    files = made_by(run, QUANTISED[run])
    assert_all_found(files)
    (recognition,) = opened(files.path("text_encoder", "weights.h5")).values()
    computed = [
        key
        for key, tensor in recognition.checkpoint.tensors.items()
        if isinstance(tensor, Computed)
    ]
    assert len(computed) == 74


@pytest.mark.full
@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_quantised_unet(mode: str) -> None:
    arguments = f"--quantize {mode} --components unet --formats weights.h5,model.h5,keras,sharded"
    assert_all_found(made_by("k3", arguments))


@pytest.mark.parametrize("kind", ["weights.h5", "keras", "sharded"])
def test_lora_is_merged_by_keras_in_its_own_formats(kind: str) -> None:
    files = made_by("k3 lora", LORA)
    (recognition,) = opened(files.path("text_encoder", kind)).values()
    assert_equal(weights(recognition), files.truth("text_encoder"), kind)


@pytest.mark.parametrize("kind", ["model.h5", "tf_checkpoint", "export"])
def test_lora_factors_are_merged_with_the_alpha_given(kind: str) -> None:
    """To rounding: a matrix product may add in another order than Keras's."""
    files = made_by("k3 lora", LORA)
    path, truth = files.path("text_encoder", kind), files.truth("text_encoder")
    with pytest.raises(
        ConversionError, match=r"holds LoRA factors `.*` of rank 4; give --lora-alpha"
    ):
        opened(path)
    (recognition,) = opened(path, alpha=4).values()
    found = weights(recognition)
    assert found.keys() == truth.keys()
    for key, expected in truth.items():
        np.testing.assert_allclose(found[key], expected, rtol=1e-6, atol=1e-7, err_msg=key)
    (recognition,) = opened(path, alpha=8).values()
    assert (
        sum(not np.array_equal(value, found[key]) for key, value in weights(recognition).items())
        == 74
    )


@pytest.mark.parametrize(
    ("kind", "convention"),
    [("model.h5", "kohya"), ("tf_checkpoint", "peft"), ("export", "kohya")],
)
def test_lora_factors_become_an_adapter(kind: str, convention: str, tmp_path: Path) -> None:
    """Baked into the base, it gives the kernels with which Keras computes."""
    files = made_by("k3 lora", LORA)
    path = files.path("text_encoder", kind)
    adapter = tmp_path / "lora.safetensors"
    options: Any = {"to": convention, "family": "sd1", "sync": False}
    with pytest.raises(ConversionError, match="give --lora-alpha"):
        weightport.convert(path, adapter, **options)
    made = weightport.convert(path, adapter, lora_alpha=4, **options)
    assert "text_encoder: 74 modules, LoRA" in made.notes
    base = tmp_path / "base"
    weightport.convert(path, base, lora_alpha=1e-30, family="sd1", sync=False)
    weightport.convert(path, tmp_path / "merged", lora_alpha=4, family="sd1", sync=False)
    weightport.convert(base, tmp_path / "baked", lora=[f"{adapter}"], sync=False)
    merged = load_file(tmp_path / "merged" / TEXT_ENCODER)
    before = load_file(base / TEXT_ENCODER)
    for key, weight in load_file(tmp_path / "baked" / TEXT_ENCODER).items():
        np.testing.assert_allclose(weight, merged[key], rtol=1e-6, atol=1e-6, err_msg=key)
    assert sum(not np.array_equal(before[key], merged[key]) for key in merged) == 74


def test_what_holds_no_factors_becomes_no_adapter(tmp_path: Path) -> None:
    files = made_by("k3 lora", LORA)
    path = files.path("text_encoder", "weights.h5")
    with pytest.raises(ConversionError, match="neither an adapter, nor a model with factors"):
        weightport.convert(path, tmp_path / "lora.safetensors", to="kohya", family="sd1")


@pytest.mark.full
def test_lora_of_every_component() -> None:
    files = made_by("k3 lora", "--lora --formats weights.h5,keras,model.h5")
    for part in ("text_encoder", "unet", "decoder", "image_encoder"):
        for kind in ("weights.h5", "keras", "model.h5"):
            (recognition,) = opened(files.path(part, kind), alpha=4).values()
            for key, value in weights(recognition).items():
                np.testing.assert_allclose(
                    value, files.truth(part)[key], rtol=1e-6, atol=1e-7, err_msg=f"{kind} {key}"
                )
