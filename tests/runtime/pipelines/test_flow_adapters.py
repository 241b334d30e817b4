"""Adapters in pipelines of SD 3 and Flux, against diffusers with PEFT."""

from __future__ import annotations

import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import weightport

from ...support import flow_pairs
from ...support.adapter_files import cycle, kohya_state, state_over, write_kohya
from ...support.closeness import assert_equal, assert_near
from ...support.command import run
from ...support.transformer_families import renamed

PREFIX = "model.diffusion_model."
KINDS = {
    "flux": ("FluxPipeline", "dev", "ldm_flux"),
    "sd35_medium": ("StableDiffusion3Pipeline", "sd3 deep", "ldm_mmdit"),
}


def pipelines(family: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """diffusers' and ours, with models of their own."""
    name, kind, _ = KINDS[family]
    theirs, ours = flow_pairs.build(name, kind)
    for pipe in (theirs, ours):
        for component in ("transformer", "text_encoder", "text_encoder_2"):
            model = deepcopy(getattr(pipe, component)).to(dtype)
            setattr(pipe, component, model)
    return theirs, ours


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """Two LoRAs of each family as kohya writes them, over all layers and one text encoder."""
    made = {}
    folder = tmp_path_factory.mktemp("files")
    for family, (name, kind, table) in KINDS.items():
        theirs, _ = flow_pairs.build(name, kind)
        model = theirs.transformer
        state = {key: one.numpy() for key, one in model.state_dict().items()}
        original = renamed(table, state, dict(model.config))
        for seed, which in enumerate("ab"):
            alphas = cycle((4.0, 1.0, 3.0)) if which == "a" else cycle((2.0,))
            lora = state_over(original, PREFIX, alpha=alphas, seed=seed)
            lora |= kohya_state(
                {"lora_te1": theirs.text_encoder}, dtype=torch.float32, only=("layers.",)
            )
            path = write_kohya(folder / f"{family}-{which}.safetensors", lora)
            made[family, which] = path
            made[family, f"{which}-peft"] = path.with_suffix(".peft.safetensors")
            weightport.convert(
                path, made[family, f"{which}-peft"], to="peft", family=family, sync=False
            )
    return made


@torch.no_grad()
def outputs(pipe: Any) -> tuple[Tensor, Tensor]:
    """What transformer and text encoder compute."""
    generator = torch.Generator().manual_seed(0)
    model = pipe.transformer
    is_flux = hasattr(model, "single_transformer_blocks")

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(model.dtype)

    inputs: dict[str, Any] = {
        "hidden_states": some(1, 16, 64) if is_flux else some(1, 16, 8, 8),
        "encoder_hidden_states": some(1, 7, flow_pairs.T5_WIDTH),
        "pooled_projections": some(1, model.config.pooled_projection_dim),
        "timestep": torch.tensor([0.5], dtype=model.dtype),
    }
    if is_flux:
        inputs["img_ids"] = torch.arange(48.0).reshape(16, 3) % 4
        inputs["txt_ids"] = torch.zeros(7, 3)
        inputs["guidance"] = torch.tensor([3.5])
    encoded = pipe.text_encoder(torch.tensor([[4, 3, 2, 1]]))[0]
    return model(**inputs, return_dict=False)[0], encoded


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("flux", torch.float32), ("flux", torch.bfloat16), ("sd35_medium", torch.bfloat16)],
    ids=str,
)
def test_side_paths_are_those_of_peft(
    family: str, dtype: torch.dtype, files: dict[tuple[str, str], Path]
) -> None:
    theirs, ours = pipelines(family, dtype)
    base = outputs(ours)
    assert_equal(base, outputs(theirs))
    for name in "ab":
        ours.load_lora_weights(files[family, name], adapter_name=name)
        theirs.load_lora_weights(files[family, f"{name}-peft"], adapter_name=name)
    assert ours.get_list_adapters() == theirs.get_list_adapters()
    several: list[Any] = [[0.7, 0.4], [{"transformer": 0.5}, 1.5]]
    for weights in several:
        ours.set_adapters(["a", "b"], weights)
        theirs.set_adapters(["a", "b"], weights)
        assert ours.get_active_adapters() == theirs.get_active_adapters()
        assert_near(outputs(ours), outputs(theirs))
        assert not torch.equal(outputs(ours)[0], base[0])
    ours.disable_lora()
    assert_equal(outputs(ours), base)
    ours.enable_lora()
    ours.delete_adapters("a")
    theirs.delete_adapters("a")
    assert_near(outputs(ours), outputs(theirs))
    ours.unload_lora_weights()
    assert_equal(outputs(ours), base)


