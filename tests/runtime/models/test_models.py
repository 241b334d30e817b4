"""The runtime's models against diffusers and transformers: same keys in the same order, same
outputs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import weightport.models
from weightport.runtime.models.clip import CLIPTextModel, CLIPTextModelWithProjection
from weightport.runtime.models.controlnet import ControlNetModel
from weightport.runtime.models.layers import GEGLU
from weightport.runtime.models.unet import UNet2DConditionModel
from weightport.runtime.models.vae import AutoencoderKL
from weightport.runtime.semantics import apply_semantics, kerascv_gelu

from ...support.pipeline_pairs import randomise

# Both sides call the same kernels on the same values, so outputs are bit-equal where the memory
# layout of every intermediate agrees too. A kernel may sum in another order for another layout: a
# few float32 roundings (6e-8 each).
TOLERANCE = 1e-6

DOWN = {"cross": "CrossAttnDownBlock2D", "plain": "DownBlock2D"}
UP = {"cross": "CrossAttnUpBlock2D", "plain": "UpBlock2D"}


def unet_config(levels: str = "cross cross cross plain", **options: Any) -> dict[str, Any]:
    """A narrow UNet: `levels` from the finest to the coarsest."""
    kinds = levels.split()
    return {
        "down_block_types": [DOWN[kind] for kind in kinds],
        "up_block_types": [UP[kind] for kind in reversed(kinds)],
        "block_out_channels": [32, 64, 64, 64][: len(kinds)],
        "cross_attention_dim": 24,
        "layers_per_block": 1,
        **options,
    }


SDXL = {
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 20 + 6 * 8,
}
UPSCALER = {
    "in_channels": 7,
    "num_class_embeds": 50,
    "use_linear_projection": True,
    "only_cross_attention": [True, True, True, False],
}
UNETS: dict[str, dict[str, Any]] = {
    "sd1": unet_config(layers_per_block=2),
    "sd2": unet_config(
        use_linear_projection=True, attention_head_dim=[1, 2, 2, 2], upcast_attention=True
    ),
    "sd2 wider": unet_config(
        block_out_channels=[64, 128, 128, 128],
        use_linear_projection=True,
        attention_head_dim=[1, 2, 2, 2],
    ),
    "inpainting": unet_config(in_channels=9),
    "pix2pix": unet_config(in_channels=8),
    "depth": unet_config(in_channels=5, use_linear_projection=True),
    "upscaler": unet_config("plain cross cross cross", **UPSCALER),
    "sdxl": unet_config(
        "plain cross cross",
        transformer_layers_per_block=[1, 2, 3],
        attention_head_dim=[2, 4, 4],
        **SDXL,
    ),
    "refiner": unet_config(
        "plain cross cross plain",
        transformer_layers_per_block=2,
        attention_head_dim=[3, 4, 4, 4],
        **SDXL,
    ),
    "lcm": unet_config(time_cond_proj_dim=16),
    "uneven layers": unet_config(layers_per_block=[1, 2, 1, 3], norm_eps=1e-2, norm_num_groups=16),
    "uneven context": unet_config(cross_attention_dim=[24, 24, 24, 24], only_cross_attention=True),
    "no middle": unet_config("cross cross", mid_block_type=None),
    "a plain middle": unet_config(
        "plain cross cross",
        mid_block_type="UNetMidBlock2D",
        transformer_layers_per_block=[0, 2, [1, 3]],
        reverse_transformer_layers_per_block=[[2, 1, 1], [3, 1, 2], 1],
        layers_per_block=2,
        **SDXL,
    ),
    "other features": unet_config(flip_sin_to_cos=False, freq_shift=1),
}

VAE = {
    "block_out_channels": [32, 64, 64, 64],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
}
VAES: dict[str, dict[str, Any]] = {
    "sd": VAE,
    "defaults": {},
    "attention in two stages": {
        **VAE,
        "down_block_types": ["DownEncoderBlock2D"] * 2 + ["AttnDownEncoderBlock2D"] * 2,
        "up_block_types": ["AttnUpDecoderBlock2D"] * 2 + ["UpDecoderBlock2D"] * 2,
        "layers_per_block": 1,
    },
    "no mixing, no attention": {
        **VAE,
        "latent_channels": 16,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "mid_block_add_attention": False,
    },
    "upscaler": {
        "block_out_channels": [32, 64, 96],
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "up_block_types": ["UpDecoderBlock2D"] * 3,
        "layers_per_block": 1,
        "latent_channels": 3,
        "norm_num_groups": 16,
        "scaling_factor": 0.08333,
    },
}

CLIP = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
    "projection_dim": 20,
    "bos_token_id": 98,
    "eos_token_id": 99,
}
CLIPS: dict[str, dict[str, Any]] = {
    "sd1": {**CLIP, "hidden_act": "quick_gelu", "eos_token_id": 2},
    "sd2": {**CLIP, "hidden_act": "gelu"},
    "kerascv v2": {**CLIP, "hidden_act": "gelu_pytorch_tanh"},
    "default activation": {**CLIP, "layer_norm_eps": 1e-6},
}


def same_weights(oracle: torch.nn.Module, ours: torch.nn.Module, prefix: str = "") -> None:
    """Give `ours` the random weights of `oracle`, by strict loading, and check that the way back is
    strict too."""
    theirs = {prefix + key: tensor for key, tensor in randomise(oracle).state_dict().items()}
    assert list(ours.state_dict()) == list(theirs)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in theirs.items()
    }
    ours.load_state_dict(theirs, strict=True)
    oracle.load_state_dict(
        {key.removeprefix(prefix): v for key, v in ours.state_dict().items()}, strict=True
    )
    ours.eval()


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    distance = ((ours - theirs).norm() / theirs.norm()).item()
    assert distance <= tolerance, f"relative L2 distance {distance:.2e}"


def unet_inputs(config: dict[str, Any], size: tuple[int, int] = (16, 8)) -> dict[str, Any]:
    torch.manual_seed(1)
    inputs: dict[str, Any] = {
        "sample": torch.randn(2, config.get("in_channels", 4), *size),
        "timestep": torch.tensor([7, 901]),
        "encoder_hidden_states": torch.randn(2, 5, 24),
    }
    if "addition_embed_type" in config:
        inputs["added_cond_kwargs"] = {
            "text_embeds": torch.randn(2, 20),
            "time_ids": torch.randint(0, 1024, (2, 6)),
        }
    if "time_cond_proj_dim" in config:
        inputs["timestep_cond"] = torch.randn(2, config["time_cond_proj_dim"])
    if "num_class_embeds" in config:
        inputs["class_labels"] = torch.tensor([3, 20])
    return inputs


@pytest.fixture(autouse=True)
def quick_torch() -> Iterator[None]:
    """No gradients, and one thread: for tensors this small, more only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def unet_pair() -> Callable[[dict[str, Any]], tuple[Any, Any]]:
    diffusers = pytest.importorskip("diffusers")

    def build(config: dict[str, Any]) -> tuple[Any, Any]:
        oracle, ours = diffusers.UNet2DConditionModel(**config), UNet2DConditionModel(**config)
        same_weights(oracle, ours)
        return oracle, ours

    return build


