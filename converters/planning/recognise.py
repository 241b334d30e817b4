"""Which part of which model a checkpoint is, by its keys and shapes, with the evidence for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...errors import ConversionError
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
        if not self.known:
            return ()
        return tuple(candidate.family.name for candidate in self.candidates)

    @property
    def nearest(self) -> str:
        """The part that it resembles most, and whose."""
        first = self.candidates[0]
        return f"{first.title} ({first.family.title})"

    def of_family(self, name: str) -> Candidate:
        """The candidate of one family."""
        return next(candidate for candidate in self.candidates if candidate.family.name == name)


def recognise(checkpoint: Checkpoint) -> Recognition:
    """The best-matching part, known or not; never raises for a stranger."""
    keys = set(checkpoint.tensors)
    scores = [(candidate.score(keys), candidate) for candidate in _possible(checkpoint)]
    best = max(score for score, _ in scores)
    winners = [candidate for score, candidate in scores if score == best]
    winners = [candidate for candidate in winners if _ranks_fit(checkpoint, candidate)] or winners
    expected = winners[0].links
    ignored = winners[0].table.ignored
    strange = [key for key in checkpoint.tensors if key not in expected]
    return Recognition(
        checkpoint=checkpoint,
        candidates=tuple(winners),
        score=best,
        evidence=_evidence(keys, winners, best),
        missing=tuple(key for key in expected if key not in keys),
        unexpected=tuple(key for key in strange if ignored(key) is None),
    )


def _possible(checkpoint: Checkpoint) -> Sequence[Candidate]:
    """The candidates of a layout; where keys tell, only those whose prefix is there.

    To expand a table takes time.
    """
    known = candidates(checkpoint.layout)
    begun = {
        beginning
        for beginning in {candidate.table.beginning for candidate in known}
        if any(key.startswith(beginning) for key in checkpoint.tensors)
    }
    return [candidate for candidate in known if candidate.table.beginning in begun] or known


def _ranks_fit(checkpoint: Checkpoint, candidate: Candidate) -> bool:
    """Whether every tensor has as many axes as the candidate's.

    Linear projections and 1x1 convolutions share names.
    """
    return all(
        len(tensor.shape) == len(candidate.shapes[key])
        for key, tensor in checkpoint.tensors.items()
        if key in candidate.shapes
    )


def _evidence(keys: set[str], winners: Sequence[Candidate], score: float) -> tuple[str, ...]:
    first = winners[0]
    common = len(keys & first.links.keys())
    facts = [
        f"{common} of the {len(first.links)} tensors of the {first.title} are there"
        f" ({score:.0%} match)"
    ]
    if len(winners) > 1 and score >= _KNOWN:
        titles = " and ".join(candidate.family.title for candidate in winners)
        facts.append(f"the same in {titles}: --family chooses")
    return tuple(facts)


def complete(recognition: Recognition) -> None:
    """Refuse a checkpoint that is no known part, or lacks or adds tensors.

    Raises:
        ConversionError: says what is missing or unexpected, and why if that is known.
    """
    flaw = _flaw(recognition)
    if flaw is not None:
        checkpoint = recognition.checkpoint
        root = f" ({checkpoint.root})" if checkpoint.root else ""
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
            f" {brief(tensors)}"
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
