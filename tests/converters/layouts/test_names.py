"""Names of a file: what wrappers, owners and trainers put around a part, averages beside it, other
spellings inside it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import weightport
from weightport.converters.convert import gather
from weightport.converters.planning.candidates import candidates
from weightport.converters.planning.recognise import Recognition
from weightport.converters.settings import Settings
from weightport.mappings.facts import facts
from weightport.mappings.library import all_tables
from weightport.mappings.names import find_root, wrappers_in

from ...support.synthetic import State, weights

P, V = "model.diffusion_model.", "first_stage_model."
ORIGINAL = {  # part -> the place it has in whole checkpoints of the family
    ("sd1", "unet"): P,
    ("sd2", "unet"): P,
    ("sdxl", "unet"): P,
    ("sd1", "vae"): V,
    ("sd1", "controlnet"): "control_model.",
    ("sd1", "text_encoder"): "cond_stage_model.transformer.",
    ("sd2", "text_encoder"): "cond_stage_model.model.",
    ("sdxl", "text_encoder_2"): "conditioner.embedders.1.model.",
}


@cache
def keys(family: str, part: str, layout: str) -> dict[str, tuple[int, ...]]:
    """A part's own keys in a layout -> shapes as small as their rank allows."""
    found = next(
        one
        for one in candidates(layout)
        if (one.family.name, one.part) == (family, part) and not one.table.about.get("read_only")
    )
    prefix = found.table.prefix
    return {key.removeprefix(prefix): (1,) * len(shape) for key, shape in found.shapes.items()}


def state(family: str, part: str, layout: str = "ldm", front: str = "", value: float = 0) -> State:
    """A part as small as its ranks allow, under a front."""
    shapes = keys(family, part, layout)
    return {front + key: np.full(shape, value, np.float32) for key, shape in shapes.items()}


def tensors(found: State) -> dict[str, torch.Tensor]:
    return {key: torch.from_numpy(value) for key, value in found.items()}


def recognised(content: Any, folder: Path, **options: Any) -> dict[str, Recognition]:
    """The parts of a file: safetensors of a state, a pickle of anything else."""
    if all(isinstance(value, np.ndarray) for value in content.values()):
        path = folder / "model.safetensors"
        save_file(content, path)
    else:
        path = folder / "model.ckpt"
        torch.save(content, path)
    parts = gather([path], Settings(**options))
    inspected = weightport.inspect(path).parts
    assert [part.part for part in inspected] == [part.part for part in parts]
    assert not any(part.missing or part.unexpected for part in inspected)
    return {part.part: part for part in parts}


def refused(content: Any, folder: Path, match: str, **options: Any) -> None:
    with pytest.raises(weightport.ConversionError, match=match):
        recognised(content, folder, **options)


# --- A1, A2: what stands before the names, and inside them ----------------------------------------

FRONTS = (
    "_orig_mod.",
    "module.module.",
    "_forward_module._orig_mod.module.",
    "unet.",
    "pipe.anything.",
)


@pytest.mark.parametrize("layout", ["ldm", "diffusers"])
@pytest.mark.parametrize(("family", "part"), ORIGINAL)
def test_a_part_is_told_under_any_front(
    family: str, part: str, layout: str, tmp_path: Path
) -> None:
    front = FRONTS[len(family + part + layout) % len(FRONTS)]
    found = recognised(state(family, part, layout, front), tmp_path)
    assert found.keys() == {part}
    assert family in found[part].families
    assert any(f"`{front}`" in fact for fact in found[part].evidence)


@pytest.mark.parametrize("front", FRONTS)
def test_any_front_of_one_part(front: str, tmp_path: Path) -> None:
    (found,) = recognised(state("sd1", "vae", front=front), tmp_path).values()
    assert all(whose in found.evidence[-1] for whose in wrappers_in(front))
    assert all(tensor.name.startswith(front) for tensor in found.checkpoint.tensors.values())


