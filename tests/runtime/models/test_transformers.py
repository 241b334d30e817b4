"""The transformers of SD 3 and Flux and the encoder of T5 against diffusers and transformers: same
keys in the same order, the same bits in float32, bfloat16 and float16."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers

import weightport

from ...support.pipeline_pairs import pair

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SD3: dict[str, Any] = {
    "sample_size": 8,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "joint_attention_dim": 24,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 20,
    "pos_embed_max_size": 6,
}
FLUX: dict[str, Any] = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 20,
    "axes_dims_rope": (4, 6, 6),
}
TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "sd3": ("SD3Transformer2DModel", SD3),
    "sd3.5 large": ("SD3Transformer2DModel", {**SD3, "qk_norm": "rms_norm"}),
    "sd3.5 medium": (
        "SD3Transformer2DModel",
        {**SD3, "qk_norm": "rms_norm", "dual_attention_layers": (0, 1)},
    ),
    "sd3, more channels": (
        "SD3Transformer2DModel",
        {**SD3, "in_channels": 5, "out_channels": 4, "patch_size": 1},
    ),
    "flux schnell": ("FluxTransformer2DModel", FLUX),
    "flux dev": ("FluxTransformer2DModel", {**FLUX, "guidance_embeds": True}),
    "flux fill": (
        "FluxTransformer2DModel",
        {**FLUX, "in_channels": 24, "out_channels": 16, "guidance_embeds": True},
    ),
}
T5: dict[str, Any] = {
    "vocab_size": 50,
    "d_model": 24,
    "d_kv": 6,
    "d_ff": 40,
    "num_layers": 3,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
}


@pytest.fixture(autouse=True)
def quick_torch() -> Iterator[None]:
    """No gradients, and one thread: for tensors this small, more only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


def models(name: str) -> tuple[Any, Any]:
    """Both libraries' transformers with the same weights."""
    kind, config = TRANSFORMERS[name]
    theirs = getattr(diffusers, kind)(**config)
    ours = getattr(weightport, kind)(**config)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    return pair(theirs, ours, 1)


def inputs(name: str, dtype: torch.dtype) -> dict[str, Any]:
    """Two samples, which are not square."""
    generator = torch.Generator().manual_seed(2)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    kind, config = TRANSFORMERS[name]
    given: dict[str, Any] = {
        "encoder_hidden_states": random(2, 7, 24),
        "pooled_projections": random(2, 20),
    }
    if kind.startswith("SD3"):
        channels = config.get("in_channels", 16)
        side = 2 if config.get("patch_size") == 1 else 4
        sample = random(2, channels, 2 * side, side)
        return {**given, "hidden_states": sample, "timestep": torch.tensor([901.3, 12.0])}
    given |= {
        "hidden_states": random(2, 12, config["in_channels"]),
        "timestep": torch.tensor([0.9013, 0.012]).to(dtype),
        "txt_ids": torch.zeros(7, 3),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(3.0)),
    }
    if config.get("guidance_embeds"):
        given["guidance"] = torch.tensor([3.5, 7.0])
    return given


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_transformer_gives_the_same_bits(name: str) -> None:
    theirs, ours = models(name)
    for dtype in DTYPES:
        given = inputs(name, dtype)
        expected = theirs.to(dtype)(**given).sample
        found = ours.to(dtype)(**given).sample
        assert expected.isfinite().all()
        assert torch.equal(found, expected), dtype


def test_blocks_can_be_left_out() -> None:
    theirs, ours = models("sd3.5 medium")
    given = inputs("sd3.5 medium", torch.float32)
    expected = theirs(**given, skip_layers=[1]).sample
    (found,) = ours(**given, skip_layers=[1], return_dict=False)
    assert torch.equal(found, expected)
    assert not torch.equal(found, ours(**given).sample)


def test_float16_stays_finite_in_flux() -> None:
    """The text and single blocks are cut off at its largest number."""
    theirs, ours = models("flux schnell")
    for model in (theirs, ours):
        model.transformer_blocks[1].ff_context.net[2].weight.mul_(1e5)
        model.single_transformer_blocks[0].proj_out.weight.mul_(1e4)
        model.half()
    given = inputs("flux schnell", torch.float16)
    expected = theirs(**given).sample
    assert torch.equal(ours(**given).sample.isnan(), expected.isnan())
    assert torch.equal(ours(**given).sample.nan_to_num(), expected.nan_to_num())


def test_random_models_have_the_table_of_places() -> None:
    for options in (SD3, {**SD3, "pos_embed_max_size": 9, "sample_size": 15}):
        theirs = diffusers.SD3Transformer2DModel(**options)
        ours = weightport.SD3Transformer2DModel(**options)
        assert torch.equal(ours.pos_embed.pos_embed, theirs.pos_embed.pos_embed)


