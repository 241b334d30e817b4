"""Every layout that Keras ever wrote, remade from skeletons: each tensor is found under its key,
with its content."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from weightport.converters.checkpoint import Checkpoint, Computed
from weightport.converters.layouts.kerascv import parts
from weightport.converters.layouts.kerascv_layers import model_layers
from weightport.converters.layouts.source import Source
from weightport.converters.layouts.sources import open_source
from weightport.converters.planning.candidates import Candidate, candidates
from weightport.converters.planning.recognise import recognise
from weightport.errors import ConversionError

from ...support.keras_skeletons import (
    SKELETONS,
    Array,
    Document,
    arrays,
    component,
    golden_keys,
    in_chunks,
    keys_of,
    legacy_names,
    load,
    numbered_in_steps,
    partly_frozen,
    trainer,
    whole_model,
    without_names,
    write,
    write_shards,
)

FILES = [
    name for name in SKELETONS if name != "k3_te_s.weights"
]  # that one is an index without shapes
LEGACY = [
    "k2_te_w.h5",
    "k2_te_off_w.h5",
    "k2_unet_w.h5",
    "k2_dec_w.h5",
    "k2_dec_off_w.h5",
    "k2_enc_w.h5",
]
ATTRIBUTES = [
    "k2_te_n.weights.h5",
    "k2_unet_n.weights.h5",
    "k2_dec_n.weights.h5",
    "k2_enc_n.weights.h5",
]


def candidate(part: str) -> Candidate:
    """The part as the tables know it, in Stable Diffusion 1."""
    return next(c for c in candidates("kerascv") if c.part == part and c.family.name == "sd1")


def read(path: Path) -> list[Checkpoint]:
    """The components in a file, named where the file names nothing."""
    return [recognise(checkpoint).checkpoint for checkpoint in parts(Source(path))]


def check(checkpoint: Checkpoint, part: str, document: Document, keys: Mapping[str, str]) -> None:
    """The checkpoint has exactly the part's keys, every tensor is the one of its key, and none was
    dropped silently."""
    found = arrays(document, keys)
    stored = {key: found[name] for name, key in keys.items()}
    assert set(checkpoint.tensors) == set(golden_keys(part))
    for key, tensor in checkpoint.tensors.items():
        expected = effective(key, stored)
        values = tensor.numpy()
        assert (tensor.shape, values.dtype) == (expected.shape, expected.dtype), key
        assert values.tobytes() == expected.tobytes(), key
    used = sum(len(t.inputs) if isinstance(t, Computed) else 1 for t in checkpoint.tensors.values())
    assert used + len(checkpoint.skipped) == len(found)


def check_file(path: Path, name: str, document: Document, keys: Mapping[str, str]) -> Checkpoint:
    """Write a file and check the one component in it, that of the skeleton `name`."""
    (checkpoint,) = read(write(path, document, keys))
    check(checkpoint, component(name), document, keys)
    return checkpoint


def effective(key: str, stored: Mapping[str, Array]) -> Array:
    """The weight that Keras computes with: int8 as `q / scale`, int4 as `(q - zero) * scale` of the
    group."""
    layer, _, role = key.rpartition(".")
    values = stored[key]
    if role != "weight" or f"{layer}.scale" not in stored:
        return values
    by_row, scale = layer.endswith("_embedding"), stored[f"{layer}.scale"]
    if f"{layer}.zero" not in stored:
        return values.astype("f4") / (scale[:, None] if by_row else scale)
    nibbles = np.empty((values.shape[0], 2 * values.shape[1]), "f4")
    for column in range(2):
        nibble = (values.view("u1") >> (4 * column) & 15).astype("f4")
        nibbles[:, column::2] = np.where(nibble < 8, nibble, nibble - 16)
    groups, axis = stored[f"{layer}.g_idx"].astype(int), 1 if by_row else 0
    return (nibbles - np.take(stored[f"{layer}.zero"], groups, axis)) * np.take(scale, groups, axis)


@pytest.mark.parametrize("part", ["text_encoder", "unet", "decoder", "image_encoder"])
def test_the_tables_name_what_kerascv_creates_in_its_order(part: str) -> None:
    order = [key for _, keys in model_layers(part, candidate(part).links) for key in keys]
    assert order == golden_keys(part)


@pytest.mark.parametrize("name", [name for name in FILES if "_int" not in name])
def test_shapes_are_those_of_the_family(name: str) -> None:
    document, links = load(name), candidate(component(name)).links
    manifest = candidate(component(name)).component.manifest()
    keys = keys_of(name, document)
    assert set(keys.values()) == set(links)
    for tensor, key in keys.items():
        stored = (
            document["entries"][tensor][1]
            if "entries" in document
            else document["datasets"][tensor][0]
        )
        assert tuple(stored) == links[key].source_shape(manifest), tensor


@pytest.mark.parametrize("name", FILES)
def test_skeleton(name: str, tmp_path: Path) -> None:
    document = load(name)
    checkpoint = check_file(tmp_path / "file", name, document, keys_of(name, document))
    if "_opt." in name:
        assert all(reason.startswith("optimizer state") for reason in checkpoint.skipped.values())


def test_shards(tmp_path: Path) -> None:
    document = load("k3_te_n.weights.h5")
    keys = keys_of("k3_te_n.weights.h5", document)
    (checkpoint,) = read(write_shards(tmp_path, load("k3_te_s.weights"), document, keys))
    check(checkpoint, "text_encoder", document, keys)


@pytest.mark.parametrize(
    ("file", "name"), [("x.weights.h5", "k2_unet_w.h5"), ("x.keras", "k2_te_model.h5")]
)
def test_keras_2_11_and_2_12_give_old_layouts_new_names(
    file: str, name: str, tmp_path: Path
) -> None:
    document = load(name)
    check_file(tmp_path / file, name, document, keys_of(name, document))


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_keras_2_12_to_2_14_number_layers_in_steps(name: str, tmp_path: Path) -> None:
    document = load(name)
    check_file(tmp_path / "file", name, *numbered_in_steps(document, keys_of(name, document)))


@pytest.mark.parametrize("name", ["k3_te_n.weights.h5", "k3_dec_off_n.weights.h5"])
def test_keras_3_0_to_3_4_do_not_store_names(name: str, tmp_path: Path) -> None:
    document = load(name)
    check_file(tmp_path / "file", name, without_names(document), keys_of(name, document))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", LEGACY)
def test_frozen_layers_reorder_the_names(name: str, seed: int, tmp_path: Path) -> None:
    document = load(name)
    frozen = partly_frozen(document, seed)
    assert legacy_names(frozen) != legacy_names(document)
    check_file(tmp_path / "file", name, frozen, keys_of(name, document))


@pytest.mark.parametrize("name", LEGACY)
def test_long_lists_of_names_are_split(name: str, tmp_path: Path) -> None:
    document = load(name)
    check_file(tmp_path / "file", name, in_chunks(document), keys_of(name, document))


@pytest.mark.parametrize("name", LEGACY)
def test_whole_model_with_optimizer(name: str, tmp_path: Path) -> None:
    document = load(name)
    checkpoint = check_file(
        tmp_path / "file", name, *whole_model(document, keys_of(name, document))
    )
    assert len(checkpoint.skipped) == 5


def test_a_trainer_lists_each_component_as_one_layer(tmp_path: Path) -> None:
    names = {
        "text_encoder": "k2_te_w.h5",
        "diffusion_model": "k2_unet_w.h5",
        "model": "k2_enc_w.h5",
    }
    parts = {layer: (load(name), keys_of(name, load(name))) for layer, name in names.items()}
    document, keys = trainer(parts)
    checkpoints = {
        checkpoint.root: checkpoint for checkpoint in read(write(tmp_path / "x.h5", document, keys))
    }
    assert list(checkpoints) == list(names)
    for layer, (part, part_keys) in parts.items():
        check(checkpoints[layer], component(names[layer]), part, part_keys)


# --- nothing is passed over in silence ------------------------------------------------------------


def with_dataset(document: Document, name: str, shape: tuple[int, ...] = (3,)) -> Document:
    return {**document, "datasets": document["datasets"] | {name: [shape, "float32", {}]}}


def listed(document: Document, layer: str, *names: str) -> Document:
    """The document with more weights listed for a layer of a legacy file."""
    attrs = document["attrs"]
    if layer not in document["groups"]:
        attrs = {**attrs, "layer_names": [*attrs["layer_names"], layer]}
    weight_names = document["groups"].get(layer, {}).get("weight_names", []) + list(names)
    return {
        **document,
        "attrs": attrs,
        "groups": document["groups"] | {layer: {"weight_names": weight_names}},
    }


def test_a_second_layer_in_a_list_is_unexpected(tmp_path: Path) -> None:
    name = "layers/res_block_3/entry_flow/padded_conv2d_1/conv2d/vars/0"
    document = with_dataset(load("k2_unet_n.weights.h5"), name)
    (checkpoint,) = parts(Source(write(tmp_path / "file", document, {})))
    assert recognise(checkpoint).unexpected == (
        "res_block.3.entry_flow.padded_conv2d_1.conv2d.weight",
    )


def test_a_second_sublayer_of_a_class_is_unexpected(tmp_path: Path) -> None:
    document = with_dataset(
        load("k2_dec_w.h5"), "resnet_block_3/resnet_block_3/padded_conv2d_99/conv2d_99/kernel:0"
    )
    document = listed(
        document, "resnet_block_3", "resnet_block_3/padded_conv2d_99/conv2d_99/kernel:0"
    )
    (checkpoint,) = parts(Source(write(tmp_path / "file", document, {})))
    assert recognise(checkpoint).unexpected == ("resnet_block.3.padded_conv2d_99.conv2d.weight",)


@pytest.mark.parametrize("name", ["dense/kernel", "encoder/dense/kernel:0"])
def test_two_weights_of_one_place_are_refused(name: str, tmp_path: Path) -> None:
    document = listed(with_dataset(load("k2_unet_w.h5"), f"dense/{name}"), "dense", name)
    with pytest.raises(ConversionError, match=r"`dense/kernel:0` has the place of another weight"):
        parts(Source(write(tmp_path / "file", document, {})))


def test_two_weights_of_one_name_are_refused(tmp_path: Path) -> None:
    document = listed(
        with_dataset(load("k2_unet_w.h5"), "head/dense/kernel:0"), "head", "dense/kernel:0"
    )
    with pytest.raises(ConversionError, match="two layers hold weights of the same name"):
        parts(Source(write(tmp_path / "file", document, {})))


def test_other_layers_of_a_trainer_are_named(tmp_path: Path) -> None:
    document, keys = trainer(
        {"unet": (load("k2_unet_w.h5"), keys_of("k2_unet_w.h5", load("k2_unet_w.h5")))}
    )
    document = listed(with_dataset(document, "head/head/kernel:0"), "head", "head/kernel:0")
    (checkpoint,) = read(write(tmp_path / "file", document, keys))
    assert list(checkpoint.skipped) == ["head/head/kernel:0"]
    check(checkpoint, "unet", document, keys)


def test_a_folder_of_shards_has_one_index(tmp_path: Path) -> None:
    for index in range(2):
        (tmp_path / f"{index}.weights.json").write_text('{"weight_map": {"/vars": "a.h5"}}')
    with pytest.raises(ConversionError, match=r"holds 2 `\.weights\.json` files"):
        read(tmp_path)


def test_an_empty_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="a folder, but neither"):
        open_source(Source(tmp_path))


def test_a_folder_of_shards_is_read(tmp_path: Path) -> None:
    document = load("k3_te_n.weights.h5")
    keys = keys_of("k3_te_n.weights.h5", document)
    write_shards(tmp_path, load("k3_te_s.weights"), document, keys)
    (checkpoint,) = read(tmp_path)
    check(checkpoint, "text_encoder", document, keys)


def test_hostile_object_graphs_end(tmp_path: Path) -> None:
    """Cycles, objects with two owners (2^40 paths), and a chain deeper than Python's stack."""
    document = load("k2_te_ckpt")
    keys, graph = keys_of("k2_te_ckpt", document), document["object_graph"]
    layer, first = graph[0][0]["layer-3"], len(graph)
    graph += [[{"a": i + 1, "b": i + 1}, []] for i in range(first, first + 40)]
    graph += [[{"a": i + 1}, []] for i in range(first + 40, first + 5000)]
    graph += [[{"a": first, "up": 0}, []]]
    graph[layer][0]["more"] = first
    check_file(tmp_path / "file", "k2_te_ckpt", document, keys)