@pytest.mark.parametrize("outer", ["", "module.", "_forward_module.module."])
@pytest.mark.parametrize("inner", ["", "_orig_mod.", "module._orig_mod."])
def test_wrappers_lie_around_a_whole_checkpoint_and_its_parts(
    outer: str, inner: str, tmp_path: Path
) -> None:
    """What stands beside the parts is still left out with its reason, and read."""
    whole = state("sdxl", "unet", front=f"{outer}{P}{inner}")
    whole |= state("sdxl", "vae", front=outer + V)
    whole |= {outer + "betas": np.zeros(1000, np.float32), outer + "v_pred": np.zeros(0, "f4")}
    found = recognised(whole, tmp_path)
    assert found.keys() == {"unet", "vae"}
    assert found["unet"].families == ("sdxl",)
    assert found["unet"].checkpoint.skipped.keys() == {outer + "betas", outer + "v_pred"}
    assert found["unet"].checkpoint.metadata["v_pred"] == "present"
    told = [fact for fact in found["unet"].evidence if "taken off" in fact]
    assert len(told) == bool(outer + inner)


def test_wrappers_of_modules_inside_a_part_come_off(tmp_path: Path) -> None:
    """FSDP, activation checkpointing and compilation of single blocks wrap what is inside."""
    wrapped = {}
    for key, value in state("sd1", "unet", "diffusers").items():
        segments = key.split(".")
        if key.startswith(("down_blocks", "up_blocks")):
            segments.insert(2, "_fsdp_wrapped_module")
            segments.insert(5, "_checkpoint_wrapped_module")
        wrapped[".".join(segments)] = value
    vae = {
        key.replace("encoder.", "encoder._orig_mod."): value
        for key, value in state("sd1", "vae").items()
    }
    found = recognised(wrapped, tmp_path)["unet"]
    assert "FullyShardedDataParallel" in found.evidence[-1]
    assert "`_checkpoint_wrapped_module.`" in found.evidence[-1]
    assert "torch.compile" in recognised(vae, tmp_path)["vae"].evidence[-1]


def test_a_wrapper_comes_off_only_where_all_names_have_it(tmp_path: Path) -> None:
    unet = state("sd1", "unet")
    some = {f"_orig_mod.{key}" if "output" in key else key: value for key, value in unet.items()}
    refused(some, tmp_path, "missing|two models")
    within = {
        key.replace("middle_block.1.", "middle_block.1._orig_mod.")
        if "proj_in" in key or "norm" in key
        else key: value
        for key, value in unet.items()
    }
    refused(within, tmp_path, "missing")


def test_what_is_unknown_inside_a_part_stays_an_error(tmp_path: Path) -> None:
    for front in ("", "module.", P, f"{P}_orig_mod."):
        unet = state("sd1", "unet", front=front)
        for strange in ("input_blocks.1.1.motion.weight", "extra.weight"):
            refused(
                unet | {front + strange: np.zeros(1, "f4")},
                tmp_path,
                f"1 tensors are not.*{strange}",
            )
    whole = state("sd1", "unet", front=P) | {"another.weight": np.zeros(1, "f4")}
    refused(whole, tmp_path, "belong to no part of a known model: another.weight")


@pytest.mark.parametrize("names", [("unet", "vae", "text_encoder"), ("G", "first", "cond.inner")])
def test_parts_are_told_under_the_attributes_of_their_owner(
    names: tuple[str, ...], tmp_path: Path
) -> None:
    """One file of parts under any names, in either layout or both."""
    unet, vae, text = names
    for layouts in (("diffusers", "diffusers"), ("ldm", "diffusers"), ("ldm", "ldm")):
        parts = {
            unet: state("sd2", "unet", layouts[0]),
            vae: state("sd2", "vae", layouts[1]),
            text: state("sd2", "text_encoder", layouts[0]),
        }
        flat = {f"{name}.{key}": one for name, part in parts.items() for key, one in part.items()}
        found = recognised(flat, tmp_path)
        assert found.keys() == {"unet", "vae", "text_encoder"}
        assert all("sd2" in part.families for part in found.values())
        nested = {name: tensors(part) for name, part in parts.items()}
        more = {"step": 5, "opt": {"state": {0: {"m": torch.zeros(3)}}}}
        found = recognised(nested | more, tmp_path)
        assert found.keys() == {"unet", "vae", "text_encoder"}
        assert found["unet"].skipped["opt"].startswith("beside the weights")


