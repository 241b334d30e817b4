"""Files and folders of other programs are refused by the name of what they are, by both commands."""

from __future__ import annotations

import io
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from ...support.command import assert_refused, run


def zipped(**members: bytes) -> bytes:
    """A zip of stored members."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_STORED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return content.getvalue()


def npz() -> bytes:
    content = io.BytesIO()
    np.savez(content, weight=np.zeros(3))
    return content.getvalue()


def headed(framework: str) -> bytes:
    """A safetensors file whose header names a framework."""
    return save({"conv_in.weight": np.zeros((4, 3, 3, 3), np.float32)}, {"format": framework})


XML = '<?xml version="1.0"?>\n<!-- exported -->\n'
FILES: dict[str, tuple[str | bytes, str]] = {
    "OpenVINO": (f'{XML}<net name="vae" version="10">', "OpenVINO"),
    "OpenVINO without a declaration": ("\ufeff\n<net>", "OpenVINO"),
    "another XML file": (f"{XML}<project/>", "an XML file"),
    "a page": ("<!doctype HTML><html>", "HTML page.*failed download"),
    "a page of XHTML": (f"{XML}<html xmlns='x'>", "HTML page.*failed download"),
    "an answer of S3": (f"{XML}<Error><Code>AccessDenied</Code></Error>", "server.*failed"),
    "not quite XML": ("< 5 tensors", "a text file"),
    "TFLite": (b"\x20\0\0\0TFL3" + bytes(9), "TFLite"),
    "ONNX of torch": (b"\x08\x08\x12\x07pytorch\x1a\x052.1.0", "ONNX"),
    "ONNX of another producer": (b"\x08\x0a\x12\x0btf2onnx 1.0", "ONNX"),
    "ONNX without a producer": (b"\x08\x09:\x8a\x01\n", "ONNX"),
    "Core ML": (b"\x08\x04\x12\x9a\x01\n\x10\n\x05input", "Core ML"),
    "MindSpore": (b"\n\x40\n\x09conv.bias\x12\x30\x08\x40\x12\x07Float16", "MindSpore"),
    "TensorFlow graph": (b"\n\x2a\n\x05input\x12\x0bPlaceholder*\x0b", "frozen TensorFlow graph"),
    "Flax": (b"\x82\xa7decoder\x84\xa6conv_in", "Flax"),
    "Flax, wide": (b"\xde\x00\x11\xa6params\x81", "Flax"),
    "TensorRT": (b"ftrt" + bytes(60), "TensorRT"),
    "ncnn": ("7767517\n75 83\n", "ncnn"),
    "GGUF": (b"GGUF\x02\0\0\0", "GGUF"),
    "GGML": (b"lmgg\x01\0\0\0", "GGUF"),
    "zstd": (b"\x28\xb5\x2f\xfd\x04", "Zstandard"),
    "an image": (b"\x89PNG\r\n\x1a\n", "a PNG that ends too early"),
    "NumPy": (b"\x93NUMPY\x01\0", "a numpy array"),
    "NumPy archive": (npz(), "NumPy archive"),
    "DDUF": (zipped(**{"model_index.json": b"{}", "unet/config.json": b"{}"}), "DDUF.*unzip"),
    "MLX": (headed("mlx"), "weights of MLX.*channels last"),
    "Flax in safetensors": (headed("flax"), "weights of Flax"),
    "nothing that is known": (struct.pack("<4I", 1, 2, 3, 4), "in no format known"),
}


@pytest.mark.parametrize("name", FILES)
def test_file_of_another_program(place: Path, name: str) -> None:
    content, reason = FILES[name]
    file = place / "model.ckpt"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    ended = run("convert", file, "-o", place / "out")
    assert_refused(ended, file, reason)
    assert run("inspect", file) == ended


FOLDERS = {
    "torch.distributed": (["__0_0.distcp", ".metadata"], "torch.distributed.*dcp_to_torch"),
    "torch.distributed of Lightning": (["__1_0.distcp", "meta.pt"], "torch.distributed"),
    "FSDP of accelerate": (["pytorch_model_fsdp_0/__0_0.distcp", "optimizer.bin"], "distributed"),
    "Orbax": (["_CHECKPOINT_METADATA", "d/0/x"], "Orbax"),
    "Core ML": (["Manifest.json", "Data/com.apple.CoreML/model.mlmodel"], "Core ML"),
    "compiled Core ML": (["coremldata.bin", "model.mil"], "Core ML"),
    "repo of ONNX": (["model_index.json", "unet/model.onnx", "unet/weights.pb"], "ONNX"),
    "repo of OpenVINO": (
        ["model_index.json", "unet/openvino_model.xml", "unet/openvino_model.bin"],
        "OpenVINO",
    ),
    "repo of Flax": (["model_index.json", "vae/diffusion_flax_model.msgpack"], "Flax"),
    "component of Flax": (["config.json", "diffusion_flax_model.msgpack"], "Flax"),
    "repo of Paddle": (["model_index.json", "vae/model_state.pdparams"], "Paddle"),
    "GGUF": (["unet-Q4_K.gguf"], "GGUF"),
    "nothing that is known": (["notes.txt"], "a folder, but neither"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_folder_of_another_program(place: Path, name: str) -> None:
    files, reason = FOLDERS[name]
    folder = place / "model"
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("{}")
    ended = run("convert", folder, "-o", place / "out")
    assert_refused(ended, folder, reason)
    assert run("inspect", folder) == ended