def test_a_large_image_is_refused() -> None:
    _, ours = models("sd3")
    given = inputs("sd3", torch.float32)
    given["hidden_states"] = torch.zeros(2, 16, 14, 4)
    with pytest.raises(ValueError, match="7 x 2 patches are more than pos_embed_max_size = 6"):
        ours(**given)


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("sd3", {"caption_projection_dim": 30}, "caption_projection_dim = 30 must be"),
        ("sd3", {"qk_norm": "layer_norm"}, "qk_norm = 'layer_norm' is not supported"),
        ("sd3", {"num_attention_heads": 0, "caption_projection_dim": 0}, "attention heads"),
        ("flux dev", {"axes_dims_rope": [4, 6]}, "axes_dims_rope"),
        ("flux dev", {"axes_dims_rope": [5, 5, 6]}, "axes_dims_rope"),
    ],
)
def test_configs_that_make_no_sense(name: str, options: dict[str, Any], told: str) -> None:
    kind, config = TRANSFORMERS[name]
    with pytest.raises(ValueError, match=told):
        getattr(weightport, kind).from_config({**config, **options})


def test_what_attention_cannot_do_is_refused() -> None:
    _, ours = models("sd3")
    with pytest.raises(ValueError, match="joint_attention_kwargs: x is not supported"):
        ours(**inputs("sd3", torch.float32), joint_attention_kwargs={"x": 1})
    _, ours = models("flux dev")
    given = {**inputs("flux dev", torch.float32), "guidance": None}
    with pytest.raises(ValueError, match="guidance must be given"):
        ours(**given)


# --- T5 -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny T5 as transformers saves it."""
    theirs = transformers.T5EncoderModel(transformers.T5Config(**T5))
    ours = weightport.T5EncoderModel(T5)
    with torch.no_grad():
        theirs, _ = pair(theirs, ours, 3)
    folder = tmp_path_factory.mktemp("t5")
    theirs.save_pretrained(folder)
    return folder


def loaded(folder: Path, dtype: torch.dtype | str) -> tuple[Any, Any]:
    theirs = transformers.T5EncoderModel.from_pretrained(folder, dtype=dtype).eval()
    return theirs, weightport.T5EncoderModel.from_pretrained(folder, dtype=dtype)


IDS = torch.randint(0, 50, (2, 77), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_t5_gives_the_same_bits(t5: Path, dtype: torch.dtype) -> None:
    theirs, ours = loaded(t5, dtype)
    ours_by_name = ours.state_dict()
    for key, tensor in theirs.state_dict().items():
        if key != "encoder.embed_tokens.weight":
            assert ours_by_name[key].dtype == tensor.dtype, key
    for ids in (IDS, IDS[:, :7], torch.cat([IDS] * 4, dim=1)):
        assert torch.equal(ours(ids)[0], theirs(ids)[0])
    expected = theirs(IDS, output_hidden_states=True).hidden_states
    found = ours(IDS, output_hidden_states=True).hidden_states
    assert len(found) == len(expected)
    assert all(map(torch.equal, found, expected))


def test_t5_sees_what_the_mask_shows(t5: Path) -> None:
    theirs, ours = loaded(t5, torch.float32)
    mask = (torch.arange(77) < 20).long()[None].expand(2, -1)
    assert torch.equal(ours(IDS, mask)[0], theirs(IDS, mask)[0])
    assert torch.equal(ours(IDS, torch.ones_like(IDS))[0], theirs(IDS)[0])


def test_t5_keeps_wide_what_float16_cannot_hold(t5: Path, tmp_path: Path) -> None:
    """However the weights come to be float16, as transformers has it."""
    loaded(t5, torch.float16)[0].save_pretrained(tmp_path)
    for dtype in ("auto", torch.float16):
        theirs, ours = loaded(tmp_path, dtype)
        assert ours.dtype == theirs.dtype == torch.float16
        wide = ours.encoder.block[0].layer[1].DenseReluDense.wo.weight
        assert wide.dtype == torch.float32
        assert torch.equal(ours(IDS)[0], theirs(IDS)[0])


def test_t5_in_float16_throughout(t5: Path) -> None:
    """Cast afterwards, its layers are cut off at the largest number."""
    theirs, ours = loaded(t5, torch.float32)
    for model in (theirs, ours):
        model.shared.weight.data.mul_(30_000)
        model.encoder.block[1].layer[1].DenseReluDense.wo.weight.data.mul_(1e5)
        model.half()
    expected = theirs(IDS)[0]
    assert torch.equal(ours(IDS)[0].nan_to_num(), expected.nan_to_num())


def test_a_whole_t5_gives_its_encoder(t5: Path, tmp_path: Path) -> None:
    theirs = transformers.T5ForConditionalGeneration(transformers.T5Config(**T5))
    theirs.save_pretrained(tmp_path)
    ours = weightport.T5EncoderModel.from_pretrained(tmp_path)
    alone = transformers.T5EncoderModel.from_pretrained(tmp_path).eval()
    assert torch.equal(ours(IDS)[0], alone(IDS)[0])


def test_t5_is_saved_for_transformers(t5: Path, tmp_path: Path) -> None:
    theirs, ours = loaded(t5, torch.float32)
    ours.save_pretrained(tmp_path)
    again = transformers.T5EncoderModel.from_pretrained(tmp_path).eval()
    assert torch.equal(again(IDS)[0], theirs(IDS)[0])


def test_another_feed_forward_layer_is_refused() -> None:
    config = copy.copy(T5)
    del config["feed_forward_proj"]
    with pytest.raises(ValueError, match="feed_forward_proj = 'relu' is not supported"):
        weightport.T5EncoderModel(config)
