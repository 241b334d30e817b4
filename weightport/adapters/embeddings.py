"""Textual inversion: names of tensors -> words, each with its vectors.

Gal et al. 2022, https://arxiv.org/abs/2208.01618. What files call them is in
`mappings/facts/embeddings.toml`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Generic, NamedTuple, TypeVar

from ..errors import printable
from ..mappings.facts import facts
from ..mappings.families import families
from .marks import BUNDLED
from .shapes import Shaped

T = TypeVar("T", bound=Shaped)
ANY = ""
"""The role of vectors whose width tells which text encoder they are for."""


@dataclass(frozen=True)
class Embedding(Generic[T]):
    """A word and its vectors.

    Attributes:
        token: the word; empty where the file does not say.
        vectors: role -> (n, channels), or (channels,) for one vector. A role is a text encoder, or
            `ANY`; with an ending, the vectors take the place of what that answers.
    """

    token: str
    vectors: Mapping[str, T]

    @property
    def outputs(self) -> tuple[str, ...]:
        """Roles whose vectors take the place of what a text encoder answers."""
        return tuple(role for role in self.vectors if role.endswith(_output_ending()))

    @property
    def shares(self) -> tuple[Share[T], ...]:
        """What each text encoder gets."""
        ending = _output_ending()
        roles = dict.fromkeys(role.removesuffix(ending) for role in self.vectors)
        return tuple(
            Share(role, self.vectors.get(role), self.vectors.get(f"{role}{ending}"))
            for role in roles
        )

    def of_width(self, channels: int) -> T | None:
        """The vectors for a text encoder of so many channels, if there are any."""
        inputs = (one for role, one in self.vectors.items() if role not in self.outputs)
        return next((one for one in inputs if one.shape[-1] == channels), None)

    def for_encoders(self) -> dict[str, T]:
        """Encoder -> vectors; those that their width tells are told."""
        widths = facts("embeddings")["encoders"]
        named = {width: role for role, width in widths.items()}
        return {role or named.get(one.shape[-1], ANY): one for role, one in self.vectors.items()}


@dataclass(frozen=True)
class Share(Generic[T]):
    """The vectors of a word for one text encoder.

    Attributes:
        role: the text encoder, or `ANY`.
        inputs: for its table of tokens.
        outputs: in place of what it answers.
    """

    role: str
    inputs: T | None
    outputs: T | None

    @property
    def vectors(self) -> T:
        """Those that say how many tokens the word has."""
        found = self.inputs if self.outputs is None else self.outputs
        assert found is not None
        return found


@cache
def _output_ending() -> str:
    ending: str = facts("embeddings")["outputs"]["ending"]
    return ending


def read_embeddings(tensors: Mapping[str, T], token: str = "") -> list[Embedding[T]]:
    """The words of a file, in its order.

    Args:
        token: that of vectors whose names do not say one.

    Raises:
        ValueError: tensors are no vectors, or a word has two of a kind.
    """
    found: dict[str, dict[str, T]] = {}
    beside = tuple(facts("embeddings")["beside"]["names"])
    for name, tensor in tensors.items():
        place = _place(name)
        if place.name.startswith(beside):
            continue
        shape = tuple(tensor.shape)
        if len(shape) not in (1, 2) or 0 in shape:
            raise ValueError(f"`{printable(name)}` has shape {list(shape)}, and is no vectors")
        vectors = found.setdefault(place.token or token, {})
        if place.role in vectors:
            raise ValueError(
                f"`{printable(name)}` is a second set of vectors for"
                f" {printable(place.token or token) or 'a word without a token'}"
            )
        vectors[place.role] = tensor
    if not found:
        raise ValueError("holds no vectors of a word")
    return [Embedding(word, vectors) for word, vectors in found.items()]


class _Place(NamedTuple):
    """What a name says.

    Attributes:
        token: empty where it says none.
        name: less what says that it lies in a file of LoRA, and of which word it is.
    """

    token: str
    role: str
    name: str


def _place(name: str) -> _Place:
    roles: Mapping[str, str] = facts("embeddings")["roles"]
    bundled = name.removeprefix(BUNDLED)
    if bundled != name:
        for ending, role in roles.items():
            if bundled.endswith(f".{ending}"):
                return _Place(bundled.removesuffix(f".{ending}"), role, ending)
        raise ValueError(f"`{printable(name)}` does not end as vectors of an embedding do")
    if name in roles:
        return _Place("", roles[name], name)
    known = facts("embeddings")["nameless"]
    word = name.removeprefix(known["map"])
    return _Place("" if word == known["token"] else word, ANY, name)


def number_of(vectors: Shaped) -> int:
    """How many vectors there are: n of (n, channels), one of (channels,)."""
    return vectors.shape[0] if len(vectors.shape) == 2 else 1


class Fitting(NamedTuple):
    """For which models words are.

    Attributes:
        whole: families all of whose text encoders they have vectors for.
        halves: families of which some text encoder gets none.
    """

    whole: tuple[str, ...]
    halves: tuple[str, ...]


def fitting(embeddings: Iterable[Embedding[T]]) -> Fitting:
    """The families whose text encoders are as wide as the vectors."""
    widths = {one.shape[-1] for each in embeddings for one in each.vectors.values()}
    whole = []
    halves = []
    for name, encoders in _encoders().items():
        if encoders == widths:
            whole.append(name)
        elif widths < encoders:
            halves.append(name)
    return Fitting(tuple(whole), tuple(halves))


@cache
def _encoders() -> dict[str, set[int]]:
    """Family, of those all of whose text encoders take words -> the channels of these."""
    width = facts("embeddings")["model"]["width"]
    found = {}
    for name, family in families().items():
        configs = [family.components[one].config for one in family.text_encoders]
        if all(width in config for config in configs):
            found[name] = {config[width] for config in configs}
    return found


def role_of(component: str) -> str:
    """How files that tell text encoders apart call one of a model with two; `ANY` for others."""
    roles: Mapping[str, str] = facts("embeddings")["components"]
    return roles.get(component, ANY)


def spelled(token: str, count: int) -> list[str]:
    """The tokens that several vectors of a word get: `<cat>`, `<cat>_1`, `<cat>_2`."""
    return [token, *(f"{token}_{i}" for i in range(1, count))]


def grouped(tokens: Iterable[str]) -> dict[str, int]:
    """Words among tokens in order -> how many vectors each has; the inverse of `spelled`."""
    words: dict[str, int] = {}
    last = ""
    for token in tokens:
        if last and token == f"{last}_{words[last]}":
            words[last] += 1
        else:
            words[token] = 1
            last = token
    return words
