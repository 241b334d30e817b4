"""Real Keras files remade without Keras: the structure of `golden/keras_skeletons`, narrow shapes,
content by key.

What a tensor holds depends on its canonical key alone, so that one that was taken for another does
not go unnoticed. Which key a tensor of a file has is told here from golden lists and plain spelling
rules, not by the readers' logic.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import h5py
import ml_dtypes
import numpy as np

from weightport.converters.readers.object_graph import Node

from .tf_bundle_writer import write_bundle

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
SKELETONS = sorted(
    path.name.removesuffix(".json.gz") for path in (GOLDEN / "keras_skeletons").glob("*.json.gz")
)
COMPONENTS = {"te": "text_encoder", "unet": "unet", "dec": "decoder", "enc": "image_encoder"}
BF16 = np.dtype(ml_dtypes.bfloat16)
TF_DTYPES = {1: np.dtype("f4"), 9: np.dtype("i8"), 14: BF16}
WEIGHT_NAMES = ("kernel", "_kernel", "embeddings", "_embeddings", "gamma")
LIST_ITEMS = {  # attributes of a ResBlock that are lists
    "entry_flow.0": "entry_flow.group_normalization",
    "entry_flow.2": "entry_flow.padded_conv2d",
    "embedding_flow.1": "embedding_flow.dense",
    "exit_flow.0": "exit_flow.group_normalization",
    "exit_flow.2": "exit_flow.padded_conv2d",
}
Array = np.ndarray[Any, Any]
Document = dict[str, Any]


def load(name: str) -> Document:
    """A skeleton: `groups` and `datasets` of an HDF5 file, `entries` of a TensorFlow checkpoint, or
    `weight_map`."""
    document = json.loads(
        gzip.decompress((GOLDEN / "keras_skeletons" / f"{name}.json.gz").read_bytes())
    )
    return {**document, **document.get("h5", {})}


def component(name: str) -> str:
    """The component that a skeleton is of."""
    return COMPONENTS[name.split("_")[1]]


@cache
def golden_keys(part: str) -> list[str]:
    """The canonical keys of a component, in the order in which KerasCV creates the weights."""
    return (GOLDEN / "keras_keys" / f"{part}.txt").read_text().split()


def narrow(shape: Iterable[int]) -> tuple[int, ...]:
    """A shape with few elements, in which ranks, 1x1 kernels and divisors of widths stay."""
    return tuple(size if size < 10 else max(2, size // 64) for size in shape)


def content(key: str, shape: Iterable[int], dtype: Any) -> Array:
    """What the tensor of a key holds in every file, whatever it is called there."""
    rng, shape, dtype = (
        np.random.default_rng(zlib.crc32(key.encode())),
        tuple(shape),
        np.dtype(dtype),
    )
    if key.endswith(".g_idx"):
        return (np.arange(*shape) % 2).astype(dtype)
    values = rng.integers(-100, 100, shape) if dtype.kind == "i" else rng.standard_normal(shape)
    return np.asarray(values, dtype)


# --- which canonical key a tensor of a file has ---------------------------------------------------


def keys_of(name: str, document: Document) -> dict[str, str]:
    """Name of a tensor in the file -> its canonical key; tensors that are no weights are not in
    it."""
    if "entries" in document:
        return keys_of_graph(document, golden_keys(component(name)))
    if "layer_names" in (document["attrs"] | document["groups"].get("model_weights", {})):
        return dict(zip(legacy_names(document), golden_keys(component(name)), strict=True))
    return keys_of_attributes(document)


def legacy_names(document: Document) -> list[str]:
    """The datasets of a legacy file as its attributes list them: in the order of creation, if
    nothing is frozen."""
    groups = {"": document["attrs"], **document["groups"]}
    above = "model_weights/" if "model_weights" in groups else ""
    layers = groups[above.rstrip("/")]["layer_names"]
    return [
        f"{above}{layer}/{name}"
        for layer in layers
        for name in groups[above + layer]["weight_names"]
    ]


def keys_of_attributes(document: Document) -> dict[str, str]:
    """`layers/res_block_2/entry_flow/padded_conv2d/conv2d/vars/0` spells its key, but for the
    variable's number."""
    keys = {}
    for name in (name for name in document["datasets"] if name.startswith("layers/")):
        _, layer, *attributes, _, position = name.split("/")
        kind, rank = re.fullmatch(r"(.+?)(?:_(\d+))?", layer).groups()
        kind = "norm" if kind.endswith("_normalization") else kind
        roles = _roles(document["datasets"], name.rpartition("/")[0])
        keys[name] = ".".join([kind, rank or "0", *attributes, roles[int(position)]])
    return keys


