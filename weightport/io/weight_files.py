"""The names of weight files: stems, variants, shards, and the index that lists the shards.

    X.safetensors                               the weights of stem X
    X.fp16.safetensors                          their variant fp16
    X.safetensors.index.json                    the index of X-00001-of-00002.safetensors, ...
    X.safetensors.index.fp16.json               of X.fp16-00001-of-00002.safetensors, ...
    X.safetensors.fp16.index.json               older: of X-00001-of-00002.fp16.safetensors, ...

and the same with `.bin`. The stem is `diffusion_pytorch_model` in diffusers; in transformers it is
`model` for safetensors and `pytorch_model` for `.bin`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path

from ..errors import printable
from .config_files import write_json

STEMS = {
    "transformers": ("model", "pytorch_model"),
    "stable_diffusion": ("model", "pytorch_model"),  # the safety checker
    "diffusers": ("diffusion_pytorch_model",),
}
MAIN_STEMS = {  # suffix -> the stems of all libraries
    "safetensors": tuple(dict.fromkeys(stems[0] for stems in STEMS.values())),
    "bin": tuple(dict.fromkeys(stems[-1] for stems in STEMS.values())),
}
_SUFFIXES = {None: ("safetensors", "bin"), True: ("safetensors",), False: ("bin",)}
_SHARD = r"-\d{5}-of-\d{5}"
_INDEX = re.compile(r".+\.(safetensors|bin)(\.[^.]+)?\.index(\.[^.]+)?\.json")


# --- the files of a folder ------------------------------------------------------------------------


def find_weights(
    names: Collection[str],
    library: str,
    variant: str | None = None,
    use_safetensors: bool | None = None,
) -> str | None:
    """The file with the weights, or their index (`.json`), or None.

    Safetensors come before `.bin`, shards before one file.

    Args:
        names: the files of the folder.
        library: whose names they have, see `STEMS`.
        variant: None is the main variant, whose names have no such part.
        use_safetensors: True admits no `.bin`, False nothing else.
    """
    part = f".{variant}" if variant else ""
    for suffix in _SUFFIXES[use_safetensors]:
        stem = _stem(library, suffix)
        index = f"{stem}.{suffix}.index{part}.json"
        older_index = f"{stem}.{suffix}{part}.index.json"
        single = f"{stem}{part}.{suffix}"
        for name in (index, older_index, single):
            if name in names:
                return name
    return None


def _stem(library: str, suffix: str) -> str:
    return STEMS[library][-1 if suffix == "bin" else 0]


def find_main_weights(names: Collection[str]) -> str | None:
    """The file or index of a component whose library is not known, or None.

    Safetensors come before `.bin`, the main variant before any other.
    """
    for suffix, stems in MAIN_STEMS.items():
        for stem in stems:
            main = (f"{stem}.{suffix}.index.json", f"{stem}.{suffix}")
            others = sorted(name for name in names if name.startswith(f"{stem}."))
            indexes = [name for name in others if index_suffix(name) == suffix]
            files = [name for name in others if name.endswith(f".{suffix}")]
            for name in (*main, *indexes, *files):
                if name in names:
                    return name
    return None


def why_no_weights(
    names: Collection[str], library: str, variant: str | None, use_safetensors: bool | None
) -> str:
    """What to tell when `find_weights` found none."""
    part = f".{variant}" if variant else ""
    suffix = "bin" if use_safetensors is False else "safetensors"
    missing = f"there is no {_stem(library, suffix)}{part}.{suffix}"
    if find_weights(names, library, variant):
        return f"{missing}; the weights are in the other format, see use_safetensors="
    variants = find_variants(names, library)
    return f"{missing}, but there is variant={variants[0]!r}" if variants else missing


def find_variants(names: Collection[str], library: str) -> list[str | None]:
    """The variants that a folder has, None for the main one."""
    parts = {part for name in names for part in name.split(".")[1:-1]}
    variants = sorted(part for part in parts if not re.search(_SHARD, part))
    return [variant for variant in (None, *variants) if find_weights(names, library, variant)]


def sibling_files(names: Collection[str], library: str, variant: str | None) -> list[str]:
    """Every file of one variant's weights, in any format and form.

    They are stale when the variant is written anew.
    """
    part = rf"\.{re.escape(variant)}" if variant else ""
    stem = f"({'|'.join(STEMS[library])})"
    suffix = "(safetensors|bin)"
    pattern = re.compile(
        rf"{stem}{part}({_SHARD})?\.{suffix}|{stem}{_SHARD}{part}\.{suffix}"
        rf"|{stem}\.{suffix}(\.index{part}|{part}\.index)\.json"
    )
    return [name for name in names if pattern.fullmatch(name)]


# --- one file, shards and their index -------------------------------------------------------------


def weights_name(library: str, suffix: str, variant: str | None) -> str:
    """The name of a component's weights where one file holds them all."""
    part = f".{variant}" if variant else ""
    return f"{STEMS[library][0]}{part}.{suffix}"


def shard_name(filename: str, number: int, count: int) -> str:
    """The name of a shard of the weights of that name, numbered from 1."""
    base, _, suffix = filename.rpartition(".")
    return f"{base}-{number:05d}-of-{count:05d}.{suffix}"


def index_name(filename: str) -> str:
    """`model.fp16.safetensors` -> `model.safetensors.index.fp16.json`."""
    base, _, suffix = filename.rpartition(".")
    stem, dot, variant = base.partition(".")
    return f"{stem}.{suffix}.index{dot}{variant}.json"


def index_suffix(name: str) -> str | None:
    """`safetensors` or `bin` if a file is named as an index of such shards."""
    found = _INDEX.fullmatch(name)
    return found[1] if found else None


def is_shard(name: str) -> bool:
    """Whether a file is named as one of several shards."""
    return re.search(_SHARD, name) is not None


def write_index(folder: Path, filename: str, files: Mapping[str, str], nbytes: int) -> Path:
    """Write the index of the shards of the weights of that name.

    Args:
        folder: where the shards are.
        filename: what the weights would be named in one file.
        files: the name of a tensor -> that of its shard.
        nbytes: of all tensors.
    """
    path = folder / index_name(filename)
    write_json(path, {"metadata": {"total_size": nbytes}, "weight_map": dict(files)})
    return path


def read_index(content: Mapping[str, object], suffix: str) -> dict[str, str]:
    """The name of a tensor -> that of the shard that holds it, from the content of an index.

    Raises:
        ValueError: there is no such map, or a name is not that of a file beside the index with the
            suffix.
    """
    files = content.get("weight_map")
    if not isinstance(files, dict) or not files:
        raise ValueError("the index has no `weight_map` of tensor names to file names")
    for name in files.values():
        if not isinstance(name, str):
            raise ValueError("the index has no `weight_map` of tensor names to file names")
        plain = name.isprintable() and "/" not in name and "\\" not in name
        if not plain or not name.endswith(f".{suffix}"):
            raise ValueError(f"shard `{printable(name)}` is not a plain .{suffix} file name")
    return files
