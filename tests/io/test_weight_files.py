"""Which files of a folder are the weights: every row of the precedence of diffusers, and hostile
indexes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from weightport.io.weight_files import (
    find_main_weights,
    find_variants,
    find_weights,
    index_suffix,
    read_index,
    shard_name,
    sibling_files,
    why_no_weights,
    write_index,
)

D = "diffusion_pytorch_model"
SINGLE, BIN = f"{D}.safetensors", f"{D}.bin"
INDEX, BIN_INDEX = f"{D}.safetensors.index.json", f"{D}.bin.index.json"


@pytest.mark.parametrize(
    ("names", "variant", "default", "safe", "pickled"),
    [
        ([SINGLE, BIN], None, SINGLE, SINGLE, BIN),
        ([BIN], None, BIN, None, BIN),
        ([SINGLE, INDEX], None, INDEX, INDEX, None),
        ([SINGLE, BIN_INDEX], None, SINGLE, SINGLE, BIN_INDEX),
        ([BIN_INDEX], None, BIN_INDEX, None, BIN_INDEX),  # diffusers #14811: OSError by default
        (
            [SINGLE, BIN, f"{D}.fp16.safetensors", f"{D}.fp16.bin"],
            "fp16",
            f"{D}.fp16.safetensors",
            f"{D}.fp16.safetensors",
            f"{D}.fp16.bin",
        ),
        ([SINGLE, f"{D}.fp16.bin"], "fp16", f"{D}.fp16.bin", None, f"{D}.fp16.bin"),
        ([SINGLE, f"{D}.fp16.safetensors"], "bf16", None, None, None),
        (
            [f"{D}.fp16.safetensors"],
            "fp1",
            None,
            None,
            None,
        ),  # upstream takes a beginning for the variant
        ([f"{D}.fp16.safetensors"], None, None, None, None),
        (["LICENSE", SINGLE], None, SINGLE, SINGLE, None),
        (
            [f"{D}.safetensors.index.fp16.json"],
            "fp16",
            *[f"{D}.safetensors.index.fp16.json"] * 2,
            None,
        ),
        (
            [f"{D}.safetensors.fp16.index.json"],
            "fp16",
            *[f"{D}.safetensors.fp16.index.json"] * 2,
            None,
        ),
        (["model.safetensors"], None, None, None, None),
    ],
)
def test_precedence(
    names: list[str],
    variant: str | None,
    default: str | None,
    safe: str | None,
    pickled: str | None,
) -> None:
    for use_safetensors, expected in ((None, default), (True, safe), (False, pickled)):
        found = find_weights(names, "diffusers", variant, use_safetensors)
        assert found == expected


@pytest.mark.parametrize("library", ["transformers", "stable_diffusion"])
def test_transformers_has_other_names(library: str) -> None:
    order = [
        "model.safetensors.index.json",
        "model.safetensors",
        "pytorch_model.bin.index.json",
        "pytorch_model.bin",
    ]
    for first in range(len(order)):
        assert find_weights(order[first:], library) == order[first]
    assert find_weights([SINGLE, "model.bin", "pytorch_model.safetensors"], library) is None


def test_variants() -> None:
    names = [
        "LICENSE",
        "config.json",
        f"{D}.fp16.bin",
        f"{D}.safetensors.index.non_ema.json",
        f"{D}.a.b.safetensors",
    ]
    names += [f"{D}-00001-of-00002.safetensors", f"{D}.ema-00001-of-00002.safetensors"]
    assert find_variants(names, "diffusers") == ["fp16", "non_ema"]
    assert find_variants([*names, BIN], "diffusers") == [None, "fp16", "non_ema"]


def test_the_message_tells_what_is_there() -> None:
    assert why_no_weights([], "diffusers", None, None) == f"there is no {SINGLE}"
    assert why_no_weights([], "transformers", "fp16", False) == "there is no pytorch_model.fp16.bin"
    assert why_no_weights([f"{D}.fp16.bin"], "diffusers", None, None).endswith(
        "but there is variant='fp16'"
    )
    assert "use_safetensors=" in why_no_weights([BIN], "diffusers", None, True)


def test_siblings_are_those_of_the_variant_alone() -> None:
    main = [SINGLE, BIN, INDEX, f"{D}-00001-of-00002.safetensors"]
    fp16 = [
        f"{D}.fp16.safetensors",
        f"{D}.fp16-00001-of-00002.safetensors",
        f"{D}.safetensors.index.fp16.json",
    ]
    fp16 += [f"{D}-00001-of-00002.fp16.safetensors", f"{D}.safetensors.fp16.index.json"]
    others = [
        "config.json",
        "model.safetensors",
        f"{D}.fp16.index.json",
        f"x{SINGLE}",
        f"{SINGLE}.x",
    ]
    assert sibling_files(main + fp16 + others, "diffusers", None) == main
    assert sibling_files(main + fp16 + others, "diffusers", "fp16") == fp16
    assert sibling_files(main + fp16 + others, "diffusers", "fp1.") == []


@pytest.mark.parametrize(
    "name",
    [
        "../x.bin",
        "/x.bin",
        "a/b.bin",
        "a\\b.bin",
        "..",
        ".",
        "",
        "a\nb.bin",
        "x.safetensors",
        "bin",
    ],
)
def test_shards_are_plain_names(name: str) -> None:
    with pytest.raises(ValueError, match=r"^shard .* is not a plain \.bin file name"):
        read_index({"weight_map": {"a": "good.bin", "b": name}}, "bin")


@pytest.mark.parametrize(
    "index", [{}, {"weight_map": {}}, {"weight_map": []}, {"weight_map": {"a": 1}}]
)
def test_an_index_has_a_map(index: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="no `weight_map`"):
        read_index(index, "bin")


@pytest.mark.parametrize("filename", [SINGLE, BIN, "model.fp16.safetensors"])
def test_an_index_is_read_as_it_was_written(tmp_path: Path, filename: str) -> None:
    suffix = filename.rpartition(".")[2]
    files = {key: shard_name(filename, number, 2) for number, key in enumerate("ba", 1)}
    path = write_index(tmp_path, filename, files, 8)
    content = json.loads(path.read_text())
    assert content["metadata"] == {"total_size": 8}
    assert read_index(content, suffix) == files
    assert index_suffix(path.name) == suffix
    library = "transformers" if filename.startswith("model") else "diffusers"
    variant = "fp16" if "fp16" in filename else None
    names = [path.name, *files.values()]
    assert find_weights(names, library, variant) == path.name
    assert sorted(sibling_files(names, library, variant)) == sorted(names)


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ([SINGLE, INDEX, f"{D}.fp16.safetensors"], INDEX),
        ([f"{D}.fp16.safetensors", SINGLE], SINGLE),
        ([f"{D}.fp16.safetensors", f"{D}.ema.safetensors"], f"{D}.ema.safetensors"),
        (
            [f"{D}.a.safetensors", f"{D}.safetensors.index.fp16.json"],
            f"{D}.safetensors.index.fp16.json",
        ),
        ([SINGLE, "model.safetensors"], "model.safetensors"),
        (["model.safetensors", "pytorch_model.bin"], "model.safetensors"),
        (["other.safetensors", BIN, "config.json"], BIN),
    ],
)
def test_weights_of_a_component_of_any_library(names: list[str], found: str | None) -> None:
    assert find_main_weights(names) == found
    assert find_main_weights(names[::-1]) == found
