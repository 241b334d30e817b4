"""Which part of which model a checkpoint is, decided from its keys and shapes, with the evidence
for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property

from ...errors import ConversionError
from ...mappings.families import Component, Family, families
from ...mappings.library import all_tables
from ...mappings.table import Link, Table
from ..checkpoint import Checkpoint
from ..layouts.kerascv_layers import model_layers
from .keys import brief

# share of keys in common from which a checkpoint is a damaged such part rather than something else
_KNOWN = 0.5


@dataclass(frozen=True)
class Candidate:
    """A part that a checkpoint may be: one table, expanded over one family's keys."""

    table: Table
    family: Family

    @cached_property
    def links(self) -> Mapping[str, Link]:
        """Source key -> the link it takes part in."""
        links = self.table.links(self.component.manifest(), self.component.config)
        return {source: link for link in links for source in link.sources}

    @property
    def part(self) -> str:
        """`text_encoder`, `unet`, `vae`, or a half of a VAE: `decoder`, `image_encoder`."""
        return str(self.table.about["part"])

    @property
    def component(self) -> Component:
        """The component of the repo that the part fills."""
        return self.family.components[str(self.table.about["component"])]


@dataclass(frozen=True)
class Recognition:
    """What a checkpoint was recognised as.

    Attributes:
        candidates: the families it may belong to; a VAE serves several.
        evidence: why, one sentence a fact.
        missing: source keys that the part needs and the checkpoint lacks.
        unexpected: keys of the checkpoint that the part does not have.
    """

    checkpoint: Checkpoint
    candidates: tuple[Candidate, ...]
    score: float
    evidence: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]

    @property
    def known(self) -> bool:
        """Whether the checkpoint is such a part at all (perhaps a damaged one)."""
        return self.score >= _KNOWN

    @property
    def part(self) -> str:
        """The part's name, or `unknown`."""
        return self.candidates[0].part if self.known else "unknown"

    @property
    def families(self) -> tuple[str, ...]:
        """Names of the families it may belong to."""
        return tuple(candidate.family.name for candidate in self.candidates) if self.known else ()

    @property
    def nearest(self) -> str:
        """The part that it resembles most, and whose."""
        first = self.candidates[0]
        return f"{first.table.about['title']} ({first.family.title})"

    def of_family(self, name: str) -> Candidate:
        """The candidate of one family."""
        return next(candidate for candidate in self.candidates if candidate.family.name == name)


@cache
def candidates(layout: str) -> tuple[Candidate, ...]:
    """Every part that a layout's tables can read, family by family."""
    return tuple(
        Candidate(table, family)
        for table in all_tables()
        if table.about["layout"] == layout
        for family in families().values()
        if family.name in table.about["families"]
    )


def recognise(checkpoint: Checkpoint) -> Recognition:
    """The best-matching part, known or not; never raises for a stranger."""
    if "variables.0" in checkpoint.tensors:
        checkpoint = _ordered(checkpoint)
    keys = set(checkpoint.tensors)
    possible = candidates(
        checkpoint.layout
    )  # expanding a table takes time: only those whose prefix is there
    possible = (
        tuple(c for c in possible if any(key.startswith(c.table.beginning) for key in keys))
        or possible
    )
    scores = [(_score(keys, candidate), candidate) for candidate in possible]
    best = max(score for score, _ in scores)
    winners = [candidate for score, candidate in scores if score == best]
    winners = [candidate for candidate in winners if _ranks_fit(checkpoint, candidate)] or winners
    expected = winners[0].links
    ignored = winners[0].table.ignored
    return Recognition(
        checkpoint=checkpoint,
        candidates=tuple(winners),
        score=best,
        evidence=_evidence(keys, winners, best),
        missing=tuple(key for key in expected if key not in keys),
        unexpected=tuple(
            key for key in checkpoint.tensors if key not in expected and ignored(key) is None
        ),
    )