# --- A3: pickles of any depth ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "names", ["params_ema", "net", "state.model.unet", "checkpoint.ema_state_dict", "a.b.c.d.e"]
)
def test_a_state_dict_lies_at_any_depth_under_any_name(names: str, tmp_path: Path) -> None:
    content: Any = tensors(state("sd1", "unet", "diffusers", "module."))
    for name in reversed(names.split(".")):
        content = {name: content, "epoch": 3}
    content["optimizers"] = {"Adam": {"state": {"m": torch.zeros(2)}}}
    (found,) = recognised(content, tmp_path).values()
    assert found.part == "unet"


def test_a_folder_is_read_like_a_file(repo_of: Callable[[str], Path], tmp_path: Path) -> None:
    """A component of a repo may be wrapped, and its VAE spelled as diffusers did before 0.18."""
    repo = tmp_path / "repo"
    shutil.copytree(repo_of("sd1"), repo)
    for name, front in (("unet", "module._orig_mod."), ("vae", "")):
        path = repo / name / "diffusion_pytorch_model.safetensors"
        old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        renamed = {}
        for key, one in load_file(path).items():
            for new, before in old.items() if name == "vae" else ():
                key = key.replace(
                    f"mid_block.attentions.0.{new}.", f"mid_block.attentions.0.{before}."
                )
            renamed[front + key] = one
        save_file(renamed, path)
    parts = {part.part: part for part in gather([repo], Settings())}
    assert parts["unet"].root == "unet"
    assert "torch.compile" in parts["unet"].evidence[-1]
    assert not parts["vae"].missing


# --- A4: averages ---------------------------------------------------------------------------------

AVERAGES = (  # what stands before weights and average
    ("", "ema."),
    ("net.", "net_ema."),
    ("online_model.", "ema_model."),
    ("unet.", "copy.of.the.unet."),
    ("module.", "averaged.module."),
    (P, f"ema.{P}"),
)


@pytest.mark.parametrize("fronts", AVERAGES)
@pytest.mark.parametrize(("family", "part"), [("sd2", "text_encoder"), ("sd1", "vae")])
def test_an_average_has_the_names_of_weights_beside_it(
    family: str, part: str, fronts: tuple[str, str], tmp_path: Path
) -> None:
    both = state(family, part, front=fronts[1]) | state(family, part, front=fronts[0])
    plain = recognised(both, tmp_path)[part]
    taken = recognised(both, tmp_path, ema=True)[part]
    assert {tensor.name for tensor in plain.checkpoint.tensors.values()} == set(
        state(family, part, front=fronts[0])
    )
    assert any("--ema" in reason for reason in plain.skipped.values())
    assert {tensor.name for tensor in taken.checkpoint.tensors.values()} == set(
        state(family, part, front=fronts[1])
    )
    assert taken.checkpoint.average
    assert not plain.checkpoint.average