def _roles(datasets: Mapping[str, Any], group: str) -> list[str]:
    """What the variables of a layer are, in order: quantised ones have scales, and embeddings have
    no bias."""
    quantised = (
        ["weight", "scale", "zero", "g_idx"] if datasets[f"{group}/0"][1] == "int8" else ["weight"]
    )
    return quantised if "_embedding/" in group else [quantised[0], "bias", *quantised[1:]]


def keys_of_graph(document: Document, golden: list[str]) -> dict[str, str]:
    """Layers by number, lists by position; `variables/12` is the twelfth of all."""
    layers = list(dict.fromkeys(".".join(key.split(".")[:2]) for key in golden))
    paths = {name: name.removesuffix("/.ATTRIBUTES/VARIABLE_VALUE") for name in document["entries"]}
    found = {
        name: re.search(r"(?:layer_with_weights-|_operations/)(\d+)/(.+)", path)
        for name, path in paths.items()
    }
    numbers = sorted({int(match[1]) for match in found.values() if match})
    keys = {}
    for name, match in found.items():
        if match:
            layer = layers[int(match[1]) if "layer_with" in name else numbers.index(int(match[1]))]
            path, _, variable = f"{layer}/{match[2]}".replace("/", ".").rpartition(".")
            for item, attribute in LIST_ITEMS.items():
                path = path.replace(f".{item}", f".{attribute}")
            keys[name] = f"{path}.{'weight' if variable in WEIGHT_NAMES else 'bias'}"
        elif paths[name].startswith("variables/"):
            keys[name] = golden[int(paths[name].split("/")[1])]
    return keys


# --- files ----------------------------------------------------------------------------------------


def arrays(document: Document, keys: Mapping[str, str]) -> dict[str, Array]:
    """What the file holds by name, weights and all else."""
    if "entries" in document:
        tensors = {
            name: (shape, TF_DTYPES[number])
            for name, (number, shape) in document["entries"].items()
            if number != 7
        }
    else:
        tensors = {
            name: (shape, BF16 if dtype == "|V2" else dtype)
            for name, (shape, dtype, _) in document["datasets"].items()
        }
    return {
        name: content(keys.get(name, name), narrow(shape), dtype)
        for name, (shape, dtype) in tensors.items()
    }


def write(path: Path, document: Document, keys: Mapping[str, str]) -> Path:
    """Write the file or folder that a skeleton describes; the path that a user would name."""
    if "entries" in document:
        return _write_checkpoint(path, document, keys)
    if "files" in document:
        return _write_archive(path, document, keys)
    with h5py.File(path, "w") as file:
        _write_h5(file, document, keys)
    return path


def _write_h5(file: h5py.File, document: Document, keys: Mapping[str, str]) -> None:
    for group, attrs in {"/": document["attrs"], **document["groups"]}.items():
        for name, value in attrs.items():
            is_list = isinstance(value, list)
            file.require_group(group).attrs[name] = (
                [item.encode() for item in value] if is_list else value
            )
        file.require_group(group)
    for name, array in arrays(document, keys).items():
        _, dtype, attrs = document["datasets"][name]
        file[name] = array.view(dtype)
        file[name].attrs.update(attrs)


def _write_archive(path: Path, document: Document, keys: Mapping[str, str]) -> Path:
    with io.BytesIO() as buffer, zipfile.ZipFile(path, "w") as archive:
        with h5py.File(buffer, "w") as file:
            _write_h5(file, document, keys)
        archive.writestr("metadata.json", json.dumps(document["metadata"]))
        archive.writestr("config.json", json.dumps(document["config"]))
        archive.writestr("model.weights.h5", buffer.getvalue())
    return path


def _write_checkpoint(path: Path, document: Document, keys: Mapping[str, str]) -> Path:
    """A folder; with `saved_model.pb` where the skeleton is of a SavedModel or an export."""
    graph = [
        Node(children, {name: key for name, _, key in values})
        for children, values in document["object_graph"]
    ]
    path.mkdir()
    prefix = path / "ckpt"
    if "signatures" in graph[0].children:
        (path / "saved_model.pb").write_bytes(b"\x08\x01")
        (path / "variables").mkdir()
        prefix = path / "variables" / "variables"
    write_bundle(prefix, arrays(document, keys), graph, checksums=False)
    return path


