"""Families and manifests: equal to the runtime's models and to those of diffusers and transformers,
at full size."""

from __future__ import annotations

import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from weightport.mappings.families import Component, families
from weightport.runtime.manifest import MODELS, manifest

ROOT = Path(__file__).resolve().parents[2]
MANIFESTS = ROOT / "tests" / "golden" / "manifests"
COMPONENTS = [
    pytest.param(component, id=f"{family.name} {name}")
    for family in families().values()
    for name, component in family.components.items()
]
KNOWN = [
    component
    for family in families().values()
    for component in family.components.values()
    if component.class_name in MODELS
]

OTHERS = [
    pytest.param(other, id=f"sd1 {other.class_name}")
    for component in families()["sd1"].components.values()
    for other in component.instead.values()
]


def read_manifest(component: Component) -> list[tuple[str, tuple[int, ...]]]:
    """The tensors that a manifest lists, `key 320x4x3x3` a line."""
    path = MANIFESTS / f"{_first(component).family}_{_first(component).name}.txt"
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line[0] != "#"]
    listed = [line.split() for line in lines]
    return [(key, tuple(map(int, sides.split("x")))) for key, sides in listed]


def _first(component: Component) -> Component:
    """The component of the first family that has the same tensors."""
    shapes = component.manifest()
    known = (other for family in families().values() for other in family.components.values())
    return next(other for other in known if other.manifest() == shapes)


@pytest.mark.parametrize("component", KNOWN, ids=lambda c: f"{c.family} {c.name}")
def test_the_modules_of_a_class_give_the_stock_manifest(component: Component) -> None:
    assert list(component.manifest().items()) == read_manifest(component)


@pytest.mark.parametrize("component", [*KNOWN, *OTHERS])
def test_manifest_equals_the_runtime(component: Component) -> None:
    assert list(component.manifest().items()) == list(
        manifest(component.class_name, component.config).items()
    )


@pytest.mark.parametrize("component", [*COMPONENTS, *OTHERS])
def test_manifest_equals_the_library(component: Component) -> None:
    library = pytest.importorskip(component.library)
    with torch.device("meta"):
        if component.library == "transformers":
            kind = getattr(library, component.class_name)
            model = kind(kind.config_class(**component.config))
        else:
            model = getattr(library, component.class_name)(**component.config)
    # transformers >= 5.6 spells CLIP's keys without the prefix, and loads both spellings; ours is
    # the one every version loads. T5's token table is there twice.
    prefix = "text_model." if component.class_name.startswith("CLIP") else ""
    theirs = {
        key if key.startswith("text_projection") else prefix + key.removeprefix(prefix): tuple(
            tensor.shape
        )
        for key, tensor in model.state_dict().items()
        if key not in (getattr(model, "_tied_weights_keys", None) or ())
    }
    assert component.manifest() == theirs
    in_order = component.class_name != "AsymmetricAutoencoderKL"  # one module stands elsewhere
    assert not in_order or list(component.manifest()) == list(theirs)


@pytest.mark.parametrize(
    ("family", "component", "tensors", "weights"),
    [  # counted in KerasCV's models of the same weights
        ("sd1", "unet", 686, 859_520_964),
        ("sd2", "unet", 686, 865_910_724),
        ("sd1", "vae", 140 + 108, 49_490_199 + 34_163_664),
        ("sd1", "text_encoder", 196, 123_060_480),
        ("sd2", "text_encoder", 372, 340_387_840),
    ],
)
def test_manifest_has_the_published_size(
    family: str, component: str, tensors: int, weights: int
) -> None:
    shapes = families()[family].components[component].manifest()
    assert len(shapes) == tensors
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == weights


def test_script_regenerates_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "make_manifests.py"))
    monkeypatch.setitem(script["main"].__globals__, "FOLDER", tmp_path)
    script["main"]()
    written = sorted(path.name for path in tmp_path.iterdir())
    assert written == sorted(path.name for path in MANIFESTS.iterdir())
    for name in written:
        assert (tmp_path / name).read_bytes() == (MANIFESTS / name).read_bytes()


