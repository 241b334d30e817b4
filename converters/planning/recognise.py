"""Which part of which model a checkpoint is, by its keys and shapes, with the evidence for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ...errors import ConversionError
from ...mappings.layouts import NAMES
from ...mappings.library import all_tables
from ...mappings.names import place_in
from ..checkpoint import Checkpoint
from .candidates import Candidate, candidates
from .keys import brief

# share of keys in common from which a checkpoint is a damaged such part rather than something else
_KNOWN = 0.5


@dataclass(frozen=True)
class Recognition:
    """What a checkpoint was recognised as.

    Attributes:
        candidates: the families it may belong to; a VAE serves several.
        evidence: why, one sentence a fact.
        missing: source keys that the part needs and the checkpoint lacks.
        unexpected: keys of the checkpoint that the part does not have.
        left_out: names of tensors at the part that it does without -> the reason.
    """

    checkpoint: Checkpoint
    candidates: tuple[Candidate, ...]
    score: float
    evidence: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    left_out: Mapping[str, str]

    @property
    def root(self) -> str:
        """Where in its file the part lies, or lies in whole checkpoints."""
        return self.checkpoint.root or self.candidates[0].table.prefix.rstrip(".")

    @property
    def skipped(self) -> dict[str, str]:
        """Names of what was left out of the file and of the part -> the reason."""
        return {**self.checkpoint.skipped, **self.left_out}

    @property
    def known(self) -> bool:
        """Whether the checkpoint is such a part at all (perhaps a damaged one)."""
        return self.score >= _KNOWN

    @property
    def part(self) -> str:
        """The part's name, or `unknown`."""
        return self.candidates[0].part if self.known else "unknown"

    @property
    def is_text_encoder(self) -> bool:
        """Whether it is a part that a tokenizer of its family serves."""
        first = self.candidates[0]
        return self.known and first.component.name in first.family.text_encoders

    @property
    def families(self) -> tuple[str, ...]:
        """Names of the families it may belong to."""
        if not self.known:
            return ()
        return tuple(candidate.family.name for candidate in self.candidates)

    @property
    def nearest(self) -> str:
        """The part that it resembles most, and whose."""
        first = self.candidates[0]
        return f"{first.title} ({first.family.title})"

    @property
    def flaw(self) -> str | None:
        """Why it is no whole part, if it is none."""
        return _flaw(self)

    def of_family(self, name: str) -> Candidate:
        """The candidate of one family."""
        return next(candidate for candidate in self.candidates if candidate.family.name == name)


def recognise(checkpoint: Checkpoint) -> Recognition:
    """The best-matching part, known or not; never raises for a stranger."""
    scores = [(candidate.score(checkpoint), candidate) for candidate in _possible(checkpoint)]
    best = max(score for score, _ in scores)
    winners = [candidate for score, candidate in scores if score == best]
    winners = [candidate for candidate in winners if _ranks_fit(checkpoint, candidate)] or winners
    winners = _at_home(checkpoint, winners)
    first = winners[0]
    named = first.named(checkpoint)
    ignored = first.ignored(checkpoint)
    prefix = first.table.prefix if best < _KNOWN else ""  # of a stranger the names are its own
    strange = [name for name in named if name not in first.links and name not in ignored]
    return Recognition(
        checkpoint=replace(checkpoint, layout=first.table.about["layout"]),
        candidates=tuple(winners),
        score=best,
        evidence=_evidence(checkpoint, winners, best),
        missing=tuple(name for name in first.links if name not in named),
        unexpected=tuple(name.removeprefix(prefix) for name in strange),
        left_out={
            named[name].name: reason
            for name, reason in ignored.items()
            if first.table.ignored(name) is None
        },
    )


def _possible(checkpoint: Checkpoint) -> Sequence[Candidate]:
    """The candidates of a layout; where the naming is known, those whose tables have it.

    To expand a table takes time.
    """
    naming = checkpoint.naming
    if naming:
        return [
            candidate
            for layout in NAMES
            for candidate in candidates(layout)
            if candidate.table.about.get("naming") == naming
        ]
    return candidates(checkpoint.layout)


def _at_home(checkpoint: Checkpoint, winners: list[Candidate]) -> list[Candidate]:
    """Of candidates that fit alike those that belong where the checkpoint lies in its file.

    They are of families that have a part there, and of them those whose table has it there.
    """
    place = place_in(f"{checkpoint.root}.")
    front = f"{place}." if place else ""
    tables = [table for table in all_tables() if place and table.prefix == front]
    families_there = {family for table in tables for family in table.about["families"]}
    there = [one for one in winners if one.family.name in families_there] or winners
    same = [one for one in there if one.table.prefix == front]
    plain = [one for one in there if not one.table.prefix]
    return same or plain or there


def _ranks_fit(checkpoint: Checkpoint, candidate: Candidate) -> bool:
    """Whether every tensor has as many axes as the candidate's.

    Linear projections and 1x1 convolutions share names.
    """
    named = candidate.named(checkpoint)
    return all(
        len(named[name].shape) == len(shape)
        for name, shape in candidate.shapes.items()
        if name in named
    )


def _evidence(
    checkpoint: Checkpoint, winners: Sequence[Candidate], score: float
) -> tuple[str, ...]:
    first = winners[0]
    common = len(first.named(checkpoint).keys() & first.links.keys())
    facts = [
        f"{common} of the {len(first.links)} tensors of the {first.title} are there"
        f" ({score:.0%} match)"
    ]
    if len(winners) > 1 and score >= _KNOWN:
        titles = " and ".join(candidate.family.title for candidate in winners)
        facts.append(f"the same in {titles}: --family chooses")
    if checkpoint.taken_off is not None:
        facts.append(checkpoint.taken_off)
    return tuple(facts)


def complete(recognition: Recognition) -> None:
    """Refuse a checkpoint that is no known part, or lacks or adds tensors.

    Raises:
        ConversionError: says what is missing or unexpected, and why if that is known.
    """
    flaw = recognition.flaw
    if flaw is not None:
        checkpoint = recognition.checkpoint
        root = f" ({recognition.root})" if recognition.known and recognition.root else ""
        raise ConversionError(f"{checkpoint.path}{root}: {flaw}")


def _flaw(recognition: Recognition) -> str | None:
    """Why a checkpoint is no whole part, if it is none."""
    title = recognition.candidates[0].title
    tensors = recognition.checkpoint.tensors
    missing = recognition.missing
    unexpected = recognition.unexpected
    if recognition.score == 0 and tensors:
        return (
            f"not recognised; {len(tensors)} tensors belong to no part of a known model:"
            f" {brief(tensor.name for tensor in tensors.values())}"
        )
    if not recognition.known:
        return (
            f"not recognised; nearest is the {recognition.nearest}, of whose keys"
            f" {recognition.score:.0%} agree; missing: {brief(missing)}"
        )
    loss = recognition.checkpoint.loss
    if missing and loss is not None and all(key.startswith(loss.front) for key in missing):
        return loss.reason.format(count=len(missing))
    if missing:
        return f"{len(missing)} tensors of the {title} are missing: {brief(missing)}"
    if unexpected:
        return f"{len(unexpected)} tensors are not part of the {title}: {brief(unexpected)}"
    return None