def _ranks_fit(checkpoint: Checkpoint, candidate: Candidate) -> bool:
    """Whether every tensor has as many axes as the candidate's: linear projections and 1x1
    convolutions share names."""
    shapes = candidate.component.manifest()
    return all(
        len(tensor.shape) == len(_source_shape(candidate.links[key], shapes))
        for key, tensor in checkpoint.tensors.items()
        if key in candidate.links
    )


def _score(keys: set[str], candidate: Candidate) -> float:
    expected = candidate.links.keys()
    present = {key for key in keys if key in expected or candidate.table.ignored(key) is None}
    return len(present & expected) / max(len(present | expected), 1)


def _evidence(keys: set[str], winners: Sequence[Candidate], score: float) -> tuple[str, ...]:
    first = winners[0]
    common = len(keys & first.links.keys())
    facts = [
        f"{common} of the {len(first.links)} tensors of the {first.table.about['title']} are there"
        f" ({score:.0%} match)"
    ]
    if len(winners) > 1 and score >= _KNOWN:
        titles = " and ".join(candidate.family.title for candidate in winners)
        facts.append(f"the same in {titles}: --family chooses")
    return tuple(facts)


def _ordered(checkpoint: Checkpoint) -> Checkpoint:
    """Name the tensors of a Keras 3 export: they lie in the order of `model.weights` of the part
    whose shapes fit."""
    tensors = list(checkpoint.tensors.values())
    for candidate in candidates(checkpoint.layout):
        order = [key for _, keys in model_layers(candidate.part, candidate.links) for key in keys]
        if len(order) != len(tensors):
            continue
        shapes = candidate.component.manifest()
        ranks = [len(_source_shape(candidate.links[key], shapes)) for key in order]
        if ranks == [len(tensor.shape) for tensor in tensors]:
            return replace(checkpoint, tensors=dict(zip(order, tensors, strict=True)))
    return checkpoint


def _source_shape(link: Link, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    shape = shapes[link.targets[0]]
    return link.op.inverse.shapes([shape] * len(link.targets))[0] if link.op else shape


def complete(recognition: Recognition) -> None:
    """Refuse a checkpoint that is no known part, or lacks or adds tensors.

    Raises:
        ConversionError: says what is missing or unexpected, and why if that is known.
    """
    where = _where(recognition.checkpoint)
    nearest = recognition.candidates[0].table.about["title"]
    if recognition.score == 0 and (keys := recognition.checkpoint.tensors):
        raise ConversionError(
            f"{where}: not recognised; {len(keys)} tensors belong to no part of a known model:"
            f" {brief(keys)}"
        )
    if not recognition.known:
        raise ConversionError(
            f"{where}: not recognised; nearest is the {recognition.nearest}, of whose keys "
            f"{recognition.score:.0%} agree; missing: {brief(recognition.missing)}"
        )
    if recognition.missing and _lost_lists(recognition):
        raise ConversionError(
            f"{where}: saved by Keras 3 `tf.train.Checkpoint`, which loses layers kept in Python"
            f" lists: {len(recognition.missing)} weights of the ResBlocks are not in the file; save"
            " again with `model.save_weights('name.weights.h5')`"
        )
    if recognition.missing:
        raise ConversionError(
            f"{where}: {len(recognition.missing)} tensors of the {nearest} are missing:"
            f" {brief(recognition.missing)}"
        )
    if recognition.unexpected:
        extra = recognition.unexpected
        raise ConversionError(
            f"{where}: {len(extra)} tensors are not part of the {nearest}: {brief(extra)}"
        )


def _lost_lists(recognition: Recognition) -> bool:
    graph = recognition.checkpoint.format in ("TensorFlow checkpoint", "SavedModel")
    return graph and all(key.startswith("res_block.") for key in recognition.missing)


def _where(checkpoint: Checkpoint) -> str:
    return f"{checkpoint.path}{f' ({checkpoint.root})' if checkpoint.root else ''}"
