"""Input that is no KerasCV model, or a damaged or hostile one: one line that names it, and nothing
left behind."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from weightport.converters.checkpoint import SourceFile
from weightport.errors import ConversionError

from ..support.command import assert_refused, edited, listing, refused, run
from ..support.synthetic import STEMS, write_repo

# ---- files that are no Keras files


STRANGERS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "one-byte": (b"\x89", "not a checkpoint"),
    "text": (b"these are not the weights you are looking for\n", "a text file"),
    "html": (b"<!DOCTYPE html><html><body>404: Not Found</body></html>", "HTML"),
    "html-after-blank-lines": (b"\n\n  <html>", "HTML"),
    "git-lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 3439\n",
        "git-lfs pointer",
    ),
    "gzip": (gzip.compress(b"weights"), "gzip"),
    "pickle": (pickle.dumps({"weights": [1.0]}), "pickle|PyTorch|tensors"),
    "old-pickle": (
        pickle.dumps({"weights": [1.0]}, protocol=0),
        "not a checkpoint|pickle|PyTorch|tensors",
    ),
    "json": (b'{"error": "Repository not found"}', "not a sharded Keras"),
    "json-list-of-shards": (b'{"weight_map": {"/a/vars": [1]}}', "weight_map"),
    "deep-json": (b'{"a":' * 100_000, "nested too deeply"),
    "numpy": (b"\x93NUMPY\x01\x00", "numpy"),
    "gguf": (b"GGUF\x03\x00\x00\x00", "GGUF"),
    "zeros": (bytes(4096), "no format known"),
    "binary": (bytes(range(128, 256)) * 16, "no|not"),
    "signature-only": (b"\x89HDF\r\n\x1a\n", "truncated"),
    "zip-signature-only": (b"PK\x03\x04", "zip"),
    "safetensors-of-nothing": (
        b"\x02\x00\x00\x00\x00\x00\x00\x00{}  ",
        "not recognised|bytes follow",
    ),
}


@pytest.mark.parametrize("name", STRANGERS)
def test_a_file_that_is_no_checkpoint(place: Path, name: str) -> None:
    content, reason = STRANGERS[name]
    file = place / "model.h5"
    file.write_bytes(content)
    refused(place, file, names=file, reason=reason)


def test_a_pickle_is_not_run(place: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(place / "executed"),)

    file = place / "model.h5"
    file.write_bytes(pickle.dumps(Payload()))
    refused(place, file, names=file, reason="pickle|PyTorch|mkdir")
    assert not (place / "executed").exists()


def test_a_file_that_is_not_there(place: Path) -> None:
    refused(place, place / "missing.h5", names=place / "missing.h5", reason="no such file")


def test_a_fifo_does_not_hang(place: Path) -> None:
    os.mkfifo(place / "model.h5")
    refused(place, place / "model.h5", names=place / "model.h5", reason="not a regular file")


def test_a_device_does_not_hang(place: Path) -> None:
    refused(place, Path("/dev/zero"), names="/dev/zero", reason="not a regular file")


def test_a_dangling_link(place: Path) -> None:
    (place / "model.h5").symlink_to(place / "nowhere")
    refused(place, place / "model.h5", names=place / "model.h5", reason="no such file")


def test_a_loop_of_links(place: Path) -> None:
    (place / "model.h5").symlink_to(place / "model.h5")
    refused(place, place / "model.h5", names=place / "model.h5", reason="no such file")


@pytest.mark.parametrize("content", [{}, {"config.json": "{}"}, {"model_index.json": "{}"}])
def test_a_folder_that_is_nothing(place: Path, content: dict[str, str]) -> None:
    folder = place / "model"
    folder.mkdir()
    for name, text in content.items():
        (folder / name).write_text(text)
    refused(place, folder, names=folder, reason="a folder, but neither|without weights")


@pytest.mark.parametrize(
    "name",
    ["two\nlines.h5", "\x1b[31mred\x1b[0m.h5", "tab\there.h5", "bell\x07.h5", "\u202eltr.h5"],
)
def test_a_name_cannot_write_to_the_terminal(place: Path, name: str) -> None:
    file = place / name
    file.write_bytes(b"text")
    refused(place, file, names=".h5", reason="a text file")


def test_a_name_that_is_not_text(place: Path) -> None:
    name = os.fsdecode(b"latin-\xe9.h5")
    (place / name).write_bytes(b"text")
    refused(place, place / name, names="latin-", reason="a text file")


def test_a_name_that_is_too_long(place: Path) -> None:
    refused(place, place / ("x" * 300), names="xxx", reason="[Nn]ame.*too long|no such file")


# ---- truncated files


CUTS = [0.0001, 0.001, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 0.999, 1.0]


def cut(file: Path, place: Path, share: float) -> Path:
    """A copy of a file that ends too early, by one byte at least."""
    content = file.read_bytes()
    copy = place / file.name
    copy.write_bytes(content[: min(int(len(content) * share), len(content) - 1)])
    return copy


@pytest.mark.parametrize("share", CUTS)
def test_truncated_weights(place: Path, sd1_keras: dict[str, Path], share: float) -> None:
    file = cut(sd1_keras["image_encoder"], place, share)
    refused(place, file, names=file, reason="truncated|damaged|outside|ends")


@pytest.mark.parametrize("share", CUTS)
def test_truncated_legacy_weights(place: Path, sd1_legacy: dict[str, Path], share: float) -> None:
    file = cut(sd1_legacy["image_encoder"], place, share)
    refused(place, file, names=file, reason="truncated|damaged|outside|ends")


@pytest.mark.parametrize("share", CUTS)
def test_truncated_archive(place: Path, sd1_archive: Path, share: float) -> None:
    file = cut(sd1_archive, place, share)
    refused(place, file, names=file, reason="zip")


@pytest.mark.parametrize("share", CUTS)
def test_truncated_repo(place: Path, sd1_repo: Path, share: float) -> None:
    repo = place / "repo"
    shutil.copytree(sd1_repo, repo, ignore=shutil.ignore_patterns("unet", "text_encoder"))
    name = "vae/diffusion_pytorch_model.safetensors"
    file = cut(sd1_repo / name, repo / "vae", share)
    refused(place, repo, names=file, reason="truncated|not a safetensors|complete|needed")


# ---- models that are other, damaged or incomplete


def other_weights(file: h5py.File) -> None:
    """`save_weights` of a small classifier, as Keras 3 writes it."""
    for layer, shape in (("conv2d", (3, 3, 3, 8)), ("dense", (128, 10))):
        file[f"layers/{layer}/vars/0"] = np.zeros(shape, "f4")
        file[f"layers/{layer}/vars/1"] = np.zeros(shape[-1], "f4")


def other_legacy(file: h5py.File) -> None:
    """The same as Keras 2 writes it."""
    file.attrs["layer_names"] = ["conv2d", "dense"]
    for layer, shape in (("conv2d", (3, 3, 3, 8)), ("dense", (128, 10))):
        file[f"{layer}/{layer}/kernel:0"] = np.zeros(shape, "f4")
        file[layer].attrs["weight_names"] = [f"{layer}/kernel:0"]


def resnet(file: h5py.File) -> None:
    """A model that has a block of the same name."""
    for layer in ("res_block", "res_block_1"):
        file[f"layers/{layer}/conv2d/vars/0"] = np.zeros((3, 3, 8, 8), "f4")


def not_keras(file: h5py.File) -> None:
    file["experiment/run/temperature"] = np.zeros(100, "f4")


def no_data(file: h5py.File) -> None:
    file.attrs["title"] = "empty"


@pytest.mark.parametrize("make", [other_weights, other_legacy, resnet, not_keras, no_data])
def test_a_file_of_another_model(place: Path, make: Callable[[h5py.File], None]) -> None:
    file = place / "model.h5"
    with h5py.File(file, "w") as opened:
        make(opened)
    refused(place, file, names=file, reason="none of its layers belong|not recognised")


CONV = "layers/padded_conv2d/conv2d/vars"


def missing_layer(file: h5py.File) -> None:
    del file["layers/attention_block"]


def missing_last_block(file: h5py.File) -> None:
    del file["layers/resnet_block_9"]


def missing_bias(file: h5py.File) -> None:
    del file[f"{CONV}/1"]


def extra_layer(file: h5py.File) -> None:
    file["layers/dense/vars/0"] = np.zeros((4, 4), "f4")


def extra_block(file: h5py.File) -> None:
    file.copy("layers/resnet_block_8", "layers/resnet_block_99")


def extra_variable(file: h5py.File) -> None:
    file[f"{CONV}/2"] = np.zeros(4, "f4")


def put(file: h5py.File, array: np.ndarray) -> None:
    del file[f"{CONV}/0"]
    file[f"{CONV}/0"] = array


DAMAGE: dict[str, tuple[Callable[[h5py.File], None], str]] = {
    "missing-layer": (missing_layer, "10 tensors of the KerasCV .*missing: attention_block"),
    "missing-block": (missing_last_block, "missing: resnet_block"),
    "missing-bias": (missing_bias, "1 tensors.*missing: padded_conv2d.0.conv2d.bias"),
    "extra-layer": (extra_layer, "not part of the .*dense.0"),
    "extra-block": (extra_block, "not part of the .*resnet_block"),
    "extra-variable": (extra_variable, "padded_conv2d.0.conv2d"),
    "wider": (
        lambda file: put(file, np.zeros((3, 3, 3, 64), "f4")),
        r"wrong shape.*\[3, 3, 3, 64\].*expected",
    ),
    "5x5": (
        lambda file: put(file, np.zeros((5, 5, 3, 32), "f4")),
        r"wrong shape.*\[5, 5, 3, 32\].*expected",
    ),
    "rank": (lambda file: put(file, np.zeros((9, 96), "f4")), r"wrong shape.*\[9, 96\]"),
    "scalar": (lambda file: put(file, np.ones((), "f4")), r"wrong shape.*\[\]"),
    "empty": (lambda file: put(file, np.zeros((3, 3, 3, 0), "f4")), r"wrong shape.*\[3, 3, 3, 0\]"),
    "integers": (lambda file: put(file, np.zeros((3, 3, 3, 32), "i4")), "holds I32 numbers"),
    "long-integers": (lambda file: put(file, np.zeros((3, 3, 3, 32), "i8")), "holds I64 numbers"),
    "int8-without-scale": (
        lambda file: put(file, np.zeros((3, 3, 3, 32), "i1")),
        "quantised kernel without",
    ),
    "booleans": (lambda file: put(file, np.zeros((3, 3, 3, 32), "?")), "holds BOOL numbers"),
    "strings": (lambda file: put(file, np.full((3, 3, 3, 32), b"weight", "S6")), "string"),
    "complex": (lambda file: put(file, np.zeros((3, 3, 3, 32), "c8")), "complex|compound"),
    "big-endian": (lambda file: put(file, np.zeros((3, 3, 3, 32), ">f4")), "big-endian"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_model(place: Path, sd1_keras: dict[str, Path], name: str) -> None:
    damage, reason = DAMAGE[name]
    file = edited(sd1_keras["image_encoder"], place, damage)
    refused(place, file, names=file, reason=reason)


def test_widths_that_the_usual_groups_do_not_divide(
    place: Path, sd1_keras: dict[str, Path]
) -> None:
    """Every tensor of 32 channels gets 33: the config that can hold them is said."""

    def widen(file: h5py.File) -> None:
        names: list[str] = []
        file.visititems(
            lambda name, node: names.append(name) if isinstance(node, h5py.Dataset) else None
        )
        for name in names:
            shape = tuple(33 if size == 32 else size for size in file[name].shape)
            del file[name]
            file[name] = np.zeros(shape, "f4")

    file = edited(sd1_keras["image_encoder"], place, widen)
    ended = run("convert", file, "-o", place / "out")
    assert ended.status == 0, ended
    assert "block_out_channels [33, 64, 96, 96]" in ended.out
    assert "norm_num_groups 1 (stock 32)" in ended.out


# ---- sources that do not go together


def test_two_files_for_one_component(
    place: Path, sd1_keras: dict[str, Path], sd1_legacy: dict[str, Path]
) -> None:
    first, second = sd1_keras["decoder"], sd1_legacy["decoder"]
    refused(place, first, second, names=second, reason=f"a second decoder, after {first}")


def test_one_file_twice(place: Path, sd1_keras: dict[str, Path]) -> None:
    file = sd1_keras["decoder"]
    refused(place, file, file, names=file, reason="a second decoder")


def test_families_are_not_mixed(
    place: Path, sd1_keras: dict[str, Path], sd2_keras: dict[str, Path]
) -> None:
    unet, encoder = sd1_keras["unet"], sd2_keras["text_encoder"]
    refused(
        place,
        unet,
        encoder,
        names=encoder,
        reason=f"not of one family: {unet}: unet of sd1; .*of sd2",
    )


def test_the_family_asked_for(place: Path, sd1_keras: dict[str, Path]) -> None:
    file = sd1_keras["text_encoder"]
    refused(place, file, "--family", "sd2", names=file, reason="--family sd2 does not fit .*of sd1")


def test_one_bad_file_among_good_ones(place: Path, sd1_keras: dict[str, Path]) -> None:
    file = place / "unet.h5"
    file.write_bytes(b"")
    refused(place, sd1_keras["decoder"], file, names=file, reason="empty")


# ---- weights that are no numbers


def spoiled(file: Path, place: Path, *values: float) -> Path:
    def spoil(opened: h5py.File) -> None:
        opened[f"{CONV}/0"][0, 0, 0, : len(values)] = values

    return edited(file, place, spoil)


@pytest.mark.parametrize("values", [(np.nan,), (np.inf,), (-np.inf, np.nan)])
def test_nan_and_inf(place: Path, sd1_keras: dict[str, Path], values: tuple[float, ...]) -> None:
    file = spoiled(sd1_keras["image_encoder"], place, *values)
    before = listing(place)
    ended = run("convert", file, "-o", place / "out")
    reason = f"{len(values)} values are NaN or Inf, in .*encoder.conv_in.weight.*--allow-nan"
    assert_refused(ended, file, reason)
    assert listing(place) == before

    ended = run("convert", file, "-o", place / "out", "--allow-nan")
    assert ended.status == 0, ended.err
    note = f"{len(values)} values are NaN or Inf, in vae encoder.conv_in.weight"
    assert f"note: {note}\n" in ended.out
    assert note in json.loads((place / "out" / "conversion.json").read_text())["notes"]


@pytest.mark.parametrize("values", [(np.nan,), (np.inf,), (-np.inf, np.nan)])
def test_nan_and_inf_on_the_way_back(place: Path, values: tuple[float, ...]) -> None:
    repo = write_repo(place / "repo", "sd1", components=("vae",))
    path = repo / "vae" / f"{STEMS['vae']}.safetensors"
    state = load_file(path)
    state["decoder.conv_in.bias"][: len(values)] = values
    save_file(state, path)
    arguments: list[str | Path] = ["convert", repo, "-o", place / "out.h5", "--to", "kerascv"]
    before = listing(place)
    reason = f"{len(values)} values are NaN or Inf, in vae decoder.conv_in.bias"
    assert_refused(run(*arguments), repo, f"{reason}; --allow-nan")
    assert listing(place) == before
    ended = run(*arguments, "--allow-nan")
    assert (ended.status, reason in ended.out) == (0, True), ended


def test_numbers_too_large_for_float16(place: Path, sd1_keras: dict[str, Path]) -> None:
    """65520 is the smallest number that rounds to infinity."""
    file = spoiled(sd1_keras["image_encoder"], place, 65519.0, 65520.0, -1e30)
    reason = "2 values are too large for F16, in vae encoder.conv_in.weight.*--dtype bfloat16"
    outputs: list[list[str | Path]] = [
        ["-o", place / "out"],
        ["-o", place / "out.h5", "--to", "kerascv"],
    ]
    for output in outputs:
        before = listing(place)
        assert_refused(run("convert", file, *output, "--dtype", "float16"), file, reason)
        assert listing(place) == before
        assert run("convert", file, *output, "--dtype", "bfloat16").status == 0
        assert (
            "2 values are too large"
            in run("convert", file, *output, "--dtype", "float16", "--allow-nan", "--overwrite").out
        )


def test_a_source_that_changes_and_keeps_size_and_time(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"ab")
    file = SourceFile(path)
    before = path.stat()
    time.sleep(0.05)  # ticks of the kernel
    path.write_bytes(b"cd")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(ConversionError, match="changed while it was read"):
        file.check_unchanged()
    file.close()
