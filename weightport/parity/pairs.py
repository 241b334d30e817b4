"""What can be compared: each model of a repo with the source that it came from."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..converters.checkpoint import Checkpoint
from ..converters.convert import gather
from ..converters.planning.family import choose_family
from ..converters.planning.plan import PlannedComponent, plan
from ..converters.planning.recognise import Recognition
from ..converters.settings import Settings
from ..errors import ConversionError
from ..io.documents import MAX_CONFIG, read_json
from ..mappings.families import Component, Family, halves
from .frameworks import Framework, call_of, framework_of
from .layers import watched
from .result import File


@dataclass(frozen=True)
class Pair:
    """One model of the repo, and where the other side finds it.

    Attributes:
        name: of the check: the component's, or that of a half of it.
        framework: the other side.
        part: of a source; None to read the repo.
        watch: their module -> ours.
        rows: our module -> the table row that filled it.
    """

    name: str
    framework: Framework
    component: PlannedComponent
    family: Family
    part: Recognition | None
    watch: Mapping[str, str]
    rows: Mapping[str, str]

    @property
    def parts(self) -> list[Recognition]:
        """Of the repo, and the source's."""
        return [*self.component.parts, *([self.part] if self.part else [])]

    @property
    def stock(self) -> Component:
        """The component as the family has it."""
        return self.component.described

    @property
    def config(self) -> dict[str, Any]:
        """The stock config with what the repo's own says.

        Raises:
            ConversionError: it is none.
        """
        path = self.repo / self.folder / "config.json"
        return {**self.stock.config, **read_json(path, limit=MAX_CONFIG)}

    @property
    def call(self) -> str:
        """How the model is called."""
        return call_of(self.name, self.stock.class_name)

    @property
    def is_denoiser(self) -> bool:
        """Whether the model predicts noise."""
        return self.component.name == self.family.denoiser

    @property
    def repo(self) -> Path:
        """Where the component is."""
        return self.component.parts[0].checkpoint.path

    @property
    def folder(self) -> str:
        """Of the component, in the repo."""
        return self.component.parts[0].checkpoint.root

    @property
    def source(self) -> Path:
        """What the other side reads."""
        return self.part.checkpoint.path if self.part else self.repo

    @property
    def semantics(self) -> tuple[str, ...]:
        """Whose maths our runtime follows."""
        return self.framework.semantics(self.name)

    def our_check(self, semantics: str) -> dict[str, Any]:
        """What our runner needs to know."""
        return {
            "name": self.name,
            "call": self.call,
            "folder": str(self.repo / self.folder),
            "class": self.stock.class_name,
            "semantics": semantics,
            "watch": self._ours_watched(),
        }

    def their_check(self, latent_side: int) -> dict[str, Any]:
        """What the runner of the other side needs to know."""
        return {
            "name": self.name,
            "call": self.call,
            "family": self.family.name,
            "class": self.stock.class_name,
            "config": self.config,
            "stock_config": self.stock.config,
            "source": str(self.source),
            "repo": str(self.repo),
            "subfolder": self.folder,
            "prefix": self.part.of_family(self.family.name).table.prefix if self.part else "",
            "ema": self.part is not None and self.part.checkpoint.average,
            "watch": self._ours_watched() if self.framework.renames else dict(self.watch),
            "image_size": self.family.latent_scale * latent_side,
        }

    def _ours_watched(self) -> dict[str, str]:
        return {module: module for module in self.watch.values()}


def pairs_of(
    repo: Path,
    sources: Sequence[Path],
    *,
    component: str | None = None,
    ema: bool = False,
    source_python: str = sys.executable,
) -> list[Pair]:
    """What can be compared, in the family's order.

    Raises:
        ConversionError: a file cannot be read, does not fit the repo, or lacks what is asked for.
    """
    if ema and not sources:
        raise ConversionError("--ema: there is no source whose moving average could be taken")
    mine = gather([repo], Settings())
    theirs = gather(sources, Settings(ema=ema))
    family = choose_family([*mine, *theirs], None)
    components = plan(mine, family)
    plan(theirs, family)  # refuses what does not fit
    pairs = list[Pair]()
    for name, planned in components.items():
        if not sources:
            pairs += _with_itself(planned, family, component, source_python)
        for part in theirs:
            if part.of_family(family.name).component.name == name:
                pairs += _with_source(planned, family, part, component, source_python)
    if not pairs:
        raise ConversionError(f"--component {component}: not in the sources, or not in {repo}")
    return pairs


def _with_itself(
    planned: PlannedComponent, family: Family, wanted: str | None, python: str
) -> Iterator[Pair]:
    """The checks of a component whose other side reads the repo as well."""
    modules = {key.rpartition(".")[0] for key in planned.tensors}
    watch = {module: module for module in modules}
    layout = planned.parts[0].checkpoint.layout
    model = planned.described
    for check in _checks(model, planned.name, wanted):
        framework = framework_of(layout, family.name, model.class_name, check, python)
        yield Pair(check, framework, planned, family, None, watch, {})


def _with_source(
    planned: PlannedComponent, family: Family, part: Recognition, wanted: str | None, python: str
) -> Iterator[Pair]:
    """The checks of a component whose other side reads a source."""
    candidate = part.of_family(family.name)
    links = dict.fromkeys(candidate.links.values())
    watch, rows = watched(links, candidate.table.prefix)
    layout = part.checkpoint.layout
    for check in _checks(candidate.component, part.part, wanted):
        framework = framework_of(layout, family.name, candidate.component.class_name, check, python)
        yield Pair(check, framework, planned, family, part, watch, rows)


def _checks(component: Component, part: str, wanted: str | None) -> list[str]:
    """The checks that a part takes, one for each half of a whole that has halves.

    Args:
        wanted: only those of this component, if one is named.
    """
    names = list(component.halves) if part == component.name and component.halves else [part]
    return [name for name in names if wanted in (None, name, halves().get(name))]


def files_of(pairs: Sequence[Pair]) -> tuple[File, ...]:
    """Every file that the pairs read, hashed."""
    checkpoints = [part.checkpoint for pair in pairs for part in pair.parts]
    files = {
        file.path: (_name(checkpoint, file.path), file)
        for checkpoint in checkpoints
        for file in checkpoint.files
    }
    return tuple(File(name, file.sha256()) for name, file in files.values())


def _name(checkpoint: Checkpoint, path: Path) -> str:
    """The name of a file, from what the user named on.

    Nothing of the folders above is for others to see.
    """
    above = checkpoint.path.absolute().parent
    file = path.absolute()
    return file.relative_to(above).as_posix() if file.is_relative_to(above) else file.name
