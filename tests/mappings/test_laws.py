"""The laws of every mapping table, for every family it serves, at full size (names and shapes
only)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from weightport.mappings.errors import MappingError
from weightport.mappings.families import families, halves
from weightport.mappings.library import all_tables
from weightport.mappings.rows import Row
from weightport.mappings.table import Link, Table

Shapes = Mapping[str, tuple[int, ...]]

SERVED = [(table, family) for table in all_tables() for family in table.about["families"]]
IDS = [f"{table.name}-{family}" for table, family in SERVED]


def _links(table: Table, family: str) -> list[Link]:
    component = families()[family].filled_by(table)
    return table.links(component.manifest(), component.config)


def _target_shapes(table: Table, family: str) -> Shapes:
    return families()[family].filled_by(table).manifest()


def _source_shapes(links: list[Link], targets: Shapes) -> Shapes:
    return {source: link.source_shape(targets) for link in links for source in link.sources}


@pytest.mark.parametrize(("table", "family"), SERVED, ids=IDS)
def test_every_target_is_explained_exactly_once(table: Table, family: str) -> None:
    explained = [target for link in _links(table, family) for target in link.targets]
    assert len(explained) == len(set(explained))
    assert set(explained) == {key for key in _target_shapes(table, family) if table.covers(key)}


@pytest.mark.parametrize(
    ("layout", "family"),
    [("kerascv", "sd1"), ("kerascv", "sd2")]
    + [("kerashub", family) for family in ("sd3", "sd35_medium", "sd35_large")]
    + [(layout, family) for layout in ("diffusers", "ldm") for family in families()],
)
def test_the_tables_of_a_layout_fill_every_component(layout: str, family: str) -> None:
    """A VAE takes two tables of Keras, which together explain each of its tensors once."""
    in_halves = layout in ("kerascv", "kerashub")
    base = [
        t for t in all_tables() if t.about["layout"] == layout and family in t.about["families"]
    ]
    base = [t for t in base if not t.about.get("read_only")]  # other spellings of the same parts
    explained: dict[tuple[str, str], list[str]] = {}
    for table in base:
        part = table.of_family("part", family)
        if part in halves() and not in_halves:
            continue  # beside a table of the whole
        given = [key for link in _links(table, family) for key in link.targets]
        filled = families()[family].filled_by(table)
        explained.setdefault((filled.name, filled.class_name), []).extend([*given, *table.make])
    for component in families()[family].components.values():
        if layout == "kerascv" and component.pipelines:  # KerasCV has no ControlNet
            continue
        if layout == "kerashub" and component.name in families()[family].optional:
            continue  # no preset of keras-hub has a T5
        mine = explained[component.name, component.class_name]
        assert sorted(mine) == sorted(component.manifest())
        for other in component.instead.values() if not in_halves else ():
            known = explained.get((other.name, other.class_name))
            if known is not None:  # the upscaler has none
                assert sorted(known) == sorted(other.manifest())


@pytest.mark.parametrize(("table", "family"), SERVED, ids=IDS)
def test_inverse_after_forward_is_the_identity(table: Table, family: str) -> None:
    """Bit for bit, on shapes shrunk to at most 42 a side, which two, three and seven divide (a
    kernel's ranks and places stay)."""
    rng = np.random.default_rng(0)
    for link in _links(table, family):
        shape = _source_shapes([link], _target_shapes(table, family))[link.sources[0]]
        source = rng.standard_normal([min(size, 42) for size in shape]).astype(np.float32)
        forward = link.op.apply([source], len(link.targets)) if link.op else [source]
        back = link.inverse
        restored = back.op.apply(forward, len(back.targets)) if back.op else forward
        assert restored[0].tobytes() == source.tobytes()
        assert back.inverse == link


UNUSUAL: dict[str, list[dict[str, Any]]] = {  # what no stock model has
    "UNet2DConditionModel": [
        {"time_cond_proj_dim": 256, "encoder_hid_dim": 64},
        {"up_block_types": ["CrossAttnUpBlock2D"] * 3 + ["UpBlock2D"], "layers_per_block": 1},
    ],
    "AutoencoderKL": [
        {
            "down_block_types": ["AttnDownEncoderBlock2D"] * 4,
            "up_block_types": ["AttnUpDecoderBlock2D"] * 4,
        }
    ],
}


def _unusual_links(table: Table) -> Iterator[Link]:
    if table.about.get("fixed"):
        return
    for family in table.about["families"]:
        component = families()[family].filled_by(table)
        for changes in UNUSUAL.get(component.class_name, []):
            config = component.config | changes
            if len(config["block_out_channels"]) == 4:
                names = component.model.names(config)
                yield from table.links(component.model.tensors(config), names)


def test_every_row_is_used_by_some_model() -> None:
    unused = {
        (table.name, str(row))
        for table in all_tables()
        for rows in table.sections.values()
        for row in rows
    }
    spellings: dict[str, Any] = {}
    for table, family in SERVED:
        for link in (*_links(table, family), *_unusual_links(table)):
            for row in link.row.split(" / "):
                unused.discard((table.name, row))
                spellings.setdefault(row, table.name)
    # a row that a table only inherits is used where it was written
    assert not {(name, row) for name, row in unused if row not in spellings}


# --- mutations: two rows of a section with their sources swapped ----------------------------------


def _mutants(table: Table) -> Iterator[tuple[Row, Row, Table]]:
    for section, rows in table.sections.items():
        for a, b in itertools.combinations(rows, 2):
            if (a.right, a.then) == (b.right, b.then):
                continue
            swapped = {
                a: replace(a, right=b.right, then=b.then),
                b: replace(b, right=a.right, then=a.then),
            }
            changed = tuple(swapped.get(row, row) for row in rows)
            mutant = replace(table)
            vars(mutant)["sections"] = {**table.sections, section: changed}
            yield a, b, mutant


def _is_caught(mutant: Table, family: str, touched: list[Link], targets: Shapes) -> bool:
    """Whether names and shapes alone show that a table does not fit a checkpoint, or the swap
    changes nothing.

    Args:
        touched: the table's own links by the rows that are swapped; the others are the mutant's.
    """
    component = families()[family].filled_by(mutant)
    sources = _source_shapes(touched, targets)
    try:
        links = mutant.links(
            [target for link in touched for target in link.targets], component.config
        )
        if [link._replace(row="") for link in links] == [link._replace(row="") for link in touched]:
            return True
        if {source for link in links for source in link.sources} != sources.keys():
            return True
        for link in links:
            source = sources[link.sources[0]]
            shape = link.op.shapes([source], len(link.targets))[0] if link.op else source
            if shape != targets[link.targets[0]]:
                return True
    except (MappingError, KeyError):
        return True
    return False


# What names and shapes cannot see, because both rows fit either tensor; test_parity.py sees these
# in the numbers, and test_transformers.py beside diffusers' converter.
_ATTENTION = {
    frozenset(pair) for pair in itertools.combinations(("to_q", "to_k", "to_v", "to_out.0"), 2)
}
_PROJECTED = {
    frozenset({f"self_attn.{a}", f"self_attn.{b}"})
    for a, b in itertools.combinations(("q_proj", "k_proj", "v_proj"), 2)
}
_NORMS = {frozenset({"layer_norm1", "layer_norm2"})}
_EMBEDDINGS = {frozenset({"time_embedding.linear_2", "add_embedding.linear_2"})}
_PROJECTIONS = {frozenset({"proj_in", "proj_out"})}
_JOINT_NORMS = ("attn.norm_q", "attn.norm_k", "attn.norm_added_q", "attn.norm_added_k")
_TWICE = {frozenset(pair) for pair in itertools.combinations(_JOINT_NORMS, 2)}
_MMDIT = _TWICE | {frozenset({"attn2.norm_q", "attn2.norm_k"})}
_IN_TIME = "time_text_embed.timestep_embedder"
_IN_GUIDANCE = "time_text_embed.guidance_embedder"
_IN_TEXT = "time_text_embed.text_embedder"
_TWO_STREAMS = {  # image and text have the same modules there
    *(frozenset(f"{norm}.weight" for norm in pair) for pair in _TWICE),
    frozenset({"attn.to_out.0", "attn.to_add_out"}),
}
_FED_FORWARD = {
    frozenset({"ff.net.0.proj", "ff_context.net.0.proj"}),
    frozenset({"ff.net.2", "ff_context.net.2"}),
}
_FLUX = {
    *_TWO_STREAMS,
    *_FED_FORWARD,
    frozenset({"norm1.linear", "norm1_context.linear"}),
    frozenset({f"{_IN_TIME}.linear_1", f"{_IN_GUIDANCE}.linear_1"}),
    frozenset({f"{_IN_TIME}.linear_2", f"{_IN_GUIDANCE}.linear_2"}),
    frozenset({f"{_IN_TIME}.linear_2", f"{_IN_TEXT}.linear_2"}),
    frozenset({f"{_IN_GUIDANCE}.linear_2", f"{_IN_TEXT}.linear_2"}),
}
_IN_GUIDANCE_LAYER = "distilled_guidance_layer.layers.{i}"
_CHROMA = {
    *_TWO_STREAMS,
    *_FED_FORWARD,
    frozenset({f"{_IN_GUIDANCE_LAYER}.linear_1", f"{_IN_GUIDANCE_LAYER}.linear_2"}),
}
_EMBEDDED = "time_guidance_embed"
_FLUX2 = {
    *_TWO_STREAMS,
    frozenset({"double_stream_modulation_img.linear", "double_stream_modulation_txt.linear"}),
    frozenset({"ff.linear_in", "ff_context.linear_in"}),
    frozenset({"ff.linear_out", "ff_context.linear_out"}),
    *(
        frozenset(f"{_EMBEDDED}.{one}_embedder.linear_{layer}" for one in ("timestep", "guidance"))
        for layer in (1, 2)
    ),
}
_ZIMAGE = {frozenset({"norm_q", "norm_k"})}
INVISIBLE = {
    "kerascv_decoder": _ATTENTION,
    "kerascv_image_encoder": _ATTENTION,
    "kerascv_unet": _PROJECTIONS,
    "kerascv_unet_v2": _PROJECTIONS,
    "kerashub_decoder": _ATTENTION,
    "kerashub_image_encoder": _ATTENTION,
    "kerashub_text_encoder": _PROJECTED,
    "kerashub_text_encoder_2": _PROJECTED,
    "kerashub_transformer": _MMDIT,
    "ldm_chroma": _CHROMA,
    "ldm_flux": _FLUX,
    "ldm_flux2": _FLUX2,
    "ldm_mmdit": _MMDIT,
    "ldm_unet": _EMBEDDINGS,
    "ldm_controlnet": _EMBEDDINGS,
    "ldm_vae": _ATTENTION,
    "ldm_vae_asymmetric": _ATTENTION,
    "ldm_zimage": _ZIMAGE,
    "openclip_clip_l": _NORMS,
    "openclip_sd2": _NORMS,
    "openclip_sdxl": _NORMS,
    "openclip_refiner": _NORMS,
}


def _invisible(table: Table, family: str) -> set[frozenset[str]]:
    targets = _target_shapes(table, family)
    by_row: dict[str, list[int]] = {}
    original = _links(table, family)
    for number, link in enumerate(original):
        for row in link.row.split(" / "):
            by_row.setdefault(row, []).append(number)

    def touched(a: Row, b: Row) -> list[Link]:
        numbers = {*by_row.get(str(a), ()), *by_row.get(str(b), ())}
        return [original[number] for number in sorted(numbers)]

    return {
        frozenset((a.left, b.left))
        for a, b, mutant in _mutants(table)
        if not _is_caught(mutant, family, touched(a, b), targets)
    }


@pytest.mark.parametrize(
    "table", [t for t in all_tables() if t.about["layout"] != "diffusers"], ids=lambda t: t.name
)
def test_swapped_rows_are_caught_by_names_and_shapes_or_listed(table: Table) -> None:
    found = set().union(*(_invisible(table, family) for family in table.about["families"]))
    assert found == INVISIBLE.get(table.name, set())