def write_shards(
    folder: Path, index: Document, document: Document, keys: Mapping[str, str]
) -> Path:
    """The shards that an index names, with the variables that it says each holds; returns the
    index's path."""
    shards: dict[str, Document] = defaultdict(lambda: {"attrs": {}, "groups": {}, "datasets": {}})
    for name, dataset in document["datasets"].items():
        (shard,) = np.atleast_1d(index["weight_map"]["/" + name.rpartition("/")[0]])
        shards[shard]["datasets"][name] = dataset
    for shard, part in shards.items():
        write(folder / shard, part, keys)
    path = folder / "s.weights.json"
    path.write_text(json.dumps(index))
    return path


# --- what other versions of Keras, other models and other training make of a file -----------------


def without_names(document: Document) -> Document:
    """A `.weights.h5` of Keras 3.0 to 3.4, whose groups do not tell the layers' names."""
    return {**document, "groups": {name: {} for name in document["groups"]}}


def numbered_in_steps(
    document: Document, keys: Mapping[str, str]
) -> tuple[Document, dict[str, str]]:
    """A `.weights.h5` of Keras 2.12 to 2.14, which meets each layer twice, so that it counts 0, 2,
    4, ..."""

    def renamed(name: str) -> str:
        _, layer, *rest = name.split("/")
        kind, rank = re.fullmatch(r"(.+?)(?:_(\d+))?", layer).groups()
        layer = f"{kind}_{2 * int(rank)}" if rank else kind
        return "/".join(["_layer_checkpoint_dependencies", layer, *rest])

    datasets = {renamed(name): dataset for name, dataset in document["datasets"].items()}
    return {**document, "groups": {}, "datasets": datasets}, {
        renamed(name): key for name, key in keys.items()
    }


def in_chunks(document: Document) -> Document:
    """Attributes over 64 kB are split; here every list of more than one name is."""

    def split(attrs: dict[str, Any]) -> dict[str, Any]:
        chunks = {
            name: [v[: len(v) // 2], v[len(v) // 2 :]]
            for name, v in attrs.items()
            if name.endswith("_names")
        }
        return {name: value for name, value in attrs.items() if name not in chunks} | {
            f"{name}{i}": half for name, halves in chunks.items() for i, half in enumerate(halves)
        }

    groups = {name: split(attrs) for name, attrs in document["groups"].items()}
    return {**document, "attrs": split(document["attrs"]), "groups": groups}


def partly_frozen(document: Document, seed: int) -> Document:
    """Keras lists trainable weights before frozen ones: half of the innermost layers are frozen."""
    rng = np.random.default_rng(seed)

    def reordered(names: list[str]) -> list[str]:
        frozen = {
            layer: bool(rng.integers(2))
            for layer in dict.fromkeys(name.rpartition("/")[0] for name in names)
        }
        return sorted(names, key=lambda name: frozen[name.rpartition("/")[0]])

    groups = {
        name: {**attrs, "weight_names": reordered(attrs["weight_names"])}
        if "weight_names" in attrs
        else attrs
        for name, attrs in document["groups"].items()
    }
    return {**document, "groups": groups}


def whole_model(document: Document, keys: Mapping[str, str]) -> tuple[Document, dict[str, str]]:
    """`save("model.h5")` of a compiled model: the weights one group deeper, with the optimizer
    beside them."""
    above = "model_weights"
    datasets = {f"{above}/{name}": dataset for name, dataset in document["datasets"].items()}
    slots = {f"optimizer_weights/AdamW/m/{i}:0": [[4, 3], "float32", {}] for i in range(5)}
    groups = {above: document["attrs"]} | {
        f"{above}/{name}": attrs for name, attrs in document["groups"].items()
    }
    attrs = {
        "keras_version": "2.11.0",
        "backend": "tensorflow",
        "model_config": "{}",
        "training_config": "{}",
    }
    whole = {"attrs": attrs, "groups": groups, "datasets": datasets | slots}
    return whole, {f"{above}/{name}": key for name, key in keys.items()}


def trainer(
    parts: Mapping[str, tuple[Document, Mapping[str, str]]],
) -> tuple[Document, dict[str, str]]:
    """`save_weights("x.h5")` of a subclassed model that holds components: each is one layer with a
    flat list."""
    saved: Document = {
        "attrs": {"layer_names": list(parts), "keras_version": "2.15.0"},
        "groups": {},
        "datasets": {},
    }
    saved_keys: dict[str, Any] = {}
    for layer, (document, keys) in parts.items():
        names = legacy_names(document)
        flat = {name: f"{layer}/{name.split('/', 1)[1]}" for name in names}
        saved["groups"][layer] = {"weight_names": [name.split("/", 1)[1] for name in names]}
        saved["datasets"] |= {flat[name]: document["datasets"][name] for name in names}
        saved_keys |= {flat[name]: keys[name] for name in names}
    return saved, saved_keys
