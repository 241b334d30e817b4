"""What can be compared: each model of a repo with the source that it came from, and what a runner
must know of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..converters.checkpoint import Checkpoint
from ..converters.conversion import Settings
from ..converters.convert import gather
from ..converters.planning.plan import PlannedComponent, StateDictShapes, choose_family, plan
from ..converters.planning.recognise import Recognition
from ..errors import ConversionError
from ..mappings.families import Family, halves
from .layers import watched
from .process import can_import
from .result import File

LDM = {
    "sd1": ("unet", "decoder", "image_encoder", "text_encoder"),
    "sd2": ("unet", "decoder", "image_encoder"),
}


@dataclass(frozen=True)
class Pair:
    """One model of the repo, and where the other side finds it.

    Attributes:
        name: of the check.
        against: the runner of the other side.
        part: of a source; None to read the repo.
        watch: their module -> ours.
        rows: our module -> the table row that filled it.
    """

    name: str
    against: str
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
    def config(self) -> dict[str, Any]:
        """The stock config with what the repo's own says.

        Raises:
            ConversionError: it is none.
        """
        path = self.repo / self.folder / "config.json"
        own = json.loads(path.read_text())
        if not isinstance(own, dict):
            raise ConversionError(f"{path}: not a config")
        return {**self.family.components[self.component.name].config, **own}

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
        """Whose maths our runtime follows: first the source's, then diffusers' if that may
        differ."""
        if self.against != "kerascv":
            return ("diffusers",)
        return ("kerascv",) if self.name == "text_encoder" else ("kerascv", "diffusers")

    def our_check(self, semantics: str) -> dict[str, Any]:
        """What our runner needs to know."""
        return {
            "name": self.name,
            "folder": str(self.repo / self.folder),
            "class": self.family.components[self.component.name].class_name,
            "semantics": semantics,
            "watch": {module: module for module in self.watch.values()},
        }

    def their_check(self, latent_side: int) -> dict[str, Any]:
        """What the runner of the other side needs to know."""
        tensors = self.part.checkpoint.tensors.values() if self.part else ()
        config = self.config
        return {
            "name": self.name,
            "component": self.component.name,
            "family": self.family.name,
            "class": self.family.components[self.component.name].class_name,
            "config": config,
            "source": str(self.source),
            "repo": str(self.repo),
            "subfolder": self.folder,
            "prefix": self.part.of_family(self.family.name).table.prefix if self.part else "",
            "ema": any(tensor.name.startswith("model_ema.") for tensor in tensors),
            "watch": dict(self.watch)
            if self.against != "diffusers"
            else {m: m for m in self.watch.values()},
            "image_size": 8 * latent_side,
            "vocab": config.get("vocab_size"),
            "features": config.get("block_out_channels", [0])[0],
            "widths": _kerascv_widths(config, self.family, self.component.name),
        }


def pairs_of(
    repo: Path,
    sources: Sequence[Path],
    state_dict_shapes: StateDictShapes,
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
    mine, theirs = gather([repo], Settings()), gather(sources, Settings(ema=ema))
    family = choose_family([*mine, *theirs], None)
    components = plan(mine, family, state_dict_shapes)
    plan(theirs, family, state_dict_shapes)  # refuses what does not fit
    pairs = []
    for name, planned in components.items():
        if not sources:
            modules = {key.rpartition(".")[0] for key in planned.tensors}
            same = {module: module for module in modules}
            pairs += [
                Pair(check, "diffusers", planned, family, None, same, {})
                for check in _names(name, component)
            ]
        for part in theirs:
            candidate = part.of_family(family.name)
            if candidate.component.name == name:
                watch, rows = watched(
                    dict.fromkeys(candidate.links.values()), candidate.table.prefix
                )
                pairs += [
                    Pair(
                        check,
                        _runner(part, family, check, source_python),
                        planned,
                        family,
                        part,
                        watch,
                        rows,
                    )
                    for check in _names(part.part, component)
                ]
    if not pairs:
        raise ConversionError(f"--component {component}: not in the sources, or not in {repo}")
    return pairs


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
    """The name of a file, from what the user named on: nothing of the folders above is for others
    to see."""
    above, file = checkpoint.path.absolute().parent, path.absolute()
    return file.relative_to(above).as_posix() if file.is_relative_to(above) else file.name


def _names(part: str, component: str | None) -> list[str]:
    """The checks that a part takes, two for a whole VAE; only those of a component, if one is
    named."""
    names = list(halves()) if part == "vae" else [part]
    return [name for name in names if component in (None, name, halves().get(name))]


def _runner(part: Recognition, family: Family, name: str, source_python: str) -> str:
    """The runner of a source; where there are no original modules to run, diffusers loads the
    file."""
    layout = part.checkpoint.layout
    if layout != "ldm" or name in LDM.get(family.name, ()):
        return layout
    is_openclip = (family.name, name) == ("sd2", "text_encoder")
    return "openclip" if is_openclip and can_import("open_clip", source_python) else "diffusers"


def _kerascv_widths(
    config: Mapping[str, Any], family: Family, component: str
) -> dict[str, dict[int, int]]:
    """Stock width -> the repo's, for each kind of model, or nothing for a stock one."""
    stock = family.components[component].config
    context: Any = config.get("cross_attention_dim", config.get("hidden_size"))
    widths: dict[str, dict[int, int]] = {
        "unet": {320: 320, 640: 640, 1280: 1280},
        "vae": {128: 128, 256: 256, 512: 512},
        "context": {768: context, 1024: context},
    }
    if component in widths:
        widths[component] = dict(
            zip(stock["block_out_channels"], config["block_out_channels"], strict=True)
        )
    keys = ("block_out_channels", "cross_attention_dim", "hidden_size")
    return widths if any(config.get(key) != stock.get(key) for key in keys) else {}