@pytest.mark.parametrize("kind", UNETS)
def test_unet_equals_diffusers(kind: str, unet_pair: Any) -> None:
    oracle, ours = unet_pair(UNETS[kind])
    inputs = unet_inputs(UNETS[kind])
    assert_close(ours(**inputs).sample, oracle(**inputs).sample)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("UNet2DConditionModel", UNETS["lcm"]),
        ("UNet2DConditionModel", UNETS["a plain middle"]),
        ("AutoencoderKL", VAES["attention in two stages"]),
        ("ControlNetModel", {"block_out_channels": (32, 64, 64, 64), "cross_attention_dim": 24}),
    ],
)
def test_one_seed_draws_the_weights_of_diffusers(name: str, config: dict[str, Any]) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(3)
    theirs = getattr(diffusers, name)(**config).state_dict()
    torch.manual_seed(3)
    ours = getattr(weightport.models, name)(**config).state_dict()
    assert [key for key in theirs if not torch.equal(theirs[key], ours[key])] == []


def test_unet_takes_timesteps_of_any_form(unet_pair: Any) -> None:
    oracle, ours = unet_pair(UNETS["depth"])
    for timestep in (500, 12.5, torch.tensor(999), torch.tensor([1.5])):
        inputs = {**unet_inputs(UNETS["depth"]), "timestep": timestep}
        assert_close(ours(**inputs).sample, oracle(**inputs).sample)


