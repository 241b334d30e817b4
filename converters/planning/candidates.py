"""The parts that a checkpoint may be: every table of a layout, expanded over a model's keys."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from typing import Any

from ...mappings.classes import ModelClass
from ...mappings.families import Component, Family, families
from ...mappings.library import all_tables
from ...mappings.table import Link, Table
from ..checkpoint import Checkpoint, Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Candidate:
    """A part that a checkpoint may be: one table, expanded over the keys of one family's model.

    Attributes:
        config: of the model.
        likeness: how much of the config is the stock one's, 0 to 1.
        given: the tensors of a model whose config is taken at its word; None for one that is known.
    """

    table: Table
    family: Family
    config: Mapping[str, Any]
    likeness: float = 1.0
    given: Mapping[str, Shape] | None = None

    @cached_property
    def targets(self) -> Mapping[str, Shape]:
        """Canonical key -> its shape in the model."""
        if self.given is not None:
            return self.given
        return self.component.model.tensors(self.config)

    @cached_property
    def links(self) -> Mapping[str, Link]:
        """Source key -> the link it takes part in."""
        config = json.dumps(dict(self.config))
        return _links(self.table, self.component.model, tuple(self.targets), config)

    @cached_property
    def shapes(self) -> Mapping[str, Shape]:
        """Source key -> its shape in the model."""
        return {key: link.source_shape(self.targets) for key, link in self.links.items()}

    @cached_property
    def reason_of(self) -> Callable[[str], str | None]:
        """What gives the reason why the table leaves a source key out, if it does."""
        return self.table.ignored(self.component.model.names(self.config))

    @property
    def unlike_stock(self) -> list[str]:
        """Canonical keys that this model or the stock one has alone."""
        stock = self.component.manifest()
        own = [key for key in self.targets if key not in stock]
        return own + [key for key in stock if key not in self.targets]

    @property
    def part(self) -> str:
        """`text_encoder`, `unet`, `vae`, or a half of a VAE: `decoder`, `image_encoder`."""
        return self.table.of_family("part", self.family.name)

    @property
    def title(self) -> str:
        """What the part is called."""
        return str(self.table.about["title"])

    @property
    def component(self) -> Component:
        """The component of the repo that the part fills."""
        return self.family.filled_by(self.table)

    @property
    def is_denoiser(self) -> bool:
        """Whether the part is what predicts noise."""
        return self.component.name == self.family.denoiser

    def named(self, checkpoint: Checkpoint) -> Mapping[str, Tensor]:
        """A checkpoint's tensors under the names that the table has for them: with its prefix."""
        prefix = self.table.prefix
        if not prefix:
            return checkpoint.tensors
        return {prefix + key: tensor for key, tensor in checkpoint.tensors.items()}

    def score(self, checkpoint: Checkpoint) -> float:
        """The share of keys that the part and a checkpoint have in common."""
        fronts = tuple(self.table.fronts)
        if not any(key.startswith(fronts) for key in checkpoint.tensors):
            return 0.0  # to expand a table takes time
        expected = self.links.keys()
        prefix = self.table.prefix
        mine = (key.removeprefix(prefix) for key in expected if key.startswith(prefix))
        if not any(key in checkpoint.tensors for key in mine):
            return 0.0  # at once: a stranger may have any number of tensors
        counted = self.named(checkpoint).keys() - self.ignored(checkpoint).keys()
        return len(counted & expected) / max(len(counted | expected), 1)

    def ignored(self, checkpoint: Checkpoint) -> dict[str, str]:
        """Names of a checkpoint's tensors that the part does without -> the reason."""
        prefix = self.table.prefix
        links = self.links
        reasons = {}
        for key in checkpoint.tensors:
            name = prefix + key
            if name in links:
                continue  # most are: to look for a reason takes time
            reason = self.reason_of(name) or checkpoint.unused.get(key)
            if reason is not None:
                reasons[name] = reason
        return reasons


@lru_cache(maxsize=32)
def _links(
    table: Table, model: ModelClass, targets: tuple[str, ...], config: str
) -> Mapping[str, Link]:
    """Those of a config as JSON: the same few models are planned again and again."""
    links = table.links(targets, model.names(json.loads(config)))
    return {source: link for link in links for source in link.sources}


@cache
def candidates(layout: str) -> tuple[Candidate, ...]:
    """Every stock part that a layout's tables can read, family by family."""
    return tuple(
        Candidate(table, family, family.filled_by(table).config)
        for table in all_tables()
        if table.about["layout"] == layout
        for family in families().values()
        if family.name in table.about["families"]
    )