@pytest.mark.parametrize("family", KINDS)
def test_fused_and_unfused(family: str, files: dict[tuple[str, str], Path]) -> None:
    _, ours = pipelines(family)
    before = outputs(ours)
    ours.load_lora_weights(files[family, "a"])
    side = outputs(ours)
    ours.fuse_lora()
    ours.unload_lora_weights()
    fused = outputs(ours)
    for one, other, base in zip(fused, side, before, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm() < 1e-3 * (one - base).norm()
    ours.unfuse_lora()
    assert_equal(outputs(ours), before)


@pytest.mark.parametrize("family", KINDS)
def test_a_run_may_scale(family: str, files: dict[tuple[str, str], Path]) -> None:
    theirs, ours = pipelines(family)
    ours.load_lora_weights(files[family, "a"])
    theirs.load_lora_weights(files[family, "a-peft"])
    images = [
        pipe(
            "a red fox",
            height=32,
            width=32,
            num_inference_steps=2,
            max_sequence_length=16,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
            joint_attention_kwargs={"scale": 0.5},
        ).images
        for pipe in (ours, theirs)
    ]
    assert torch.equal(*images)
    with pytest.raises(ValueError, match=r"^joint_attention_kwargs: gligen is not supported"):
        ours("a red fox", joint_attention_kwargs={"gligen": 1.0})


def test_flavours_over_fused_layers(files: dict[tuple[str, str], Path]) -> None:
    """LoKr, LoHa, DoRA by rows and a bias: the rows of each layer are those of the whole."""
    _, ours = pipelines("flux")
    before = outputs(ours)
    name = "lora_unet_single_blocks_0_linear1"
    w1, w2 = torch.randn(14, 4), torch.randn(16, 8)  # the shares end within rows of the first
    a, b, c, d = (torch.randn(*shape) for shape in ((224, 2), (2, 32), (224, 2), (2, 32)))
    block = ours.transformer.single_transformer_blocks[0]
    layers = [block.attn.to_q, block.attn.to_k, block.attn.to_v, block.proj_mlp]
    base = torch.cat([layer.weight.detach().clone() for layer in layers])
    V = base + a @ b
    cases = {
        "lokr": ({"lokr_w1": w1, "lokr_w2": w2}, base + torch.kron(w1, w2)),
        "loha": (
            {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d},
            base + (a @ b) * (c @ d),
        ),
        "dora": (
            {"lora_up.weight": a, "lora_down.weight": b, "dora_scale": torch.ones(224, 1)},
            V / V.norm(dim=1, keepdim=True),
        ),
    }
    for title, (tensors, wanted) in cases.items():
        ours.load_lora_weights({f"{name}.{role}": one for role, one in tensors.items()})
        with pytest.raises(ValueError, match=r"^joint_attention_kwargs=.*plain LoRA"):
            ours("a red fox", joint_attention_kwargs={"scale": 0.5})
        got = torch.cat([layer.weight for layer in layers])
        assert (got - wanted).norm() <= 1e-5 * wanted.norm(), title
        ours.unload_lora_weights()
        assert_equal(outputs(ours), before)
    with pytest.raises(ValueError, match="linear1` is BOFT over layers that the model has apart"):
        ours.load_lora_weights({f"{name}.oft_blocks": torch.zeros(2, 56, 4, 4)})
    assert ours.get_list_adapters() == {}


def test_generate_takes_them_and_a_png_keeps_them(
    files: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    _, ours = flow_pairs.build("FluxPipeline", "dev")
    ours.save_pretrained(tmp_path / "model")
    style = tmp_path / "style.safetensors"
    shutil.copy(files["flux", "a"], style)
    small = ["--steps", "1", "--size", "32x32", "--seed", "1", "--device", "cpu"]
    given: dict[str, list[str | Path]] = {
        "plain": [tmp_path / "model", "a fox", *small],
        "styled": [tmp_path / "model", "a fox", *small, "--lora", f"{style}@transformer=0.5"],
        "again": ["--from", tmp_path / "styled.png"],
    }
    made = {}
    for name, arguments in given.items():
        ran = run("generate", *arguments, "-o", tmp_path / f"{name}.png")
        assert ran.status == 0, ran.err
        made[name] = Image.open(tmp_path / f"{name}.png").tobytes()
    assert made["styled"] == made["again"] != made["plain"]


def test_input_channels_that_a_lora_lacks_stay() -> None:
    """Flux Fill's first layer has more than a LoRA for text-to-image; diffusers pads it."""
    theirs, ours = flow_pairs.build("FluxFillPipeline", "fill")
    x = torch.randn(3, 144)
    state = {
        "transformer.x_embedder.lora_A.weight": torch.randn(2, 64),
        "transformer.x_embedder.lora_B.weight": torch.randn(32, 2),
    }
    got = []
    for pipe in (ours, theirs):
        pipe.transformer = deepcopy(pipe.transformer)
        pipe.load_lora_weights(dict(state))
        got.append(pipe.transformer.x_embedder(x))
    assert torch.equal(*got)
    ours.fuse_lora()
    fused = ours.transformer.x_embedder(x)
    assert (fused - got[0]).norm() <= 1e-5 * fused.norm()


def test_whole_norms_take_the_place_of_the_models() -> None:
    """As in Black Forest Labs' files; under the names of diffusers too."""
    theirs, ours = pipelines("flux")
    before = outputs(ours)
    scale = torch.rand(16) + 1
    name = "double_blocks.0.img_attn.norm.query_norm.scale"
    other = "transformer.single_transformer_blocks.1.attn.norm_k.weight"
    ours.load_lora_weights({name: scale, other: 2 * scale})
    theirs.transformer.transformer_blocks[0].attn.norm_q.weight.data = scale
    theirs.transformer.single_transformer_blocks[1].attn.norm_k.weight.data = 2 * scale
    assert_equal(outputs(ours), outputs(theirs))
    assert not torch.equal(outputs(ours)[0], before[0])
    ours.unload_lora_weights()
    assert_equal(outputs(ours), before)


@pytest.mark.parametrize("family", KINDS)
def test_what_diffusers_saves_is_what_we_save(family: str, tmp_path: Path) -> None:
    name = KINDS[family][0]
    options: dict[str, Any] = {
        "transformer_lora_layers": {"proj_out.lora_A.weight": torch.ones(2, 3)},
        "transformer_lora_adapter_metadata": {"r": 2, "target_modules": {"proj_out"}},
        "text_encoder_lora_layers": {"x.lora_A.weight": torch.ones(2, 3)},
    }
    saved = []
    for library in (weightport, diffusers):
        folder = tmp_path / library.__name__
        getattr(library, name).save_lora_weights(folder, **options)
        saved.append(folder / "pytorch_lora_weights.safetensors")
    assert load_file(saved[0]).keys() == load_file(saved[1]).keys()
    assert safe_open(saved[0], "pt").metadata() == safe_open(saved[1], "pt").metadata()