def test_unet_takes_sizes_that_do_not_halve_evenly(unet_pair: Any) -> None:
    oracle, ours = unet_pair(UNETS["depth"])
    for size in ((9, 15), (10, 12)):
        inputs = unet_inputs(UNETS["depth"], size)
        assert_close(ours(**inputs).sample, oracle(**inputs).sample)


@pytest.mark.parametrize("size", [(8, 16), (10, 12), (2, 3)])
def test_freeu_equals_diffusers(size: tuple[int, int], unet_pair: Any) -> None:
    oracle, ours = unet_pair(UNETS["depth"])
    inputs = unet_inputs(UNETS["depth"], size)
    plain = ours(**inputs).sample
    for model in (oracle, ours):
        model.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    weighed = ours(**inputs).sample
    assert torch.equal(weighed, oracle(**inputs).sample)
    assert not torch.allclose(weighed, plain, rtol=1e-2)
    ours.disable_freeu()
    assert torch.equal(ours(**inputs).sample, plain)


def test_unet_in_bfloat16(unet_pair: Any) -> None:
    oracle, ours = (model.bfloat16() for model in unet_pair(UNETS["sdxl"]))
    inputs = unet_inputs(UNETS["sdxl"])
    inputs = {**inputs, "sample": inputs["sample"].bfloat16()}
    inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"].bfloat16()
    assert_close(
        ours(**inputs).sample, oracle(**inputs).sample, tolerance=1e-2
    )  # bfloat16 rounds at 4e-3


@pytest.mark.parametrize("missing", ["class_labels", "added_cond_kwargs"])
def test_unet_names_the_missing_condition(missing: str) -> None:
    config = UNETS[{"class_labels": "upscaler", "added_cond_kwargs": "sdxl"}[missing]]
    inputs = unet_inputs(config)
    del inputs[missing]
    with pytest.raises(ValueError, match=missing):
        UNet2DConditionModel.from_config(config)(**inputs)


def controlnet_config(config: dict[str, Any], **options: Any) -> dict[str, Any]:
    """The encoder's part of a UNet's config."""
    decoder = ("up_block_types", "out_channels", "time_cond_proj_dim")
    return {key: value for key, value in config.items() if key not in decoder} | options


CONTROLNETS = {
    "sd1": controlnet_config(UNETS["sd1"]),
    "sd2": controlnet_config(UNETS["sd2"], conditioning_channels=4),
    "sdxl": controlnet_config(UNETS["sdxl"], conditioning_embedding_out_channels=[8, 16, 24, 32]),
    "upscaler": controlnet_config(UNETS["upscaler"], global_pool_conditions=True),
    "bgr": controlnet_config(UNETS["inpainting"], controlnet_conditioning_channel_order="bgr"),
}


