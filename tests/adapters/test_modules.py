"""What a file is sorted into, and what is refused by name."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest

from weightport.adapters.alphas import KEY, Alphas
from weightport.adapters.marks import is_adapter
from weightport.adapters.modules import Adapter, decode, stock_models

NAME = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
PATH = ("unet", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
WIDTH = 1280  # of the layer, rows and columns


def zeros(*shape: int) -> np.ndarray[Any, Any]:
    return np.zeros(shape, np.float32)


def factors(rank: int = 4, name: str = NAME) -> dict[str, Any]:
    return {
        f"{name}.lora_down.weight": zeros(rank, WIDTH),
        f"{name}.lora_up.weight": zeros(WIDTH, rank),
    }


def sorted_(tensors: dict[str, Any], alphas: Alphas | None = None) -> Adapter[Any]:
    return decode(tensors, "sd1", stock_models("sd1"), alphas or Alphas(), lambda one: one.item())


@pytest.mark.parametrize(
    ("alpha", "factor"),
    [
        (None, 1.0),
        (np.float32(2), 0.5),
        (np.array([2], np.float16), 0.5),
        (np.array(8, np.int64), 2.0),
        (np.float32(0), 1.0),  # training takes it for the rank
    ],
)
def test_alpha(alpha: Any, factor: float) -> None:
    tensors = factors()
    if alpha is not None:
        tensors[f"{NAME}.alpha"] = np.asarray(alpha)
    found = sorted_(tensors)
    assert found.fits
    assert found.modules[PATH].factor == factor
    assert found.modules[PATH].rank == 4


def test_a_scale_takes_the_place_of_alpha() -> None:
    tensors = factors() | {f"{NAME}.alpha": np.float32(1), f"{NAME}.scale": np.float32(3)}
    assert sorted_(tensors).modules[PATH].factor == 3


@pytest.mark.parametrize(
    ("config", "alpha"),
    [
        ({"lora_alpha": 2}, 2),
        ({"lora_alpha": 2, "alpha_pattern": {"attn1.to_q": 5, "to_q": 3}}, 5),
        ({"lora_alpha": 2, "alpha_pattern": {"to_q": 3, "attn1.to_q": 5}}, 3),  # PEFT's first
        ({"lora_alpha": 2, "alpha_pattern": {r"mid.*attn[12]\.to_(q|k)": 3, "to_q": 5}}, 3),
        ({"lora_alpha": 2, "alpha_pattern": {r"mid.*attn2\.to_(q|k)": 3, "to_q": 5}}, 5),
        ({"lora_alpha": 2, "alpha_pattern": {"^" + PATH[1]: 7, "to_q": 3}}, 7),
        ({"lora_alpha": 2, "alpha_pattern": {"o_q": 3}}, 2),
        ({"lora_alpha": 2, "use_rslora": True}, 4),  # 2 sqrt(4)
        ({}, None),
    ],
)
def test_what_a_header_says_of_alphas(config: dict[str, Any], alpha: float | None) -> None:
    header = {KEY: json.dumps({f"unet.{key}": value for key, value in config.items()})}
    name = "unet." + PATH[1]
    tensors = {f"{name}.lora_A.weight": zeros(4, WIDTH), f"{name}.lora_B.weight": zeros(WIDTH, 4)}
    assert sorted_(tensors, Alphas.parse(header)).modules[PATH].alpha == alpha


def test_patterns_of_text_encoders_may_lack_what_transformers_5_lacks() -> None:
    name = "encoder.layers.3.self_attn.q_proj"
    header = {"text_encoder.alpha_pattern": {f"^{name}": 8}, "text_encoder.lora_alpha": 2}
    named = f"text_encoder.{name}"
    tensors = {f"{named}.lora_A.weight": zeros(4, 768), f"{named}.lora_B.weight": zeros(768, 4)}
    found = sorted_(tensors, Alphas.parse({KEY: json.dumps(header)}))
    assert found.modules["text_encoder", f"text_model.{name}"].alpha == 8


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"unet.lora_alpha": "x"}', '{"unet.alpha_pattern": {"(a+)+$": 1}}', "[" * 9999],
)
def test_a_header_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="its "):
        Alphas.parse({KEY: text})


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({f"{NAME}.lora_up.weight": zeros(WIDTH, 4)}, "has up, but not down: half of a LoRA"),
        (
            factors() | {f"{NAME}.lora_up.weight": zeros(WIDTH, 5)},
            "up [1280, 5] and down [4, 1280] differ in rank",
        ),
        (factors(0), "is no matrix"),
        (factors() | {f"{NAME}.lora_mid.weight": zeros(4, 4)}, "does not stand between up and"),
        (factors() | {f"{NAME}.alpha": zeros(2)}, "its alpha has shape [2], not one number"),
        (factors() | {f"{NAME}.alpha": np.float32("nan")}, "its alpha is nan"),
        (factors() | {f"{NAME}.alpha": np.float32("inf")}, "its alpha is inf"),
        (factors() | {f"{NAME}.w_norm": zeros(WIDTH)}, "is LoRA with w_norm"),
        (factors() | factors(name="unet." + PATH[1]), "are the same module"),
        (
            factors() | {f"{NAME}.lora_A.weight": zeros(4, WIDTH)},
            "are the same module",
        ),
        ({f"{NAME}.lambda_layer": zeros(4)}, "is T-LoRA"),
        ({f"unet.{PATH[1]}.oft_R.weight": zeros(4, 4)}, "is PEFT's OFT"),
        ({f"unet.{PATH[1]}.ia3_l": zeros(4)}, "is PEFT's IA3"),
        ({f"unet.{PATH[1]}.vera_lambda_b": zeros(4)}, "is VeRA"),
        ({f"{NAME}.oft_blocks": zeros(4, 4, 3)}, "holds no square blocks"),
        ({f"{NAME}.hada_w1_a": zeros(WIDTH, 4)}, "half of a LoHa"),
        (
            {
                f"{NAME}.q_layer.weight": zeros(4, WIDTH),
                f"{NAME}.p_layer.weight": zeros(WIDTH, 4),
                f"{NAME}.lambda_layer": zeros(1, 4),
            },
            "is T-LoRA",
        ),
        (
            {f"{NAME}.vera_lambda_b": zeros(WIDTH), f"{NAME}.vera_lambda_d": zeros(4)},
            "is VeRA",
        ),
        (
            factors() | {f"{NAME}.dora_scale": zeros(77, 1)},
            "magnitude [77, 1] does not fit a change",
        ),
        (factors() | {f"{NAME}.lora_up.bias": zeros(5)}, "up_bias [5] does not fit a change"),
        ({f"{NAME}.lokr_w1": zeros(4, 4)}, "but not lokr_w2"),
    ],
)
def test_what_contradicts_itself_is_refused_by_name(tensors: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        sorted_(tensors)
    assert "attn1" in str(error.value)


def test_names_of_transformers_5_are_those_of_the_text_encoder() -> None:
    """LyCORIS names what torch lists; `create_network` for kohya, `create_lycoris` for one model."""
    for prefix in ("lora_te_", "lycoris_", "lora_te_text_model_", "lycoris_text_model_"):
        name = f"{prefix}encoder_layers_0_mlp_fc1"
        tensors = {
            f"{name}.lora_down.weight": zeros(4, 768),
            f"{name}.lora_up.weight": zeros(3072, 4),
        }
        found = sorted_(tensors)
        assert found.fits, name
        assert list(found.modules) == [("text_encoder", "text_model.encoder.layers.0.mlp.fc1")]


def test_what_belongs_to_no_module_is_listed() -> None:
    strange = {"lora_unet_mid_block_x.lora_down.weight": zeros(4, 4), "global_step": zeros(1)}
    assert sorted_(factors() | strange).unmatched == tuple(strange)


@pytest.mark.parametrize(
    ("tensors", "flaw"),
    [
        (
            {
                f"{NAME}.lora_down.weight": zeros(4, 640),
                f"{NAME}.lora_up.weight": zeros(WIDTH, 4),
            },
            "makes a change [1280, 640] of a weight [1280, 1280]",
        ),
        (factors() | {f"{NAME}.dora_scale": zeros(640, 1)}, "magnitude [640, 1] does not fit"),
        ({f"{NAME}.oft_blocks": zeros(4, 4, 4)}, "does not fit a weight of 1280 rows"),
        ({f"{NAME}.diff": zeros(4, 4)}, "makes a change [4, 4] of"),
        ({f"{NAME}.diff_b": zeros(4)}, "does not fit a bias of 1280"),
    ],
)
def test_what_does_not_fit_the_weight_is_a_flaw(tensors: dict[str, Any], flaw: str) -> None:
    found = sorted_(tensors)
    assert not found.fits
    assert flaw in found.flaws[NAME]


def test_embeddings_are_kept_apart_with_dots_in_their_names() -> None:
    bundled = {"bundle_emb.a.b.clip_l": zeros(1, 768)}
    assert sorted_(factors() | bundled).bundled.keys() == {"a.b.clip_l"}


def test_the_shape_tells_the_axis_of_magnitudes_but_for_peft() -> None:
    rows = factors() | {f"{NAME}.dora_scale": zeros(WIDTH, 1)}
    columns = factors() | {f"{NAME}.dora_scale": zeros(1, WIDTH)}
    assert sorted_(rows).modules[PATH].is_by_row
    assert not sorted_(columns).modules[PATH].is_by_row
    name = "unet.conv_in"
    peft = {
        f"{name}.lora_A.weight": zeros(4, 4, 3, 3),
        f"{name}.lora_B.weight": zeros(320, 4, 1, 1),
        f"{name}.lora_magnitude_vector.weight": zeros(1, 320, 1, 1),
    }
    found = sorted_(peft)
    assert found.fits
    assert found.modules["unet", "conv_in"].is_by_row


def test_models_are_no_adapters() -> None:
    assert not any(is_adapter(model.shapes) for model in stock_models("sd1").values())
    assert is_adapter(factors())
