"""Adapters baked into a model: against float64, LyCORIS' forward, and diffusers with PEFT."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import weightport
from weightport.adapters.rounding import rounded
from weightport.converters.baking import Strengths, parse_lora

from ..support.adapter_files import cycle, kohya_name, kohya_state, layers, write_kohya
from ..support.lycoris_files import cases, effective_weight, module_of, state_of

UNET = "diffusion_pytorch_model.safetensors"
ALPHAS = cycle((4.0, 1.0, 3.0))
NAME = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"


def bake(source: Path, output: Path, *loras: str, **options: Any) -> weightport.Conversion:
    return weightport.convert(source, output, lora=loras, sync=False, **options)


@pytest.fixture(scope="module")
def unet(repo_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repo with nothing but the narrow UNet of SD 1.x."""
    repo = tmp_path_factory.mktemp("unet") / "repo"
    weightport.convert(repo_of("sd1"), repo, component="unet", sync=False)
    return repo


@pytest.fixture(scope="module")
def model(unet: Path) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(unet / "unet")


@pytest.fixture(scope="module")
def lora(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA on every layer, as kohya names it."""
    state = kohya_state({"lora_unet": model}, cycle((4, 2)), ALPHAS, torch.float32)
    return write_kohya(tmp_path_factory.mktemp("lora") / "style@home.safetensors", state)


@pytest.fixture(scope="module")
def baked(unet: Path, lora: Path) -> tuple[Path, weightport.Conversion]:
    output = unet.with_name("baked")
    return output, bake(unet, output, f"{lora}@0.7")


def expected(state: dict[str, Tensor], base: dict[str, Tensor], strength: float) -> dict[str, Any]:
    """The changed weights in float64, by kohya's definition."""
    changed = {}
    for key, weight in base.items():
        name = kohya_name("lora_unet", key.removesuffix(".weight"))
        if f"{name}.alpha" in state and key.endswith(".weight"):
            down = state[f"{name}.lora_down.weight"].double().flatten(1)
            up = state[f"{name}.lora_up.weight"].double().flatten(1)
            scale = strength * state[f"{name}.alpha"].item() / len(down)
            changed[key] = weight.double() + scale * (up @ down).reshape(weight.shape)
    return changed


def test_every_weight_is_rounded_once_and_the_rest_stays(
    unet: Path, lora: Path, baked: tuple[Path, weightport.Conversion]
) -> None:
    base = load_file(unet / "unet" / UNET)
    ours = load_file(baked[0] / "unet" / UNET)
    wanted = expected(load_file(lora), base, 0.7)
    assert len(wanted) == 282
    for key, weight in base.items():
        if key not in wanted:
            assert torch.equal(ours[key], weight), key
            continue
        exact = wanted[key].numpy()
        ulp = np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)
        assert np.abs(ours[key].double().numpy() - exact).max() > 0
        assert (np.abs(ours[key].double().numpy() - exact) / ulp).max() <= 0.51, key


def test_the_report_and_the_card_name_the_adapter(
    lora: Path, baked: tuple[Path, weightport.Conversion]
) -> None:
    report = json.loads((baked[0] / "conversion.json").read_text())
    (entry,) = report["adapters"]
    assert entry["path"] == lora.name
    assert len(entry["files"][lora.name]) == 64
    assert entry["components"]["unet"]["modules"] == {"LoRA": 282}
    assert entry["components"]["unet"]["strength"] == 0.7
    assert 0.1 < entry["components"]["unet"]["relative_change"] < 1
    assert entry["components"]["unet"]["lost_in_rounding"] < 1e-6
    card = (baked[0] / "README.md").read_text()
    assert "base_model_relation: merge" in card
    assert entry["files"][lora.name] in card
    assert any("282 x LoRA at 0.7" in note for note in baked[1].notes)