@pytest.mark.parametrize("kind", CONTROLNETS)
def test_controlnet_equals_diffusers(kind: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    config = CONTROLNETS[kind]
    oracle, ours = diffusers.ControlNetModel(**config), ControlNetModel(**config)
    same_weights(oracle, ours)
    inputs = unet_inputs(config) | {
        "controlnet_cond": torch.randn(2, config.get("conditioning_channels", 3), 128, 64)
    }
    for scale in (1.0, 0.7):
        theirs, output = (model(**inputs, conditioning_scale=scale) for model in (oracle, ours))
        pairs = zip(output.down_block_res_samples, theirs.down_block_res_samples, strict=True)
        for mine, their in (*pairs, (output.mid_block_res_sample, theirs.mid_block_res_sample)):
            assert_close(mine, their)


@pytest.mark.parametrize("kind", VAES)
def test_vae_equals_diffusers(kind: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    config = VAES[kind]
    oracle, ours = diffusers.AutoencoderKL(**config), AutoencoderKL(**config)
    same_weights(oracle, ours)
    torch.manual_seed(1)
    image = torch.randn(2, 3, 48, 32)

    theirs, posterior = oracle.encode(image).latent_dist, ours.encode(image).latent_dist
    assert_close(posterior.parameters, theirs.parameters)
    assert_close(posterior.mode(), theirs.mode())
    assert_close(posterior.logvar, theirs.logvar)
    assert_close(posterior.std, theirs.std)
    seeds = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    assert_close(posterior.sample(seeds[0]), theirs.sample(seeds[1]))

    latents = torch.randn(2, config.get("latent_channels", 4), 6, 4)
    assert_close(ours.decode(latents).sample, oracle.decode(latents).sample)


def token_ids() -> torch.Tensor:
    """Rows that start with a begin token and hold the end token once, last or before padding."""
    torch.manual_seed(1)
    ids = torch.randint(3, 97, (3, 16))
    ids[:, 0] = 98
    ids[0, 15] = 99
    ids[1, 6:] = 99
    ids[2, 9], ids[2, 10:] = 99, 0
    return ids


@pytest.mark.parametrize("kind", CLIPS)
def test_clip_equals_transformers(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = CLIPS[kind]
    oracle = transformers.CLIPTextModel(transformers.CLIPTextConfig(**config))
    ours = CLIPTextModel(config)
    prefix = (
        "" if next(iter(oracle.state_dict())).startswith("text_model.") else "text_model."
    )  # none since 5.6
    same_weights(oracle, ours, prefix)

    theirs, output = (model(token_ids(), output_hidden_states=True) for model in (oracle, ours))
    assert_close(output.last_hidden_state, theirs.last_hidden_state)
    assert_close(output.pooler_output, theirs.pooler_output)
    assert len(output.hidden_states) == len(theirs.hidden_states) == 4
    for state, their_state in zip(output.hidden_states, theirs.hidden_states, strict=True):
        assert_close(state, their_state)


def test_clip_with_projection_equals_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    config = CLIPS["sd2"]
    oracle = transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**config))
    ours = CLIPTextModelWithProjection(config)
    same_weights(oracle, ours)
    theirs, output = (model(token_ids(), output_hidden_states=True) for model in (oracle, ours))
    assert_close(output.text_embeds, theirs.text_embeds)
    assert_close(output.last_hidden_state, theirs.last_hidden_state)
    assert_close(output.hidden_states[-2], theirs.hidden_states[-2])


def test_clip_leaves_out_what_a_mask_hides() -> None:
    transformers = pytest.importorskip("transformers")
    oracle = transformers.CLIPTextModel(transformers.CLIPTextConfig(**CLIPS["sd1"]))
    ours = CLIPTextModel(CLIPS["sd1"])
    same_weights(
        oracle, ours, "" if "text_model" in dict(oracle.named_children()) else "text_model."
    )
    ids = token_ids()
    mask = torch.ones_like(ids)
    whole = ours(ids, mask)
    assert torch.equal(whole.last_hidden_state, ours(ids).last_hidden_state)
    assert list(whole) == list(oracle(ids)) == ["last_hidden_state", "pooler_output"]
    mask[0, 3:] = 0
    mask[1, :2] = 0
    found = ours(ids, attention_mask=mask).last_hidden_state
    assert not torch.allclose(found[0, 5], whole.last_hidden_state[0, 5], atol=1e-2)
    expected = oracle(ids, attention_mask=mask).last_hidden_state
    assert_close(found[0], expected[0])
    assert_close(found[1, 2:], expected[1, 2:])
    with pytest.raises(TypeError, match="output_attentions"):
        ours(ids, output_attentions=True)


def test_clip_refuses_more_tokens_than_positions() -> None:
    with pytest.raises(ValueError, match="17 tokens"):
        CLIPTextModel(CLIP)(torch.zeros(1, 17, dtype=torch.long))


@pytest.mark.parametrize(
    ("model", "config", "message"),
    [
        (UNet2DConditionModel, {"act_fn": "gelu"}, "act_fn = 'gelu'"),
        (UNet2DConditionModel, {"encoder_hid_dim_type": "ip_image_proj"}, "encoder_hid_dim_type"),
        (UNet2DConditionModel, {"addition_embed_type": "image"}, "addition_embed_type"),
        (
            UNet2DConditionModel,
            {"addition_embed_type": "text_time"},
            "needs addition_time_embed_dim",
        ),
        (
            UNet2DConditionModel,
            {"class_embed_type": "projection"},
            "class_embed_type = 'projection'",
        ),
        (UNet2DConditionModel, {"num_attention_heads": 8}, "num_attention_heads = 8"),
        (UNet2DConditionModel, {"mid_block_type": "X"}, "mid_block_type = 'X'"),
        (UNet2DConditionModel, {"norm_num_groups": None}, "norm_num_groups must not be null"),
        (UNet2DConditionModel, {"some_new_option": 3}, "unknown option some_new_option = 3"),
        (UNet2DConditionModel, {"down_block_types": ["DownBlock2D"]}, "down_block_types"),
        (UNet2DConditionModel, {"attention_head_dim": [8, 8]}, "attention_head_dim"),
        (UNet2DConditionModel, {"attention_head_dim": 7}, "320 channels cannot be split into 7"),
        (
            UNet2DConditionModel,
            {"transformer_layers_per_block": [[1, 1], 1, 1, 1]},
            "transformer_layers_per_block",
        ),
        (
            UNet2DConditionModel,
            unet_config("plain plain") | {"up_block_types": ["AttnUpBlock2D"] * 2},
            "AttnUpBlock2D",
        ),
        (
            ControlNetModel,
            {"controlnet_conditioning_channel_order": "gbr"},
            "channel_order = 'gbr'",
        ),
        (ControlNetModel, {"up_block_types": ["UpBlock2D"]}, "unknown option up_block_types"),
        (ControlNetModel, {"down_block_types": ["DownBlock2D"]}, "down_block_types"),
        (AutoencoderKL, {"act_fn": "mish"}, "act_fn = 'mish'"),
        (AutoencoderKL, {"down_block_types": ["SkipDownBlock2D"]}, "SkipDownBlock2D"),
        (AutoencoderKL, {"block_out_channels": [64, 64]}, "down_block_types"),
        (CLIPTextModel, {"hidden_act": "relu"}, "hidden_act = 'relu'"),
        (CLIPTextModel, {"eos_token_id": [1, 2]}, "eos_token_id"),
        (CLIPTextModel, {"num_attention_heads": 7}, "512 cannot be split into 7"),
        (CLIPTextModel, {"use_attention_mask": True}, "use_attention_mask = True"),
    ],
)
def test_options_that_would_change_the_maths_are_refused(
    model: Any, config: dict[str, Any], message: str
) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=message.replace("[", r"\[")):
        model.from_config(config)