def told_by(component: Component, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The config that tensors of these shapes tell."""
    return component.config_for(component.model.read(lambda key, _: shapes.get(key)))


@pytest.mark.parametrize("component", [*COMPONENTS, *OTHERS])
def test_stock_shapes_give_the_stock_config(component: Component) -> None:
    assert told_by(component, component.manifest()) == component.config


@pytest.mark.parametrize("half", ["encoder.", "decoder."])
@pytest.mark.parametrize(
    "family", [name for name, family in families().items() if "vae" in family.components]
)
def test_half_of_a_deeper_autoencoder_leaves_no_option_open(family: str, half: str) -> None:
    """Of a stock one with fewer blocks, too."""
    whole = families()["sd1"].components["vae"].manifest()
    shapes = {key: shape for key, shape in whole.items() if key.startswith(half)}
    component = families()[family].components["vae"]
    told = told_by(component, shapes)
    assert len(told["down_block_types"]) == len(told["up_block_types"]) == 4
    assert None not in [*told["down_block_types"], *told["up_block_types"]]


@pytest.mark.parametrize(
    ("family", "component", "options"),
    [
        ("sd1", "unet", {"block_out_channels": [32, 64, 64, 64], "cross_attention_dim": 24}),
        (
            "sd2",
            "unet",
            {
                "block_out_channels": [64, 128, 128, 256],
                "cross_attention_dim": 40,
                "attention_head_dim": [1, 2, 2, 4],
            },
        ),
        ("sd1", "vae", {"block_out_channels": [32, 64, 96, 128]}),
        (
            "sd2",
            "text_encoder",
            {
                "vocab_size": 49412,
                "hidden_size": 128,
                "intermediate_size": 100,
                "max_position_embeddings": 33,
                "num_attention_heads": 2,
            },
        ),
        ("sd1", "text_encoder", {"hidden_size": 32, "num_attention_heads": 1}),
    ],
)
def test_sizes_are_read_off_the_shapes(
    family: str, component: str, options: dict[str, Any]
) -> None:
    stock = families()[family].components[component]
    expected = {**stock.config, **options}
    assert told_by(stock, manifest(stock.class_name, expected)) == expected


def test_half_a_vae_tells_its_widths() -> None:
    stock = families()["sd1"].components["vae"]
    expected = {**stock.config, "block_out_channels": [32, 64, 96, 128]}
    shapes = manifest(stock.class_name, expected)
    for half in ("encoder", "decoder"):
        assert (
            told_by(stock, {key: shapes[key] for key in shapes if key.startswith(half)}) == expected
        )


def test_a_tensor_without_the_axis_tells_nothing() -> None:
    stock = families()["sd1"].components["text_encoder"]
    shapes = stock.manifest() | {"text_model.embeddings.token_embedding.weight": ()}
    assert told_by(stock, shapes) == stock.config


def test_the_stock_config_is_never_changed() -> None:
    stock = families()["sd1"].components["unet"]
    told_by(stock, stock.manifest())["block_out_channels"].append(0)
    assert stock.config["block_out_channels"] == [320, 640, 1280, 1280]


def test_a_component_says_how_it_differs_from_the_one_it_is_like() -> None:
    sd1, sd2 = (families()[name].components["vae"] for name in ("sd1", "sd2"))
    assert sd2.config == {**sd1.config, "sample_size": 768}
    assert sd2.model is sd1.model
    assert sd2.derive == sd1.derive


def test_unknown_class_is_refused() -> None:
    with pytest.raises(ValueError, match="'VQModel' is not a model of the runtime"):
        manifest("VQModel", {})


def test_a_manifest_is_built_once_and_cannot_be_damaged(monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"block_out_channels": [32], "norm_num_groups": 16, "act_fn": "silu"}
    shapes = manifest("AutoencoderKL", config)
    expected = dict(shapes)
    shapes.clear()
    monkeypatch.setattr(torch.nn.Module, "state_dict", None)
    assert manifest("AutoencoderKL", dict(reversed(config.items()))) == expected
    with pytest.raises(TypeError):
        manifest("AutoencoderKL", {**config, "norm_num_groups": 8})
