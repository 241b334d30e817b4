"""Adapters over fused layers: merged, expanded, decomposed, and of T5; the change that they make is
that of their definition."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import weightport

from ..support.adapter_files import state_over
from ..support.transformer_families import FLUX, original, t5_of, weights

PREFIX = "model.diffusion_model."
QKV = "double_blocks.0.img_attn.qkv"
NAME = "lora_unet_double_blocks_0_img_attn_qkv"


def torch_state(family: str, component: str) -> dict[str, Tensor]:
    return {key: torch.from_numpy(one) for key, one in original(family, component).items()}


def changes(file: Path, folder: Path) -> dict[str, Tensor]:
    """By how much a file changes Flux's original weights, in float32."""
    base = torch_state("flux", "transformer")
    save_file(base, folder / "model.safetensors")
    weightport.convert(
        folder / "model.safetensors",
        folder / "baked.safetensors",
        lora=[str(file)],
        to="ldm",
        family="flux",
        sync=False,
        overwrite=True,
    )
    baked = load_file(folder / "baked.safetensors")
    return {key: baked[key].double() - one.double() for key, one in base.items()}


def assert_near(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    for key, change in theirs.items():
        assert (ours[key] - change).norm() <= 2e-6 * (1 + change.norm()), key


def converted(*files: Path, output: Path, **options: object) -> Path:
    weightport.convert(list(files), output, family="flux", sync=False, **options)  # type: ignore[arg-type]
    return output


@pytest.mark.parametrize("to", ["kohya", "peft", "onetrainer"])
def test_merged_and_renamed_they_change_as_both(to: str, tmp_path: Path) -> None:
    """A file that has a fused layer, and one that has its parts."""
    base = torch_state("flux", "transformer")
    some = {key: one for key, one in base.items() if "_blocks.0." in key}
    save_file(state_over(some, PREFIX, alpha=lambda i: 2.0), tmp_path / "a.safetensors")
    save_file(state_over(some, PREFIX, alpha=lambda i: 2.0, seed=1), tmp_path / "b.safetensors")
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    converted(b, output=tmp_path / "b-peft.safetensors", to="peft")
    alone = [changes(file, tmp_path) for file in (a, b)]
    wanted = {key: 0.5 * alone[0][key] + 0.5 * alone[1][key] for key in alone[0]}
    for second in (b, tmp_path / "b-peft.safetensors"):
        both = converted(
            a, second, output=tmp_path / "both.safetensors", to=to, merge=(0.5, 0.5), overwrite=True
        )
        assert_near(changes(both, tmp_path), wanted)


@pytest.mark.parametrize("to", ["kohya", "original"])
def test_layers_that_were_trained_apart_change_as_before(to: str, tmp_path: Path) -> None:
    """Of several ranks, and one layer of a fused one alone."""
    torch.manual_seed(0)
    state = {}
    front = "transformer.transformer_blocks.0.attn"
    single = "transformer.single_transformer_blocks.1"
    shapes = {f"{front}.to_q": (32, 4), f"{front}.to_v": (32, 1), f"{single}.proj_mlp": (128, 3)}
    for name, (rows, rank) in shapes.items():
        state[f"{name}.lora_A.weight"] = torch.randn(rank, 32)
        state[f"{name}.lora_B.weight"] = torch.randn(rows, rank)
    save_file(state, tmp_path / "x.safetensors")
    there = converted(tmp_path / "x.safetensors", output=tmp_path / "y.safetensors", to=to)
    wanted = changes(tmp_path / "x.safetensors", tmp_path)
    assert sum(bool(change.any()) for change in wanted.values()) == 2
    assert_near(changes(there, tmp_path), wanted)


def test_expanded_a_lokr_is_that_of_each_layer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    w1, a, b = torch.randn(4, 4), torch.randn(24, 2), torch.randn(2, 8)
    state = {f"{NAME}.lokr_w1": w1, f"{NAME}.lokr_w2_a": a, f"{NAME}.lokr_w2_b": b}
    save_file(state, tmp_path / "lokr.safetensors")
    plain = converted(
        tmp_path / "lokr.safetensors", output=tmp_path / "x.safetensors", to="peft", expand=True
    )
    wanted = torch.kron(w1.double(), a.double() @ b.double())
    key = f"{PREFIX}{QKV}.weight"
    for file in (tmp_path / "lokr.safetensors", plain):
        change = changes(file, tmp_path)[key]
        assert (change - wanted).norm() <= 1e-6 * wanted.norm(), file


@pytest.mark.parametrize("to", ["peft", "onetrainer", "original"])
def test_dora_by_rows_and_loha_come_back(to: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = {
        f"{NAME}.lora_down.weight": torch.randn(2, 32),
        f"{NAME}.lora_up.weight": torch.randn(96, 2),
        f"{NAME}.dora_scale": torch.rand(96, 1) + 0.5,
    }
    if to != "peft":
        other = "lora_unet_single_blocks_1_linear1"
        state |= {f"{other}.hada_w{i}_a": torch.randn(224, 2) for i in (1, 2)}
        state |= {f"{other}.hada_w{i}_b": torch.randn(2, 32) for i in (1, 2)}
        state[f"{other}.alpha"] = torch.tensor(1.0)
    save_file(state, tmp_path / "x.safetensors")
    there = converted(tmp_path / "x.safetensors", output=tmp_path / "y.safetensors", to=to)
    assert_near(changes(there, tmp_path), changes(tmp_path / "x.safetensors", tmp_path))
    back = load_file(converted(there, output=tmp_path / "z.safetensors", to="kohya"))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in state.items())


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_t5_is_changed_too(family: str, tmp_path: Path) -> None:
    component = t5_of(family)
    base = {key: torch.from_numpy(one) for key, one in weights(family, component).items()}
    repo = tmp_path / "t5.safetensors"
    save_file(torch_state(family, component), repo)
    key = "encoder.block.1.layer.0.SelfAttention.q"
    name = f"lora_te3_{key.replace('.', '_')}"
    rows, columns = base[f"{key}.weight"].shape
    down, up = torch.randn(2, columns), torch.randn(rows, 2)
    save_file(
        {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up},
        tmp_path / "x.safetensors",
    )
    given = f"{tmp_path / 'x.safetensors'}@{component}=0.5"
    weightport.convert(repo, tmp_path / "out", lora=[given], family=family, sync=False)
    (file,) = (tmp_path / "out" / component).glob("*.safetensors")
    baked = load_file(file)
    wanted = base[f"{key}.weight"] + 0.5 * up @ down
    assert (baked[f"{key}.weight"] - wanted).abs().max() <= 1e-5
    assert all(torch.equal(baked[k], one) for k, one in base.items() if k != f"{key}.weight")
    there = tmp_path / "peft.safetensors"
    weightport.convert(tmp_path / "x.safetensors", there, to="peft", family=family, sync=False)
    assert f"{component}.{key}.lora_A.weight" in load_file(there)
    assert (family in FLUX) == (component == "text_encoder_2")