def test_configs_that_the_libraries_write_are_accepted(tmp_path: Any) -> None:
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    with torch.device("meta"):
        for cls, ours, config in (
            (diffusers.UNet2DConditionModel, UNet2DConditionModel, UNETS["refiner"]),
            (diffusers.AutoencoderKL, AutoencoderKL, VAES["upscaler"]),
            (diffusers.ControlNetModel, ControlNetModel, CONTROLNETS["sdxl"]),
        ):
            model = ours.from_config(dict(cls(**config).config))
            assert {key: model.config[key] for key in config} == config
        transformers.CLIPTextModel(transformers.CLIPTextConfig(**CLIP)).config.save_pretrained(
            tmp_path
        )
        written = json.loads((tmp_path / "config.json").read_text())
        assert CLIPTextModel(written).config.hidden_size == 32


def test_config_is_complete_and_readable_by_attribute_and_item() -> None:
    config = AutoencoderKL(sample_size=512).config
    assert config.scaling_factor == config["scaling_factor"] == 0.18215
    assert config.sample_size == 512
    with pytest.raises(AttributeError, match="no 'nonsense'"):
        _ = config.nonsense


def test_construction_on_meta_allocates_nothing() -> None:
    with torch.device("meta"):
        models = UNet2DConditionModel(), AutoencoderKL(), CLIPTextModel({})
    for model in models:
        assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
        assert not list(
            model.buffers()
        )  # a buffer would stay on meta when a state dict is assigned