def test_two_runs_write_the_same_bytes(
    unet: Path, lora: Path, baked: tuple[Path, weightport.Conversion], tmp_path: Path
) -> None:
    bake(unet, tmp_path / "again", f"{lora}@0.7")
    for name in (f"unet/{UNET}", "conversion.json", "README.md"):
        assert (tmp_path / "again" / name).read_bytes() == (baked[0] / name).read_bytes()


def test_a_single_file_baked_is_the_repo_baked(
    unet: Path, lora: Path, baked: tuple[Path, weightport.Conversion], tmp_path: Path
) -> None:
    weightport.convert(unet, tmp_path / "plain.safetensors", to="ldm", sync=False)
    made = bake(tmp_path / "plain.safetensors", tmp_path / "x.safetensors", f"{lora}@0.7", to="ldm")
    assert made.report["adapters"][0]["path"] == lora.name
    weightport.convert(tmp_path / "x.safetensors", tmp_path / "repo", sync=False)
    ours = load_file(tmp_path / "repo" / "unet" / UNET)
    theirs = load_file(baked[0] / "unet" / UNET)
    assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.items())


@torch.no_grad()
def test_the_unet_computes_what_diffusers_does_with_peft(
    model: UNet2DConditionModel, unet: Path, tmp_path: Path
) -> None:
    some = ("down_blocks.1.attentions", "mid_block", "conv_in", "up_blocks.2.resnets")
    state = kohya_state({"lora_unet": model}, cycle((4, 2)), ALPHAS, torch.float32, some)
    lora = write_kohya(tmp_path / "style.safetensors", state)
    weightport.convert(lora, tmp_path / "peft.safetensors", to="peft", family="sd1", sync=False)
    bake(unet, tmp_path / "baked", str(lora))
    theirs = UNet2DConditionModel.from_pretrained(unet / "unet")
    pipe = StableDiffusionPipeline(
        vae=None,
        text_encoder=None,
        tokenizer=None,
        unet=theirs,
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.load_lora_weights(tmp_path / "peft.safetensors")
    ours = UNet2DConditionModel.from_pretrained(tmp_path / "baked" / "unet")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, 16, 16, generator=generator)
    words = torch.randn(1, 77, 64, generator=generator)
    a, b, plain = (one(x, 500, words).sample for one in (ours, theirs, model))
    assert (b - plain).norm() > 0.01 * plain.norm()
    assert (a - b).norm() <= 5e-7 * b.norm()


def test_every_flavour_is_what_lycoris_computes(unet: Path, tmp_path: Path) -> None:
    """One file with a module of each kind, on layers of a real model."""
    model = UNet2DConditionModel.from_pretrained(unet / "unet")
    kinds: dict[str, list[tuple[str, Any]]] = {}
    for name, layer in layers(model):
        size = getattr(layer, "kernel_size", (0,))[0]
        kind = f"conv{size}" if size else "linear"
        weight: Any = layer.weight
        rows, columns = weight.shape[:2]
        wide = min(rows, columns) >= 32 and rows.bit_count() == 1  # of butterflies
        if wide and "time_emb" not in name and getattr(layer, "stride", (1,))[0] == 1:
            kinds.setdefault(kind, []).append((name, layer))
    kinds["norm"] = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.GroupNorm)]
    state: dict[str, Tensor] = {}
    wanted: dict[str, Tensor] = {}
    taken = {kind: iter(several) for kind, several in kinds.items()}
    for case in cases():
        found = next(taken[case.layer], None)
        if found is None:
            continue
        name, layer = found
        spelled = kohya_name("lora_unet", name)
        state |= state_of(module_of(case, layer, 1.0, spelled), spelled)
        wanted[name], _ = effective_weight(layer)
    save_file(
        {key: tensor.contiguous() for key, tensor in state.items()}, tmp_path / "x.safetensors"
    )
    bake(unet, tmp_path / "baked", str(tmp_path / "x.safetensors"))
    ours = load_file(tmp_path / "baked" / "unet" / UNET)
    assert len(wanted) > 40
    for name, weight in wanted.items():
        error = (ours[f"{name}.weight"] - weight.reshape(ours[f"{name}.weight"].shape)).norm()
        assert error <= 1e-5 * weight.norm(), name