@pytest.mark.parametrize("place", ["", "first_stage_model.", "module."])
def test_averages_without_dots_are_those_of_any_part(place: str, tmp_path: Path) -> None:
    """LitEma wraps any module; names are those of the weights, or of a known part."""
    vae = state("sd1", "vae", front=place)
    average = {"model_ema." + key.replace(".", ""): one + 1 for key, one in vae.items()}
    average |= {"model_ema.decay": np.zeros((), "f4"), "model_ema.num_updates": np.zeros((), "i4")}
    average |= {"model_ema.losslogvar": np.zeros((), "f4")}
    losses = {"loss.logvar": np.zeros((), "f4"), "loss.discriminator.main.0.weight": np.ones(3)}
    plain = recognised(vae | losses | average, tmp_path)["vae"]
    assert not plain.checkpoint.average
    for content, options in ((vae | losses | average, {"ema": True}), (average, {})):
        found = recognised(content, tmp_path, **options)["vae"]
        assert found.checkpoint.average
        assert all(one.name.startswith("model_ema.") for one in found.checkpoint.tensors.values())


def test_averages_of_several_parts_and_of_some_weights(tmp_path: Path) -> None:
    """Buffers and what is not trained have no average; copies of an averager are passed over."""
    unet, text = state("sd1", "unet"), state("sd1", "text_encoder")
    trained = {key: one for key, one in unet.items() if not key.startswith("out.")}
    content: dict[str, Any] = {
        "model": tensors({f"unet.{key}": one for key, one in unet.items()})
        | tensors({f"text.{key}": one for key, one in text.items()}),
        "ema": {
            **tensors({f"ema_model.unet.{key}": one for key, one in trained.items()}),
            **tensors({f"online_model.unet.{key}": one for key, one in unet.items()}),
            "step": torch.zeros(1),
            "initted": torch.ones(1),
        },
        "opt": {"state": {}},
    }
    found = recognised(content, tmp_path, ema=True)
    names = {key: tensor.name for key, tensor in found["unet"].checkpoint.tensors.items()}
    assert names["input_blocks.0.0.weight"] == "ema.ema_model.unet.input_blocks.0.0.weight"
    assert names["out.0.weight"] == "unet.out.0.weight"
    assert not found["text_encoder"].checkpoint.average
    averaged = tensors({f"module.{key}": one for key, one in unet.items()})
    recognised(averaged | {"n_averaged": torch.tensor(9)}, tmp_path)  # torch's AveragedModel


@pytest.mark.parametrize("front", ["", "state_dict", "model", "net"])
def test_an_average_may_be_a_list_in_the_order_of_the_weights(front: str, tmp_path: Path) -> None:
    """As diffusers' `EMAModel` and others keep theirs."""
    unet = tensors(state("sd1", "unet", layout="diffusers"))
    content: dict[str, Any] = {front: unet} if front else {"unet": unet}
    content["ema"] = {"decay": 0.999, "shadow_params": [one + 1 for one in unet.values()]}
    content["others"] = [torch.zeros(3), torch.zeros(4)]
    plain = recognised(content, tmp_path)["unet"]
    taken = recognised(content, tmp_path, ema=True)["unet"]
    assert not plain.checkpoint.average
    assert taken.checkpoint.average
    names = {key: tensor.name for key, tensor in taken.checkpoint.tensors.items()}
    assert names["conv_in.weight"] == "ema.shadow_params.conv_in.weight"
    assert all(tensor.numpy().max() == 1 for tensor in taken.checkpoint.tensors.values())
    content["ema"]["shadow_params"][-1] = torch.zeros(7)
    assert not recognised(content, tmp_path, ema=True)["unet"].checkpoint.average


def test_of_two_averages_none_is_taken_for_the_other(tmp_path: Path) -> None:
    several = {"ema_1.": 1, "ema_2.": 2}
    averages = [state("sd1", "vae", front=front, value=one) for front, one in several.items()]
    alone = averages[0] | averages[1]
    both = state("sd1", "vae") | alone
    message = "two moving averages of the same weights, `ema_1` and `ema_2`; save one"
    refused(both, tmp_path, message, ema=True)
    refused(alone, tmp_path, message)
    names = {one.name for one in recognised(both, tmp_path)["vae"].checkpoint.tensors.values()}
    assert names == set(state("sd1", "vae"))


