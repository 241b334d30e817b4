"""Which files of a folder hold the weights of a component: precedence, variants and shards, from
their names alone.

    X.safetensors                               the weights of stem X
    X.fp16.safetensors                          their variant fp16
    X.safetensors.index.json                    the index of their shards X-00001-of-00002.safetensors
    X.safetensors.index.fp16.json               of their variant's shards X.fp16-00001-of-00002.safetensors
    X.safetensors.fp16.index.json               older: X-00001-of-00002.fp16.safetensors

and the same with `.bin`. The stem is `diffusion_pytorch_model` in diffusers; in transformers it is
`model` for safetensors and `pytorch_model` for `.bin`.
"""

from __future__ import annotations

import re
from collections.abc import Collection

STEMS = {
    "diffusers": ("diffusion_pytorch_model",),
    "transformers": ("model", "pytorch_model"),
    "stable_diffusion": ("model", "pytorch_model"),  # the safety checker
}
_SHARD = r"-\d{5}-of-\d{5}"


def find_weights(
    names: Collection[str],
    library: str,
    variant: str | None = None,
    use_safetensors: bool | None = None,
) -> str | None:
    """The file with the weights, or their index (`.json`), or None: safetensors before `.bin`,
    shards before one file.

    Args:
        names: the files of the folder.
        library: whose names they have, see `STEMS`.
        variant: None is the main variant, whose names have no such part.
        use_safetensors: True admits no `.bin`, False nothing else.
    """
    formats = {None: ("safetensors", "bin"), True: ("safetensors",), False: ("bin",)}[
        use_safetensors
    ]
    part = f".{variant}" if variant else ""
    for suffix in formats:
        stem = STEMS[library][-1 if suffix == "bin" else 0]
        indexes = f"{stem}.{suffix}.index{part}.json", f"{stem}.{suffix}{part}.index.json"
        for name in (*indexes, f"{stem}{part}.{suffix}"):
            if name in names:
                return name
    return None


def why_no_weights(
    names: Collection[str], library: str, variant: str | None, use_safetensors: bool | None
) -> str:
    """What to tell when `find_weights` found none."""
    part = f".{variant}" if variant else ""
    suffix = "bin" if use_safetensors is False else "safetensors"
    missing = f"there is no {STEMS[library][-1 if suffix == 'bin' else 0]}{part}.{suffix}"
    if find_weights(names, library, variant):
        return f"{missing}; the weights are in the other format, see use_safetensors="
    variants = find_variants(names, library)
    return f"{missing}, but there is variant={variants[0]!r}" if variants else missing


def find_variants(names: Collection[str], library: str) -> list[str | None]:
    """The variants that a folder has, None for the main one."""
    parts = {
        part for name in names for part in name.split(".")[1:-1] if not re.search(_SHARD, part)
    }
    return [variant for variant in (None, *sorted(parts)) if find_weights(names, library, variant)]


def sibling_files(names: Collection[str], library: str, variant: str | None) -> list[str]:
    """Every file of one variant's weights, in any format and form: what is stale when the variant
    is written anew."""
    part = rf"\.{re.escape(variant)}" if variant else ""
    stem, suffix = f"({'|'.join(STEMS[library])})", "(safetensors|bin)"
    pattern = re.compile(
        rf"{stem}{part}({_SHARD})?\.{suffix}|{stem}{_SHARD}{part}\.{suffix}"
        rf"|{stem}\.{suffix}(\.index{part}|{part}\.index)\.json"
    )
    return [name for name in names if pattern.fullmatch(name)]


def shard_names(index: dict[str, object], where: str) -> list[str]:
    """The files that an index names, sorted.

    Raises:
        ValueError: there is no list of them, or a name is not that of a file beside the index.
    """
    weight_map = index.get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(v, str) for v in weight_map.values())
    ):
        raise ValueError(f"{where}: the index has no `weight_map` of tensor names to file names")
    names = sorted(set(weight_map.values()))
    for name in names:
        if not name or not name.isprintable() or "/" in name or "\\" in name or name in (".", ".."):
            raise ValueError(f"{where}: the shard {name!r} is not a plain file name")
    return names