# --- how strongly, and what rounding takes --------------------------------------------------------


def one(folder: Path, name: str = "one", scale: float = 1.0, width: int = 96) -> str:
    """A LoRA of one layer of the narrow UNet."""
    generator = torch.Generator().manual_seed(0)
    state = {
        f"{NAME}.lora_down.weight": torch.randn(4, width, generator=generator) * scale,
        f"{NAME}.lora_up.weight": torch.randn(width, 4, generator=generator) * scale,
    }
    save_file(state, folder / f"{name}.safetensors")
    return str(folder / f"{name}.safetensors")


KEY = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"


def test_several_adapters_add_up(unet: Path, tmp_path: Path) -> None:
    both = [f"{one(tmp_path, 'a')}@0.5", f"{one(tmp_path, 'b', 0.5)}@unet=-2"]
    bake(unet, tmp_path / "baked", *both)
    change = torch.zeros(96, 96, dtype=torch.float64)
    for name, strength in (("a", 0.5), ("b", -2)):
        state = {key: t.double() for key, t in load_file(tmp_path / f"{name}.safetensors").items()}
        product = state[f"{NAME}.lora_up.weight"] @ state[f"{NAME}.lora_down.weight"]
        change = change + strength * product
    base = load_file(unet / "unet" / UNET)[KEY].double()
    ours = load_file(tmp_path / "baked" / "unet" / UNET)[KEY]
    assert torch.equal(ours, (base + change).float())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_what_rounding_takes_is_said(dtype: str, unet: Path, tmp_path: Path) -> None:
    """Rounded once, from float64 to the dtype that is written."""
    weak = one(tmp_path, scale=0.01)
    found = bake(unet, tmp_path / "baked", weak, dtype=dtype)
    state = {key: tensor.double() for key, tensor in load_file(weak).items()}
    change = state[f"{NAME}.lora_up.weight"] @ state[f"{NAME}.lora_down.weight"]
    exact = load_file(unet / "unet" / UNET)[KEY].double() + change
    ours = load_file(tmp_path / "baked" / "unet" / UNET)[KEY]
    kind = getattr(torch, dtype)
    assert ours.dtype == kind
    spacing = torch.finfo(kind).eps * exact.abs().clamp(min=1e-4)
    assert ((ours.double() - exact).abs() <= spacing / 2 * 1.01).all()
    lost = (ours.double() - exact).norm() / change.norm()
    entry = json.loads((tmp_path / "baked" / "conversion.json").read_text())["adapters"][0]
    assert entry["components"]["unet"]["lost_in_rounding"] == pytest.approx(lost.item(), rel=0.01)
    assert any(f"rounding to {'BF16' if dtype == 'bfloat16' else 'F16'}" in n for n in found.notes)


def test_bfloat16_is_rounded_once() -> None:
    """ml_dtypes rounds to float32 first, which makes a tie of what is none."""
    import ml_dtypes

    tie = 1 + 2.0**-8
    above = tie + 2.0**-40
    below = tie - 2.0**-40
    kind = np.dtype(ml_dtypes.bfloat16)
    values = np.array([above, tie, below, -above, 0.0, np.inf, -np.inf, 1e300])
    found = rounded(values, kind).astype(np.float64)
    assert found.tolist() == [1 + 2.0**-7, 1.0, 1.0, -1 - 2.0**-7, 0, np.inf, -np.inf, np.inf]
    assert np.isnan(rounded(np.array([np.nan]), kind).astype(np.float64)).all()
    random = np.random.default_rng(0).standard_normal(10_000)
    nearest = torch.from_numpy(random).to(torch.float32).to(torch.bfloat16).double().numpy()
    assert (rounded(random, kind).astype(np.float64) == nearest).mean() > 0.999