def kerascv_pair(model: Any, config: dict[str, Any]) -> tuple[Any, Any]:
    plain, keras = randomise(model.from_config(config)), model.from_config(config).eval()
    apply_semantics(keras, "kerascv")
    keras.load_state_dict(plain.state_dict(), strict=True)
    return plain, keras


def test_kerascv_semantics_of_the_unet() -> None:
    """Turning back the two things that differ gives the very same numbers: nothing else changed."""
    plain, keras = kerascv_pair(UNet2DConditionModel, UNETS["sd1"])
    inputs = unet_inputs(UNETS["sd1"])
    expected, output = plain(**inputs).sample, keras(**inputs).sample
    assert 1e-6 < ((output - expected).norm() / expected.norm()).item() < 1e-2
    changed = []
    for name, module in keras.named_modules():
        if isinstance(module, torch.nn.GroupNorm):
            assert module.eps == 1e-5
            if (
                name.endswith("attentions.0.norm")
                or name.endswith("attentions.1.norm")
                or name.endswith("attentions.2.norm")
            ):
                module.eps = 1e-6
                changed.append(name)
        elif isinstance(module, GEGLU):
            assert module.gelu is kerascv_gelu
            module.gelu = torch.nn.functional.gelu
            changed.append(name)
    assert len(changed) == 2 * 16
    assert torch.equal(keras(**inputs).sample, expected)


def test_kerascv_semantics_of_the_vae() -> None:
    plain, keras = kerascv_pair(AutoencoderKL, VAE)
    image, latents = torch.randn(1, 3, 32, 32), torch.randn(1, 4, 4, 4)
    assert not torch.equal(
        keras.encode(image).latent_dist.parameters, plain.encode(image).latent_dist.parameters
    )
    assert not torch.equal(keras.decode(latents).sample, plain.decode(latents).sample)
    for module in keras.modules():
        if isinstance(module, torch.nn.GroupNorm):
            assert module.eps == 1e-5
            module.eps = 1e-6
    assert torch.equal(
        keras.encode(image).latent_dist.parameters, plain.encode(image).latent_dist.parameters
    )
    assert torch.equal(keras.decode(latents).sample, plain.decode(latents).sample)


def test_kerascv_semantics_leave_clip_alone() -> None:
    plain, keras = kerascv_pair(CLIPTextModel, CLIPS["sd2"])
    assert torch.equal(keras(token_ids()).last_hidden_state, plain(token_ids()).last_hidden_state)


def test_kerascv_gelu_is_the_tanh_approximation_with_ten_digits() -> None:
    x = torch.linspace(-6, 6, 1001, dtype=torch.float64)
    distance = (
        (kerascv_gelu(x) - torch.nn.functional.gelu(x, approximate="tanh")).abs().max().item()
    )
    assert 0 < distance < 1e-11  # the digits; the erf form is 5e-4 away


def test_unknown_semantics_are_refused() -> None:
    with pytest.raises(ValueError, match="semantics"):
        apply_semantics(CLIPTextModel(CLIP), "tensorflow")  # type: ignore[arg-type]
