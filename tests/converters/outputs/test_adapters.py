"""Adapters under other names: files of others, bit for bit, there and back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextModel

import weightport
from weightport.mappings.conventions import conventions, written

from ...support.adapter_files import (
    cycle,
    kohya_name,
    kohya_state,
    peft_models,
    stock_model,
    write_diffusers,
    write_kohya,
)

OF_UNETS = [
    name
    for name in written()
    if any(naming.component == "unet" for naming in conventions()[name].namings)
]
RANKS = cycle((4, 2, 1))
ALPHAS = cycle((4.0, 1.0, 0.5, 3.0, 8.0))
SOME = ("down_blocks.0", "mid_block", "conv_in", "time_embedding", "layers.0.", "layers.11.")


def metadata(path: Path) -> dict[str, str]:
    return safe_open(path, "pt").metadata() or {}


def assert_same(a: Path, b: Path) -> None:
    ours, theirs = load_file(a), load_file(b)
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype, key
        assert ours[key].shape == tensor.shape, key
        assert torch.equal(ours[key], tensor), key
    assert metadata(a) == metadata(b)
    assert a.read_bytes() == b.read_bytes()


def respelled(source: Path, to: str, folder: Path, **options: Any) -> Path:
    output = folder / f"{to}-{len(list(folder.iterdir()))}.safetensors"
    weightport.convert(source, output, to=to, sync=False, **options)  # type: ignore[arg-type]
    return output


@pytest.fixture(scope="module")
def kohya(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A full-size SD 1.x LoRA of attentions' and other layers, ranks and alphas mixed."""
    models = {
        "lora_unet": stock_model("sd1", "unet"),
        "lora_te": stock_model("sd1", "text_encoder"),
    }
    state = kohya_state(models, RANKS, ALPHAS, only=SOME)
    path = tmp_path_factory.mktemp("kohya") / "style.safetensors"
    hashes = {"sshs_model_hash": "ab", "sshs_legacy_hash": "cd"}
    return write_kohya(path, state, ss_network_dim="4", ss_tag_frequency="{}", **hashes)


