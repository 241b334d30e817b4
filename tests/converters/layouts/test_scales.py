"""Weights of eight bits: read exactly, and multiplied by their scales where they have some."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import weightport
from weightport.errors import ConversionError

from ...support.synthetic import weights

KINDS = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
QUERY = "encoder.mid_block.attentions.0.to_q"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def vae() -> Tensors:
    return {key: torch.from_numpy(array) for key, array in weights("sd1", "vae").items()}


def small(vae: Tensors, dtype: torch.dtype) -> Tensors:
    """The matrices in eight bits, and the rest in float16, as people save UNets."""
    return {
        key: tensor.to(dtype) if tensor.ndim > 1 else tensor.half() for key, tensor in vae.items()
    }


def converted(source: Path, out: Path, **options: Any) -> Tensors:
    weightport.convert(source, out, overwrite=True, **options)
    loaded: Tensors = load_file(out / "vae" / "diffusion_pytorch_model.safetensors")
    return loaded


@pytest.mark.parametrize("kind", KINDS)
def test_eight_bits_become_bfloat16_exactly(tmp_path: Path, vae: Tensors, kind: str) -> None:
    state = small(vae, KINDS[kind])
    values = torch.arange(256, dtype=torch.uint8).view(KINDS[kind]).float()
    finite = torch.where(values.isfinite(), values, torch.zeros(()))
    flat = state[f"{QUERY}.weight"].reshape(-1)
    flat[:256] = finite.to(KINDS[kind])  # every number that there is
    save_file(state, tmp_path / "vae.safetensors")
    torch.save(state, tmp_path / "vae.pt")
    for name in ("vae.safetensors", "vae.pt"):
        found = converted(tmp_path / name, tmp_path / "out")
        for key, tensor in state.items():
            expected = torch.bfloat16 if tensor.ndim > 1 else torch.float16
            assert found[key].dtype == expected, key
            assert torch.equal(found[key].float(), tensor.float()), key
        notes = json.loads((tmp_path / "out" / "conversion.json").read_text())["notes"]
        assert any("become bfloat16, which holds them exactly" in note for note in notes)
    for dtype in ("float16", "float32"):
        found = converted(tmp_path / "vae.safetensors", tmp_path / "out", dtype=dtype)
        assert all(torch.equal(found[key].float(), state[key].float()) for key in state)
    weightport.convert(tmp_path / "vae.safetensors", tmp_path / "back.safetensors", to="ldm")
    weightport.convert(tmp_path / "back.safetensors", tmp_path / "again")
    again = load_file(tmp_path / "again" / "vae" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(again[key].float(), state[key].float()) for key in state)


@pytest.mark.parametrize("kind", KINDS)
def test_eight_bits_that_are_no_numbers(tmp_path: Path, vae: Tensors, kind: str) -> None:
    state = small(vae, KINDS[kind])
    weight = state[f"{QUERY}.weight"]
    weight[0, 0] = float("nan")
    save_file(state, tmp_path / "vae.safetensors")
    with pytest.raises(ConversionError, match="1 values are NaN or Inf"):
        weightport.convert(tmp_path / "vae.safetensors", tmp_path / "out")


@pytest.mark.parametrize("name", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("rows", [False, True])
def test_scaled_weights(tmp_path: Path, vae: Tensors, name: str, rows: bool) -> None:
    weight = vae[f"{QUERY}.weight"]
    largest = weight.abs().amax(1, keepdim=True) if rows else weight.abs().max()
    scale = largest / 448
    state = {key: tensor.half() for key, tensor in vae.items()}
    state[f"{QUERY}.weight"] = (weight / scale).to(torch.float8_e4m3fn)
    state[f"{QUERY}.{name}"] = scale
    state[f"{QUERY}.scale_input"] = torch.ones(1)
    state["scaled_fp8"] = torch.zeros(0, dtype=torch.float8_e4m3fn)
    save_file(state, tmp_path / "vae.safetensors")
    found = converted(tmp_path / "vae.safetensors", tmp_path / "out")
    expected = state[f"{QUERY}.weight"].float() * scale
    assert found[f"{QUERY}.weight"].dtype == torch.float32
    assert torch.equal(found[f"{QUERY}.weight"], expected)
    assert found.keys() == vae.keys()
    report = json.loads((tmp_path / "out" / "conversion.json").read_text())
    dropped = report["sources"][0]["dropped"]
    assert dropped.keys() == {"scaled_fp8", f"{QUERY}.{name}", f"{QUERY}.scale_input"}
    assert report["components"]["vae"][f"{QUERY}.weight"]["computed"] == ["times its scale"]
    weightport.convert(tmp_path / "out", tmp_path / "back.safetensors", to="ldm")
    with safe_open(tmp_path / "back.safetensors", "pt") as file:
        assert not any("scale" in key for key in file.keys())  # noqa: SIM118


@pytest.mark.parametrize(
    ("key", "shape", "reason"),
    [
        (f"{QUERY}.scale_weight", (3,), "neither one number nor one for each of the 96 rows"),
        (f"{QUERY}.scale_weight", (1, 96, 1), "neither one number"),
        ("decoder.conv_in.scale_weight", (1,), "the scale of no weight of 8 bits"),
        ("nothing.scale_weight", (1,), "the scale of no weight of 8 bits"),
    ],
)
def test_scales_that_fit_no_weight(
    tmp_path: Path, vae: Tensors, key: str, shape: tuple[int, ...], reason: str
) -> None:
    state = vae | {f"{QUERY}.weight": vae[f"{QUERY}.weight"].to(torch.float8_e4m3fn)}
    save_file(state | {key: torch.ones(shape)}, tmp_path / "vae.safetensors")
    with pytest.raises(ConversionError, match=reason):
        weightport.inspect(tmp_path / "vae.safetensors")