def test_models_of_which_neither_is_the_average_are_refused(tmp_path: Path) -> None:
    both = state("sd1", "unet", front="a.") | state("sd1", "unet", front="b.")
    refused(both, tmp_path, "`a` and `b`, and nothing says which is the moving average")


# --- A5: beside a model ---------------------------------------------------------------------------


def test_leftovers_are_named_and_strays_of_another_family_too(tmp_path: Path) -> None:
    text = state("sd1", "text_encoder")
    sdxl = state("sdxl", "unet", front=P)
    sdxl |= {f"conditioner.embedders.0.transformer.{key}": one for key, one in text.items()}
    stray = {f"cond_stage_model.transformer.{key}": one for key, one in text.items()}
    manager = {f"module.embedding_manager.embedder.{key}": one for key, one in text.items()}
    found = recognised(sdxl | stray | manager, tmp_path)
    assert found.keys() == {"unet", "text_encoder"}
    assert found["text_encoder"].families == ("sdxl",)
    assert found["unet"].skipped.keys() == stray.keys() | manager.keys()
    assert found["unet"].narrowed("sdxl").skipped == found["unet"].skipped
    assert all(found["unet"].skipped.values())
    lone = state("sdxl", "unet", front=P) | stray
    save_file(lone, tmp_path / "lone.safetensors")
    with pytest.raises(weightport.ConversionError, match="not of one family"):
        weightport.convert(tmp_path / "lone.safetensors", tmp_path / "out", dry_run=True)


# --- C1, C2, C3: text encoders --------------------------------------------------------------------

PLACES = (
    "",
    "cond_stage_model.transformer.",
    "cond_stage_model.model.",
    "conditioner.embedders.0.model.",
    "conditioner.embedders.1.model.transformer.",
    "clip_g.transformer.",
    "text_encoder_2.",
)
ENCODERS = (
    ("sd1", "text_encoder"),
    ("sd2", "text_encoder"),
    ("sdxl", "text_encoder_2"),
)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("family", "part"), ENCODERS)
def test_any_place_may_hold_any_naming_and_size(
    family: str, part: str, place: str, tmp_path: Path
) -> None:
    """And beside each may lie constants, what is not used, and the image half."""
    own = ("text_projection.weight", "text_projection")
    for layout in ("diffusers", "ldm"):
        if (layout, family) == ("ldm", "sd1"):
            encoder = openai(state(family, part, "diffusers"))
        else:
            encoder = state(family, part, layout)
        more = {
            f"{place}logit_scale": np.zeros((), "f4"),
            f"{place}attn_mask": np.zeros((77, 77), "f4"),
            f"{place}transformer.text_model.embeddings.position_ids": np.arange(77)[None],
            f"{place}vision_model.encoder.layers.0.layer_norm1.weight": np.ones(3, "f4"),
            f"{place}vision_model.embeddings.position_ids": np.arange(257)[None],
            f"{place}visual.transformer.resblocks.0.ln_1.weight": np.ones(3, "f4"),
            f"{place}visual_projection.weight": np.ones((3, 3), "f4"),
        }
        if not encoder.keys() & set(own):
            more[f"{place}{own[layout == 'ldm']}"] = np.ones((3, 3), "f4")
        found = recognised({place + key: one for key, one in encoder.items()} | more, tmp_path)
        assert found.keys() == {part}
        at_home = place.startswith("conditioner.")  # where families with the same encoder part
        assert family in found[part].families or at_home
        prefix = found[part].candidates[0].table.prefix
        listed = more.keys() - {name for name in more if "position_ids" in name}
        reason_of = found[part].candidates[0].reason_of
        known = {name for name in more if reason_of(prefix + name.removeprefix(place))}
        assert listed - known <= found[part].skipped.keys()


def openai(text: State) -> State:
    """A text encoder of transformers' names under OpenAI's."""
    found = next(one for one in candidates("ldm") if one.table.name == "openclip_clip_l")
    return {key: np.zeros((1,) * len(shape), "f4") for key, shape in found.shapes.items()}