@pytest.fixture(scope="module")
def of_diffusers(repo_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = {
        "unet": {"rank_pattern": {"to_q": 8}, "alpha_pattern": {"to_k": 3, r"up.*\.(to_q|fc1)": 1}},
    }
    models = peft_models(repo_of("sd1"), **options)
    return write_diffusers(tmp_path_factory.mktemp("diffusers"), models)


@pytest.mark.parametrize("to", OF_UNETS)
def test_there_and_back_is_the_same_file(to: str, kohya: Path, tmp_path: Path) -> None:
    if to == "kohya":
        assert load_file(respelled(kohya, to, tmp_path)).keys() == load_file(kohya).keys()
        return
    there = respelled(kohya, to, tmp_path)
    assert_same(respelled(there, "kohya", tmp_path), kohya)
    assert not metadata(there).keys() & {"sshs_model_hash", "sshs_legacy_hash"}
    assert metadata(there)["ss_network_dim"] == "4"


@pytest.mark.parametrize("to", [name for name in OF_UNETS if name != "peft"])
def test_diffusers_own_file_comes_back(to: str, of_diffusers: Path, tmp_path: Path) -> None:
    there = respelled(of_diffusers, to, tmp_path, family="sd1")
    assert load_file(there).keys().isdisjoint(load_file(of_diffusers))
    assert_same(respelled(there, "peft", tmp_path, family="sd1"), of_diffusers)


@pytest.mark.parametrize("turn", range(3))
def test_what_a_header_says_comes_back_in_its_order(turn: int, kohya: Path, tmp_path: Path) -> None:
    """safetensors' own library writes it in another order each time."""
    content = kohya.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    said = sorted(header["__metadata__"].items())
    header["__metadata__"] = dict(said[turn:] + said[:turn])
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file = tmp_path / "turned.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])
    assert_same(respelled(respelled(file, "peft", tmp_path), "kohya", tmp_path), file)


def test_biases_behind_factors_come_back(repo_of: Callable[[str], Path], tmp_path: Path) -> None:
    """diffusers spells those of text encoders in a way of its own."""
    models = peft_models(repo_of("sd1"), unet={"lora_bias": True}, text_encoder={"lora_bias": True})
    file = write_diffusers(tmp_path, models)
    assert sum(key.endswith("lora_linear_layer.up.bias") for key in load_file(file)) == 48
    there = respelled(file, "kohya", tmp_path, family="sd1")
    assert sum(key.endswith("lora_up.bias") for key in load_file(there)) > 48
    assert_same(respelled(there, "peft", tmp_path, family="sd1"), file)


def test_a_chain_of_conventions_comes_back(kohya: Path, tmp_path: Path) -> None:
    file = kohya
    for to in ("peft", "diffusers-processors", "original", "kohya"):
        file = respelled(file, to, tmp_path)
    ours, theirs = load_file(file), load_file(kohya)
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert torch.equal(ours[key], tensor.reshape(ours[key].shape)), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_no_rule_gives_is_kept_for_the_way_back(dtype: torch.dtype, tmp_path: Path) -> None:
    """Alphas of other forms, none, 0; names of another time; factors of a linear layer as 1x1."""
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn{}_to_{}"
    state: dict[str, Tensor] = {}
    forms: tuple[Any, ...] = (
        torch.tensor([2], dtype=torch.int64),
        torch.tensor(0.0),
        None,
        torch.tensor(3.3, dtype=torch.float64),
        torch.tensor(257.0),
    )
    for form, (attention, layer) in zip(
        forms, [(1, "q"), (1, "k"), (1, "v"), (2, "q"), (2, "out_0")], strict=True
    ):
        one = name.format(attention, layer)
        state[f"{one}.lora_down.weight"] = torch.randn(4, 1280, 1, 1).to(dtype)
        state[f"{one}.lora_up.weight"] = torch.randn(1280, 4, 1, 1).to(dtype)
        if form is not None:
            state[f"{one}.alpha"] = form
    odd = name.format(2, "q")
    state[f"{odd}.lora_A.weight"] = state.pop(f"{odd}.lora_down.weight")
    file = write_kohya(tmp_path / "odd.safetensors", state)
    there = respelled(file, "peft", tmp_path)
    assert all(tensor.ndim == 2 for tensor in load_file(there).values())
    assert_same(respelled(there, "kohya", tmp_path), file)


@pytest.mark.parametrize("form", ["rows", "columns", "some"])
def test_dora(form: str, tmp_path: Path) -> None:
    state = kohya_state({"lora_unet": stock_model("sd1", "unet")}, only=("mid_block",))
    for key in [key for key in state if key.endswith("lora_up.weight")]:
        rows = state[key].shape[0]
        ones = state[key].shape[2:]
        columns = state[key.replace(".lora_up", ".lora_down")].shape[1:2]
        shape = (rows, 1, *ones) if form != "columns" else (1, *columns, *ones)
        state[key.replace("lora_up.weight", "dora_scale")] = torch.rand(shape).half()
    if form == "some":
        del state[next(key for key in state if key.endswith("dora_scale"))]
    file = write_kohya(tmp_path / "dora.safetensors", state)
    if form == "rows":
        there = respelled(file, "peft", tmp_path)
        shapes = {tuple(t.shape[:2]) for k, t in load_file(there).items() if "magnitude" in k}
        assert (1280,) in shapes
        assert (1, 1280) in shapes
        assert_same(respelled(there, "kohya", tmp_path), file)
        return
    message = "DoRA along input channels" if form == "columns" else "is no DoRA, though others"
    with pytest.raises(weightport.ConversionError, match=message):
        respelled(file, "peft", tmp_path)


def in_peft_words(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What diffusers makes of a file, under the names that it gives PEFT."""
    unet = {key: tensor for key, tensor in state.items() if key.startswith("unet.")}
    rest = {key: tensor for key, tensor in state.items() if key not in unet}
    return convert_unet_state_dict_to_peft(unet) | (
        convert_state_dict_to_peft(rest) if rest else {}
    )


def test_the_names_are_those_that_diffusers_makes(kohya: Path, tmp_path: Path) -> None:
    ours = load_file(respelled(kohya, "peft", tmp_path))
    theirs = in_peft_words(StableDiffusionPipeline.lora_state_dict(kohya)[0])
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], tensor) for key, tensor in ours.items())


def test_names_of_stability_are_those_that_diffusers_reads(tmp_path: Path) -> None:
    unet = stock_model("sdxl", "unet")
    some = ("down_blocks.1.attentions.1", "mid_block.attentions.0.transformer_blocks.3")
    state = kohya_state({"lora_unet": unet}, lambda i: 1, only=some)
    file = write_kohya(tmp_path / "xl.safetensors", state)
    sgm = respelled(file, "kohya-sgm", tmp_path)
    assert not load_file(sgm).keys() & state.keys()
    read, _ = StableDiffusionXLPipeline.lora_state_dict(sgm, unet_config=unet.config)
    theirs = in_peft_words(read)
    ours = load_file(respelled(sgm, "peft", tmp_path))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], tensor) for key, tensor in ours.items())


def test_diffusers_computes_the_right_strength_in_every_module(
    repo_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """Which it does not for kohya's file itself, where alphas differ."""
    repo = repo_of("sd1")
    unet = UNet2DConditionModel.from_pretrained(repo / "unet")
    encoder = CLIPTextModel.from_pretrained(repo / "text_encoder")
    models = {"lora_unet": unet, "lora_te": encoder}
    state = kohya_state(models, RANKS, ALPHAS, torch.float32)
    file = write_kohya(tmp_path / "narrow.safetensors", state)
    pipe = StableDiffusionPipeline(
        vae=None,
        text_encoder=encoder,
        tokenizer=None,
        unet=unet,
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.load_lora_weights(respelled(file, "peft", tmp_path, family="sd1"))
    found = {
        kohya_name(prefix, name): module.scaling["default_0"]
        for prefix, model in models.items()
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
    }
    names = [key.removesuffix(".alpha") for key in state if key.endswith(".alpha")]
    rank_of = {name: state[f"{name}.lora_down.weight"].shape[0] for name in names}
    wanted = {name: state[f"{name}.alpha"].item() / rank_of[name] for name in names}
    assert found == wanted


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_te_x.lora_down.weight": (4, 4)}, "1 tensors belong to no module of"),
        ({"NAME.lora_down.weight": (1, 640)}, "`NAME` does not fit Stable Diffusion 1.x: it makes"),
    ],
)
def test_what_is_of_no_model_is_refused(
    change: dict[str, tuple[int, ...]], message: str, kohya: Path, tmp_path: Path
) -> None:
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    state = load_file(kohya)
    state[f"{name}.lora_down.weight"] = torch.zeros(1, 1280)
    state[f"{name}.lora_up.weight"] = torch.zeros(1280, 1)
    state |= {key.replace("NAME", name): torch.zeros(shape) for key, shape in change.items()}
    file = tmp_path / "bad.safetensors"
    save_file(state, file)
    with pytest.raises(weightport.ConversionError) as error:
        respelled(file, "peft", tmp_path)
    assert message.replace("NAME", name) in str(error.value)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.safetensors"]


def test_what_a_convention_cannot_hold_is_refused(tmp_path: Path) -> None:
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    halves = {f"{name}.hada_w{i}_a": torch.zeros(1280, 4) for i in "12"}
    halves |= {f"{name}.hada_w{i}_b": torch.zeros(4, 1280) for i in "12"}
    save_file(halves, tmp_path / "loha.safetensors")
    with pytest.raises(weightport.ConversionError, match="is LoHa, for which PEFT has no place"):
        respelled(tmp_path / "loha.safetensors", "peft", tmp_path)
    assert_same(
        respelled(
            respelled(tmp_path / "loha.safetensors", "kohya-sgm", tmp_path), "kohya", tmp_path
        ),
        tmp_path / "loha.safetensors",
    )


def test_an_adapter_is_no_model_and_a_model_no_adapter(kohya: Path, tmp_path: Path) -> None:
    with pytest.raises(weightport.ConversionError, match="an adapter, which changes a model"):
        weightport.convert(kohya, tmp_path / "out")
    save_file({"conv_in.weight": torch.zeros(320, 4, 3, 3)}, tmp_path / "model.safetensors")
    with pytest.raises(weightport.ConversionError, match="not an adapter"):
        respelled(tmp_path / "model.safetensors", "peft", tmp_path)


def test_inspection_says_what_people_ask(kohya: Path) -> None:
    found = weightport.inspect(kohya).adapter
    modules = sum(key.endswith(".alpha") for key in load_file(kohya))
    assert found.families == ("Stable Diffusion 1.x",)
    assert found.conventions == {"kohya": modules}
    assert {component for component, _, _ in found.flavours} == {"unet", "text_encoder"}
    assert sum(count for _, _, count in found.ranks) == modules
    assert found.metadata == {"ss_network_dim": "4"}


def test_an_ambiguous_base_is_said_and_the_family_decides(tmp_path: Path) -> None:
    """attn1 alone has the same widths in SD 1.x and 2.x."""
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    state = {
        f"{name}.lora_down.weight": torch.zeros(4, 1280),
        f"{name}.lora_up.weight": torch.zeros(1280, 4),
    }
    save_file(state, tmp_path / "small.safetensors")
    both = weightport.inspect(tmp_path / "small.safetensors").adapter
    one = weightport.inspect(tmp_path / "small.safetensors", family="sd2").adapter
    assert both.families[:2] == ("Stable Diffusion 1.x", "Stable Diffusion 2.x")
    assert "--family decides" in both.evidence[-1]
    assert one.families == ("Stable Diffusion 2.x",)
