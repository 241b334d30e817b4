"""Which part of which model a checkpoint is, by its keys and shapes, with the evidence for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace

from ...errors import ConversionError
from ...mappings.errors import MappingError
from ...mappings.families import NAMES as FAMILIES
from ...mappings.layouts import NAMES
from ...mappings.library import all_tables
from ...mappings.names import place_in
from ...mappings.table import Table
from ..checkpoint import Checkpoint
from .candidates import Candidate, candidates
from .keys import brief
from .structure import interpretations

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
        """Names of the families it may belong to, and is likest to."""
        if not self.known:
            return ()
        best = max(candidate.likeness for candidate in self.candidates)
        likest = (one for one in self.candidates if one.likeness == best)
        return tuple(candidate.family.name for candidate in likest)

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

    def may_be_of(self, families: Sequence[str]) -> bool:
        """Whether it may belong to one of some families, be it likest to another."""
        return any(candidate.family.name in families for candidate in self.candidates)

    def narrowed(self, family: str) -> Recognition:
        """The same as a part of one family alone."""
        candidates = (self.of_family(family),)
        found = _recognition(self.checkpoint, candidates, self.score, self.evidence)
        own = {tensor.name for tensor in self.checkpoint.tensors.values()}
        beside = {name: why for name, why in self.left_out.items() if name not in own}
        return replace(found, left_out={**found.left_out, **beside})

    def is_also(self, other: Recognition) -> bool:
        """Whether two checkpoints are the same part in some family."""
        common = set(self.families) & set(other.families)
        return any(self.of_family(name).part == other.of_family(name).part for name in common)


def recognise(checkpoint: Checkpoint) -> Recognition:
    """The best-matching part, known or not; never raises for a stranger."""
    possible = _possible(checkpoint)
    if checkpoint.is_strange:  # any of them is as near
        winners = _at_home(checkpoint, list(possible))
        return _recognition(checkpoint, winners, 0.0, _evidence(checkpoint, winners, 0.0))
    read = _read(checkpoint, possible)
    winners = _whole(checkpoint, read)
    best = 1.0
    if not winners:
        best, winners = _nearest(checkpoint, possible, read)
    return _recognition(checkpoint, winners, best, _evidence(checkpoint, winners, best))


def _recognition(
    checkpoint: Checkpoint, candidates: Sequence[Candidate], score: float, evidence: tuple[str, ...]
) -> Recognition:
    """What a checkpoint is, and what it lacks or adds by the first of the candidates."""
    first = candidates[0]
    named = first.named(checkpoint)
    ignored = first.ignored(checkpoint)
    prefix = first.table.prefix if score < _KNOWN else ""  # of a stranger the names are its own
    strange = [name for name in named if name not in first.links and name not in ignored]
    return Recognition(
        checkpoint=replace(checkpoint, layout=first.table.about["layout"]),
        candidates=tuple(candidates),
        score=score,
        evidence=evidence,
        missing=tuple(name for name in first.links if name not in named),
        unexpected=tuple(name.removeprefix(prefix) for name in strange),
        left_out={
            named[name].name: reason
            for name, reason in ignored.items()
            if first.reason_of(name) is None
        },
    )


def _read(checkpoint: Checkpoint, possible: Sequence[Candidate]) -> list[list[Candidate]]:
    """What names, shapes and configs say that the tensors are, as each possible table spells them.

    After a stock model whose table belongs where the tensors lie, all of whose tensors are there
    and no others, only such tables are asked as call it the same part in other families.
    """
    front = _front(checkpoint)
    tables = {candidate.table.name: candidate.table for candidate in possible}
    ordered = sorted(
        tables.values(), key=lambda table: (table.prefix != front, "read_only" in table.about)
    )
    found: list[list[Candidate]] = []
    stock: Candidate | None = None
    for table in ordered:
        if stock is not None and not _adds_families(table, stock):
            continue
        for interpretation in interpretations(table, checkpoint):
            found.append(interpretation)
            first = interpretation[0]
            exact = first.likeness == 1 and first.named(checkpoint).keys() == _expected(first)
            if exact and table.prefix == front:
                if stock is None:
                    found = [interpretation]
                stock = stock or first
                break
    return found


def _adds_families(table: Table, stock: Candidate) -> bool:
    """Whether a table knows the part of a candidate in a family that the candidate's does not."""
    if table.prefix != stock.table.prefix:
        return False
    others = set(table.about["families"]) - set(stock.table.about["families"])
    return any(table.of_family("part", family) == stock.part for family in others)