def test_a_text_encoder_beside_a_unet_is_of_its_family(tmp_path: Path) -> None:
    """CLIP-L under a name of its own is SDXL's first where the UNet is SDXL's."""
    found = state("sdxl", "unet", "diffusers", "unet.")
    found |= state("sd1", "text_encoder", "diffusers", "clip_l.transformer.")
    path = tmp_path / "model.safetensors"
    save_file(found, path)
    parts = {part.part: part for part in gather([path], Settings())}
    families = parts["text_encoder"].families
    assert families[:2] == ("sd1", "sdxl")
    assert "sd2" not in families


# --- C4: the attention of the VAE -----------------------------------------------------------------

SPELLINGS = (
    {"q": "q", "k": "k", "v": "v", "proj_out": "proj_out", "norm": "norm"},
    {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0", "norm": "group_norm"},
    {"q": "query", "k": "key", "v": "value", "proj_out": "proj_attn", "norm": "group_norm"},
)


def vae_spelled(vae: State, spelling: dict[str, str], flat: Callable[[str], bool]) -> State:
    found = {}
    for key, one in vae.items():
        front, attention, rest = key.partition(".attn_1.")
        if attention:
            module, leaf = rest.rsplit(".", 1)
            key = f"{front}{attention}{spelling[module]}.{leaf}"
            one = one[..., 0, 0].copy() if one.ndim == 4 and flat(front) else one
        found[key] = one
    return found


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_attention_of_the_vae_in_every_spelling_and_back(
    spelling: dict[str, str], original_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """Three namings, matrices or 1x1 convolutions, one each in encoder and decoder."""
    whole = load_file(original_of("sd1"))
    vae = {key: one for key, one in whole.items() if key.startswith(V)}
    mixed = vae_spelled(vae, spelling, lambda front: "encoder" in front)
    wrapped = {f"module.{key}": one for key, one in mixed.items()}
    save_file(wrapped, tmp_path / "vae.safetensors")
    repo = weightport.convert(tmp_path / "vae.safetensors", tmp_path / "repo").output
    written = load_file(repo / "vae/diffusion_pytorch_model.safetensors")
    expected = weights("sd1", "vae")
    assert written.keys() == expected.keys()
    assert all(np.array_equal(written[key], expected[key]) for key in expected)
    weightport.convert(repo, tmp_path / "again.safetensors", to="ldm")
    again = load_file(tmp_path / "again.safetensors")
    assert again.keys() == wrapped.keys()
    assert all(np.array_equal(again[key], wrapped[key]) for key in wrapped)


# --- C5: PEFT inside a model ----------------------------------------------------------------------


def with_lora(plain: State, module: str, adapter: str, rank: int = 2) -> State:
    """A model in which PEFT wrapped one module."""
    found = {}
    for key, one in plain.items():
        found[key.replace(f"{module}.", f"{module}.base_layer.")] = one
    weight = plain[f"{module}.weight"]
    found[f"{module}.lora_A.{adapter}.weight"] = np.full((rank, *weight.shape[1:]), 0.5, "f4")
    found[f"{module}.lora_B.{adapter}.weight"] = np.full(
        (weight.shape[0], rank, *[1] * (weight.ndim - 2)), 0.25, "f4"
    )
    return found


@pytest.mark.parametrize("module", ["mid_block.attentions.0.proj_in", "time_embedding.linear_1"])
def test_lora_of_peft_inside_a_model_is_merged_with_its_alpha(module: str, tmp_path: Path) -> None:
    plain = weights("sd1", "unet")
    inside = with_lora(plain, module, "style")
    inside |= {
        f"conv_out.modules_to_save.style.{leaf}": plain[f"conv_out.{leaf}"] + 1
        for leaf in ("weight", "bias")
    }
    for leaf in ("weight", "bias"):
        inside[f"conv_out.original_module.{leaf}"] = inside.pop(f"conv_out.{leaf}")
    wrapped = {f"base_model.model.{key}": one for key, one in inside.items()}
    refused(wrapped, tmp_path, "LoRA of the adapter `style` by PEFT.*--lora-alpha")
    (inspected,) = weightport.inspect(tmp_path / "model.safetensors").parts
    assert any("LoRA of the adapter `style`" in fact for fact in inspected.evidence)
    merged = recognised(wrapped, tmp_path, lora_alpha=8.0)["unet"].checkpoint.tensors
    found = {key: merged[key].numpy() for key in (f"{module}.weight", "conv_out.bias")}
    change = 8 / 2 * (0.5 * 0.25 * 2)
    np.testing.assert_allclose(found[f"{module}.weight"], plain[f"{module}.weight"] + change)
    np.testing.assert_array_equal(found["conv_out.bias"], plain["conv_out.bias"] + 1)


def test_what_peft_does_else_is_refused_by_name(tmp_path: Path) -> None:
    module = "mid_block.attentions.0.proj_in"
    plain = state("sd1", "unet", "diffusers")
    one = with_lora(plain, module, "a")
    two = one | {f"{module}.lora_{side}.b.weight": np.ones((2, 2), "f4") for side in "AB"}
    refused(two, tmp_path, "2 adapters by PEFT, `a`, `b`", lora_alpha=1.0)
    dora = one | {f"{module}.lora_magnitude_vector.a.weight": np.ones(1, "f4")}
    refused(dora, tmp_path, "no factors of plain LoRA: .*lora_magnitude_vector", lora_alpha=1.0)


# --- the way back ---------------------------------------------------------------------------------


def test_the_way_back_gives_the_names_that_came_off(
    original_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """A whole checkpoint, wrapped outside and inside, its second text encoder under transformers'
    names."""
    source = load_file(original_of("sdxl"))
    second = "conditioner.embedders.1.model."
    whole = {key: one for key, one in source.items() if not key.startswith(second)}
    whole |= {
        f"{second}transformer.{k}": one for k, one in weights("sdxl", "text_encoder_2").items()
    }
    whole = {f"module.{key.replace(P, P + '_orig_mod.')}": one for key, one in whole.items()}
    whole |= {"module.v_pred": np.zeros(0, "f4")}
    save_file(whole, tmp_path / "model.safetensors")
    conversion = weightport.convert(tmp_path / "model.safetensors", tmp_path / "repo")
    report = json.loads((conversion.output / "conversion.json").read_text())
    told = [fact for one in report["sources"] for fact in one["evidence"] if "taken off" in fact]
    assert any("torch.compile" in fact and "DataParallel" in fact for fact in told)
    weightport.convert(conversion.output, tmp_path / "again.safetensors", to="ldm")
    again = load_file(tmp_path / "again.safetensors")
    assert again.keys() == whole.keys()
    assert all(again[key].tobytes() == whole[key].tobytes() for key in whole)


# --- the facts ------------------------------------------------------------------------------------


def test_roots_tell_every_key_of_every_table() -> None:
    """No key of a part begins anywhere but at its front, and its naming is its table's kind."""
    namings = facts("names")["namings"]
    for table in all_tables():
        if "naming" not in table.about:
            continue
        for one in candidates(str(table.about["layout"])):
            if one.table.name == table.name:
                front = [] if namings[str(table.about["naming"])].get("first") else ["front"]
                for name in one.links:
                    key = name.removeprefix(table.prefix).split(".")
                    root = find_root(["module", *front, *key])
                    assert root is not None, name
                    assert root.at == len(front) + 1
                    assert root.naming.kind == namings[str(table.about["naming"])]["kind"]


def test_places_are_those_of_the_tables() -> None:
    prefixes = {table.prefix.removesuffix(".") for table in all_tables()} - {""}
    assert prefixes <= set(facts("names")["places"]["names"])
    assert set(facts("names")["inside"]["names"]) <= facts("names")["wrappers"].keys()
