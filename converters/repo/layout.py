"""Lays out a diffusers repo: weights, configs, scheduler, tokenizer and index."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ...io.config_files import write_json
from ...io.documents import MAX_CONFIG, read_json
from ...io.weight_files import STEMS
from ...mappings.families import Family, Tokenizer
from ..checkpoint import SourceFile, Stored
from ..layouts.ldm_evidence import Prediction
from ..planning.plan import PlannedComponent
from ..settings import Settings
from ..writers.safetensors import Output, Written, write_safetensors
from .base import base_file
from .carried import Carried
from .configs import Config, Configs, dated
from .index import is_extension, model_index, tokenizers
from .tokenizers import StockTokenizer, copy_or_write_tokenizer, stock_tokenizer
from .written import WrittenRepo

INDEX = "model_index.json"


def write_repo(
    folder: Path,
    family: Family,
    components: Mapping[str, PlannedComponent],
    settings: Settings,
    prediction: Prediction | None,
    carried: Carried | None,
    progress: Callable[[int], None],
) -> WrittenRepo:
    """Write every planned component, and what a pipeline needs beside the weights.

    A ControlNet alone lies in the folder itself, as `ControlNetModel.from_pretrained` expects.

    Args:
        folder: an empty one.
        prediction: what the UNet of an original checkpoint predicts; KerasCV's and a base's own are
            known.
        carried: what is taken over, as it is, from the repository of the denoiser.
    """
    repo = _Repo(folder, family, components, settings, prediction, carried)
    repo.write_configs()
    if not repo.is_extension:
        repo.write_tokenizers()
    if carried is not None:
        carried.write(folder)
    repo.write_weights(progress)  # last: what is refused is refused before gigabytes are written
    return repo.written


def described(
    family: Family,
    components: Mapping[str, PlannedComponent],
    settings: Settings,
    prediction: Prediction | None,
) -> dict[str, Config]:
    """The configs that `write_repo` writes, and the index: place in the repo -> content."""
    return _Repo(Path(), family, components, settings, prediction).configs_by_path()


def write_tokenizers(
    folder: Path,
    family: Family,
    components: Mapping[str, PlannedComponent],
    settings: Settings,
) -> None:
    """Write the tokenizers of a repository alone."""
    _Repo(folder, family, components, settings, None).write_tokenizers()


def stock_tokenizers(
    family: Family, components: Mapping[str, PlannedComponent], settings: Settings
) -> dict[str, StockTokenizer]:
    """Those of them whose vocabulary comes with this package: folder -> tokenizer."""
    return _Repo(Path(), family, components, settings, None).stock_tokenizers()


def outputs_of(component: PlannedComponent, dtype: str) -> list[Output]:
    """The tensors of a component as they are made, in the wanted dtype or `keep`."""
    return [
        Output(
            planned.key,
            planned.output_dtype(dtype),
            planned.shape,
            planned.sources,
            planned.op,
            planned.part,
            planned.parts,
        )
        for planned in component.tensors.values()
    ]


@dataclass
class _Repo:
    """A repo that is being written."""

    folder: Path
    family: Family
    components: Mapping[str, PlannedComponent]
    settings: Settings
    prediction: Prediction | None
    carried: Carried | None = None
    written: WrittenRepo = field(default_factory=WrittenRepo)

    @property
    def is_extension(self) -> bool:
        return is_extension(self.family, self.components)

    @property
    def denoiser(self) -> PlannedComponent:
        """What the schedulers go with; any component stands in for a denoiser that is not there."""
        first = next(iter(self.components.values()))
        return self.components.get(self.family.denoiser, first)

    @property
    def configs(self) -> Configs:
        return Configs(self.family, self.settings, self.prediction, self.written.notes)

    def place(self, name: str) -> str:
        """The folder of a component in the repo."""
        return "" if self.is_extension else name

    def configs_by_path(self) -> dict[str, Config]:
        """The JSON files of models and schedulers, and the index: place in the repo -> content."""
        found: dict[str, Config] = {}
        for name, component in self.components.items():
            found[f"{self.place(name)}/config.json".lstrip("/")] = self.configs.of(component)
        if self.is_extension:
            return found
        scheduler = self.configs.scheduler(self.denoiser)
        found["scheduler/scheduler_config.json"] = scheduler
        for name, stock in self.family.schedulers.items():
            place = f"{name}/scheduler_config.json"
            theirs = base_file(self.denoiser, place)
            found[place] = read_json(theirs, limit=MAX_CONFIG) if theirs else dated(stock)
        name = str(scheduler["_class_name"])
        found[INDEX] = model_index(self.family, self.components, name, self.carried)
        return found

    def write_configs(self) -> None:
        """Those of `configs_by_path`."""
        for place, content in self.configs_by_path().items():
            path = self.folder / place
            path.parent.mkdir(exist_ok=True)
            write_json(path, content)

    def write_tokenizers(self) -> None:
        """Each text encoder's."""
        for name, tokenizer, encoder in self._tokenizers():
            copy_or_write_tokenizer(
                self.folder / name,
                tokenizer,
                encoder,
                placeholder_tokens=self.settings.placeholder_tokens,
            )

    def stock_tokenizers(self) -> dict[str, StockTokenizer]:
        """Those whose vocabulary comes with this package, and no words beside: folder -> one."""
        found = {}
        for name, tokenizer, encoder in self._tokenizers():
            tokens = self.settings.placeholder_tokens
            stock = stock_tokenizer(name, tokenizer, encoder, tokens)
            if stock is not None and not encoder.words:
                found[name] = stock
        return found

    def _tokenizers(self) -> Iterator[tuple[str, Tokenizer, PlannedComponent]]:
        """Folders, their tokenizers, and the text encoders that these serve."""
        for name in tokenizers(self.family, self.components, self.carried):
            tokenizer = self.family.tokenizers[name]
            encoder = self.components.get(tokenizer.encoder, next(iter(self.components.values())))
            yield name, tokenizer, encoder

    def write_weights(self, progress: Callable[[int], None]) -> None:
        """Each model's, as the settings ask for; in the order in which the sources hold them."""
        written = {name: self._write_weights(name, progress) for name in self._in_order()}
        for name in self.components:
            self.written.add(name, self.place(name), written[name])

    def _in_order(self) -> list[str]:
        """The components of one file by their places there, so that it is read from its beginning
        to its end; others stay as they are."""
        firsts = {name: _first(component) for name, component in self.components.items()}
        files = list(dict.fromkeys(file for file, _ in firsts.values()))
        return sorted(firsts, key=lambda name: (files.index(firsts[name][0]), firsts[name][1]))

    def _write_weights(self, name: str, progress: Callable[[int], None]) -> Written:
        component = self.components[name]
        return write_safetensors(
            self.folder / self.place(name),
            self._weights_name(component),
            outputs_of(component, self.settings.dtype),
            max_shard_size=self.settings.max_shard_size,
            progress=progress,
            hashes=self.settings.hashes,
            sync=self.settings.sync,
        )

    def _weights_name(self, component: PlannedComponent) -> str:
        stem = STEMS[component.described.library][0]
        variant = f".{self.settings.variant}" if self.settings.variant else ""
        return f"{stem}{variant}.safetensors"


def _first(component: PlannedComponent) -> tuple[SourceFile | None, int]:
    """The file of a component's stored tensors, and where the first of them lies."""
    sources = [source for tensor in component.tensors.values() for source in tensor.sources]
    stored = [source for source in sources if isinstance(source, Stored)]
    if not stored:
        return None, 0
    file = stored[0].file
    return file, min(source.offset for source in stored if source.file is file)