@pytest.mark.parametrize(
    ("text", "path", "strengths"),
    [
        ("a.safetensors", "a.safetensors", Strengths()),
        ("a.safetensors@0.8", "a.safetensors", Strengths(0.8)),
        ("a@b.safetensors", "a@b.safetensors", Strengths()),
        ("a@b.safetensors@-1", "a@b.safetensors", Strengths(-1.0)),
        ("a@unet=1,text_encoder=0.5", "a", Strengths(0.0, {"unet": 1.0, "text_encoder": 0.5})),
        ("a@nan", "a@nan", Strengths()),
        ("a@vea=1", "a@vea=1", Strengths()),
    ],
)
def test_strengths_are_parsed(text: str, path: str, strengths: Strengths) -> None:
    assert parse_lora(text) == (path, strengths)


# --- what is refused ------------------------------------------------------------------------------


def refused(unet: Path, tmp_path: Path, *loras: str) -> str:
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(weightport.ConversionError) as error:
        bake(unet, tmp_path / "baked", *loras)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_is_not_applied_is_an_error_unless_it_may_be(unet: Path, tmp_path: Path) -> None:
    state = load_file(one(tmp_path))
    words = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    state |= {f"{words}.lora_down.weight": torch.zeros(4, 64)}
    state |= {f"{words}.lora_up.weight": torch.zeros(64, 4)}
    save_file(state, tmp_path / "both.safetensors")
    both = str(tmp_path / "both.safetensors")
    assert "2 tensors belong to no module" in refused(unet, tmp_path, both)
    found = bake(unet, tmp_path / "baked", both, ignore_unmatched=True)
    assert any("2 tensors are left out" in note for note in found.notes)
    assert len(found.report["adapters"][0]["left_out"]) == 2


def test_an_embedding_in_the_file_is_left_out_if_it_may_be(unet: Path, tmp_path: Path) -> None:
    state = load_file(one(tmp_path)) | {"bundle_emb.a.b.emb_params": torch.zeros(2, 768)}
    save_file(state, tmp_path / "both.safetensors")
    both = str(tmp_path / "both.safetensors")
    assert "holds the embedding `a.b.emb_params`" in refused(unet, tmp_path, both)
    found = bake(unet, tmp_path / "baked", both, ignore_unmatched=True)
    assert found.report["adapters"][0]["left_out"] == ["bundle_emb.a.b.emb_params"]


def test_two_changes_whose_order_matters_are_refused(unet: Path, tmp_path: Path) -> None:
    files = []
    for name in "ab":
        state = load_file(one(tmp_path, name)) | {f"{NAME}.dora_scale": torch.ones(96, 1)}
        save_file(state, tmp_path / f"{name}.safetensors")
        files.append(str(tmp_path / f"{name}.safetensors"))
    message = refused(unet, tmp_path, *files)
    assert "whose order matters (LoRA + DoRA, LoRA + DoRA)" in message
    bake(unet, tmp_path / "baked", files[0], one(tmp_path, "plain"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_in_factors_is_refused_by_name(value: float, unet: Path, tmp_path: Path) -> None:
    state = load_file(one(tmp_path))
    state[f"{NAME}.lora_up.weight"][0, 0] = value
    save_file(state, tmp_path / "bad.safetensors")
    message = refused(unet, tmp_path, str(tmp_path / "bad.safetensors"))
    assert f"`{NAME}` holds NaN or Inf (up)" in message


def test_other_widths_and_other_files_are_refused(unet: Path, tmp_path: Path) -> None:
    assert "makes a change [64, 64]" in refused(unet, tmp_path, one(tmp_path, width=64))
    assert "no such file" in refused(unet, tmp_path, str(tmp_path / "none.safetensors"))
    assert "not an adapter" in refused(unet, tmp_path, str(unet / "unet" / UNET))