def _whole(checkpoint: Checkpoint, read: Sequence[list[Candidate]]) -> list[Candidate]:
    """The surest of what all tensors are there of.

    That is a stock model rather than another one, one that belongs where the tensors lie, and one
    that leaves none of them out; in families that it is not known in, what is the same part there:
    CLIP's text encoder has another class in SD 3 than in SDXL.
    """
    whole = [candidates for candidates in read if _is_whole(candidates[0], checkpoint)]
    stock = [candidates for candidates in whole if candidates[0].likeness == 1] or whole
    read_by: dict[str, list[Candidate]] = {}
    for ranked in stock:
        read_by.setdefault(ranked[0].table.name, ranked)
    found = [candidate for candidates in read_by.values() for candidate in candidates]
    home = _at_home(checkpoint, sorted(found, key=lambda candidate: -candidate.likeness))
    used = {table: len(candidates[0].links) for table, candidates in read_by.items()}
    most = max((used[candidate.table.name] for candidate in home), default=0)
    first = [one for one in home if used[one.table.name] == most]
    parts = {one.part for one in first}
    known = {one.family.name for one in first}
    others = [one for one in home if one.part in parts and one.family.name not in known]
    surest: dict[tuple[str, str], Candidate] = {}
    for one in (*first, *others):
        surest.setdefault((one.family.name, one.component.name), one)
    return sorted(surest.values(), key=_rank)


def _rank(candidate: Candidate) -> tuple[float, int]:
    """What sorts candidates: the likest first, then those of the preferred families."""
    return -candidate.likeness, FAMILIES.index(candidate.family.name)


def _is_whole(candidate: Candidate, checkpoint: Checkpoint) -> bool:
    expected = _expected(candidate)
    names = candidate.named(checkpoint).keys()
    if not expected or not expected <= names:
        return False
    return len(expected) + len(candidate.ignored(checkpoint)) == len(names)


def _expected(candidate: Candidate) -> Set[str]:
    """The source keys of a candidate; none if its config makes no sense."""
    try:
        return candidate.links.keys()
    except MappingError:
        return set()


def _nearest(
    checkpoint: Checkpoint, possible: Sequence[Candidate], read: Sequence[list[Candidate]]
) -> tuple[float, list[Candidate]]:
    """What a checkpoint resembles most, a stock model first, and how much."""
    scores = [(candidate.score(checkpoint), candidate) for candidate in possible]
    best = max(score for score, _ in scores)
    own = [(one[0].score(checkpoint), one) for one in read if _expected(one[0])]
    score, candidates = max(own, key=lambda pair: pair[0], default=(0.0, []))
    if score > best:
        return score, candidates
    winners = [candidate for score, candidate in scores if score == best]
    winners = [candidate for candidate in winners if _ranks_fit(checkpoint, candidate)] or winners
    return best, _at_home(checkpoint, winners)


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

    They are of families that have a part there, and of them those whose table has it there; in a
    folder of a repository those of the component that it names.
    """
    front = _front(checkpoint)
    tables = [table for table in all_tables() if front and table.prefix == front]
    families_there = {family for table in tables for family in table.about["families"]}
    there = [one for one in winners if one.family.name in families_there] or winners
    same = [one for one in there if one.table.prefix == front]
    plain = [one for one in there if not one.table.prefix]
    found = same or plain or there
    return [one for one in found if one.component.name == checkpoint.root] or found


def _front(checkpoint: Checkpoint) -> str:
    """The prefix of the tables of what belongs where a checkpoint lies in its file."""
    place = place_in(f"{checkpoint.root}.")
    return f"{place}." if place else ""


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
    if first.likeness < 1:
        facts.append(_likeness(winners))
    elif len(winners) > 1 and score >= _KNOWN:
        titles = " and ".join(candidate.family.title for candidate in winners)
        facts.append(f"the same in {titles}: --family chooses")
    if checkpoint.taken_off is not None:
        facts.append(checkpoint.taken_off)
    return tuple(facts)


def _likeness(ranked: Sequence[Candidate]) -> str:
    """How like a model is to the stock ones of its families, and where it is not."""
    alike = " and ".join(f"{one.likeness:.0%} {one.family.title}" for one in ranked)
    return (
        f"in a depth of its own; by what its tensors tell {alike}; not as the stock model in"
        f" {brief(ranked[0].unlike_stock, 1)}"
    )


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
