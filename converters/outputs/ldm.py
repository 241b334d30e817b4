"""An original checkpoint as output: planned components through LDM tables, read backwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import ConversionError
from ...io import atomic
from ...io.documents import MAX_CONFIG, read_json
from ...mappings.facts import facts
from ...mappings.families import halves
from ...mappings.table import Link, Table
from ..checkpoint import Checkpoint, Tensor
from ..conversion import Conversion, check_finite
from ..layouts.ldm_configs import Options, configs_metadata
from ..layouts.ldm_evidence import prediction
from ..planning.candidates import Candidate
from ..planning.keys import collapse
from ..planning.plan import PlannedComponent, make
from ..planning.recognise import recognise
from ..repo.base import base_file
from ..repo.configs import scheduler_config
from ..repo.index import lacking
from ..settings import Settings
from ..writers.safetensors import Output, write_safetensors
from .ldm_regenerate import Made, constants, markers, schedule
from .ldm_residue import Residue, read_residue, residue_of, residue_outputs, source_repo

SUFFIXES = (".safetensors",)
# https://github.com/Stability-AI/ModelSpec
_MODELSPEC = {"epsilon": "epsilon", "v_prediction": "v"}


def write(
    conversion: Conversion,
    output: Path,
    settings: Settings,
    progress: Callable[[int, int], None],
) -> None:
    """Write every component under its original keys into one `.safetensors` file.

    The residue goes back in if there is one. Without it, what a repo cannot hold is made again
    where that is possible; report and notes list it.

    Raises:
        ConversionError: the name is no `.safetensors`, or a component is incomplete.
    """
    if output.suffix not in SUFFIXES:
        raise ConversionError(f"{output}: name the checkpoint `something.safetensors`")
    kept = _residue(conversion, settings)
    scheduler = _scheduler(conversion, settings)
    residue = kept or Residue({}, {}, _metadata(conversion, scheduler))
    outputs, _ = residue_outputs(residue)
    names: dict[str, str] = {}  # key -> `component key` of what it holds
    by_table: dict[str, Output] = {}
    made: list[Made] = []
    unsaid: dict[str, Options] = {}
    for component in conversion.components.values():
        candidate = residue.writer(component, conversion.architecture, settings.component)
        _check_alone(candidate, conversion, residue)
        mine = []
        for link in dict.fromkeys(candidate.links.values()):
            mine.append(_output(link, component, residue, settings))
            names[mine[-1].key] = f"{component.name} {link.targets[0]}"
            by_table[link.sources[0]] = mine[-1]
        conversion.notes += _unwritten(candidate.table, component)
        if not kept:
            own = list(constants(candidate.table, component, mine))
            whole = [*mine, *(out for out, _ in own)]
            model = candidate.component.model.name
            unsaid[model] = _unsaid(component, candidate, whole)
            made += own
        outputs += mine
    if not kept:
        made += _scheduled(conversion, scheduler)
    conversion.report["regenerated"] = _listed(made, conversion)
    outputs += [out for out, _ in made]
    for key, other in residue.repeats.items():
        if other in by_table:
            outputs.append(replace(by_table[other], key=key))
    total = sum(tensor.nbytes for output in outputs for tensor in output.sources)
    with atomic.file(output, settings.overwrite, settings.sync) as path:
        atomic.check_space(output.absolute().parent, total)
        written = write_safetensors(
            path.parent,
            path.name,
            outputs,
            max_shard_size=2 * total + 1,
            metadata={"format": "pt", **residue.metadata, **configs_metadata(unsaid)},
            progress=lambda n: progress(n, total),
            hashes=settings.hashes,
            sync=settings.sync,
        )
        nonfinite = _by_component(written.nonfinite, names)
        overflow = _by_component(written.overflow, names)
        check_finite(conversion, nonfinite, overflow, settings)
    conversion.report["files"] = {output.name: {"sha256": written.files[0].sha256}}


def _check_alone(candidate: Candidate, conversion: Conversion, residue: Residue) -> None:
    """Refuse to put into a checkpoint of a whole model what originals have in files of its own.

    It goes back to where it was, if it comes from such a checkpoint.
    """
    component = candidate.component
    if residue.keys.keys() & candidate.links.keys():
        return
    others = [name for name in conversion.components if name != component.name]
    if candidate.table.about.get("alone") and others:
        raise ConversionError(
            f"{component.name}: an {component.class_name} has no place in an original checkpoint"
            f" beside {' and '.join(others)}; --component {component.name} writes it alone, --vae"
            f" FILE takes another in its place"
        )


def _unsaid(
    component: PlannedComponent, candidate: Candidate, outputs: Sequence[Output]
) -> Options:
    """The options of a component's config that its tensors in an original checkpoint do not tell.

    Args:
        candidate: what writes it.
        outputs: all that the checkpoint holds of it.
    """
    table = candidate.table
    tensors = {
        out.key.removeprefix(table.prefix): Tensor(out.key, out.dtype, out.shape) for out in outputs
    }
    root = table.prefix.rstrip(".")
    naming = table.about["naming"]
    found = recognise(Checkpoint(Path(), "", tensors, layout="ldm", root=root, naming=naming))
    mine = [one for one in found.candidates if one.family == candidate.family]
    taken = (mine or found.candidates)[0]
    model = taken.component.model
    return model.differing(component.config, taken.config)


def _unwritten(table: Table, component: PlannedComponent) -> Iterator[str]:
    """What the layout has no place for, because its programs do without: said unless it is what the
    way into a repository makes."""
    for key, rule in table.make.items():
        tensor = component.tensors[key]
        if not np.array_equal(tensor.tensor().numpy(), make(rule, tensor.shape)):
            yield (
                f"{component.name} `{key}` is left out, and is not the {rule}: the programs that"
                " read this layout do without, so that they compute something else"
            )


def _by_component(counts: Mapping[str, int], names: Mapping[str, str]) -> dict[str, int]:
    """Counts of the tensors of components, by `component key`."""
    return {names[key]: count for key, count in counts.items() if key in names}


def _scheduler(conversion: Conversion, settings: Settings) -> dict[str, Any]:
    """The config of the denoiser's scheduler, by what its file or repo says.

    What it predicts is None if nothing says.
    """
    family = conversion.architecture
    config = dict(family.scheduler)
    denoiser = conversion.denoiser
    if denoiser is None:
        return config
    config |= scheduler_config(denoiser, family)
    checkpoint = denoiser.parts[0].checkpoint
    try:
        found = prediction(family.name, checkpoint, settings.prediction_type)
    except ConversionError:
        return config | {"prediction_type": None}
    return found.scheduler(config) if found else config


def _scheduled(conversion: Conversion, config: Mapping[str, Any]) -> Iterator[Made]:
    """What a whole checkpoint of the family holds of the noise schedule."""
    family = conversion.architecture
    holders = facts("ldm")["schedule"]
    if conversion.denoiser is None or lacking(family, conversion.components):
        return
    if family.name in holders["buffers"]:
        yield from schedule(config)
    if family.name in holders["markers"]:
        vae = _autoencoder_config(conversion, conversion.denoiser)
        yield from markers(config, vae, facts("ldm")["edm"])


def _autoencoder_config(conversion: Conversion, denoiser: PlannedComponent) -> dict[str, Any]:
    """The config of the VAE, of which the UNet's file may say what its latents are."""
    family = conversion.architecture
    vae = conversion.components[family.autoencoder]
    theirs = base_file(vae, f"{vae.name}/config.json")
    stock = read_json(theirs, limit=MAX_CONFIG) if theirs else vae.config
    found = prediction(family.name, denoiser.parts[0].checkpoint, None)
    return found.config(vae.name, stock) if found else dict(stock)


def _metadata(conversion: Conversion, scheduler: Mapping[str, Any]) -> dict[str, str]:
    """What the header says of a UNet: what it predicts, for which images."""
    denoiser = conversion.denoiser
    if denoiser is None:
        return {}
    found = {}
    kind = scheduler.get("prediction_type")
    if kind in _MODELSPEC:
        found["modelspec.prediction_type"] = _MODELSPEC[kind]
    config = base_file(denoiser, f"{denoiser.name}/config.json")
    side = read_json(config, limit=MAX_CONFIG).get("sample_size") if config else None
    if type(side) is int:
        side *= conversion.architecture.latent_scale
        found["modelspec.resolution"] = f"{side}x{side}"
    return found


def _listed(made: Sequence[Made], conversion: Conversion) -> dict[str, str]:
    """Key -> how it was made, noted for people by pattern."""
    listed = {out.key: how for out, how in made}
    for reason in dict.fromkeys(listed.values()):
        keys = [key for key, how in listed.items() if how == reason]
        patterns = ", ".join(pattern for pattern, _ in collapse(keys))
        conversion.notes.append(f"regenerated, as no residue holds it: {patterns} ({reason})")
    return listed


def _residue(conversion: Conversion, settings: Settings) -> Residue | None:
    """What the source repo's residue file holds, or what an original source still has itself.

    None for half a component, beside which nothing lies.
    """
    if not settings.residue or settings.component in halves():
        return None
    repo = source_repo(conversion.components)
    if repo is not None:
        return read_residue(repo)
    return residue_of(conversion.components, conversion.architecture)


def _output(
    link: Link, component: PlannedComponent, residue: Residue, settings: Settings
) -> Output:
    """One original tensor, from the canonical ones that its link names."""
    planned = [component.tensors[target] for target in link.targets]
    back = link.inverse
    shape = planned[0].shape
    if back.op is not None:
        shape = back.op.shapes([tensor.shape for tensor in planned])[0]
    dtype = planned[0].output_dtype(settings.dtype)
    key = residue.keys.get(link.sources[0], link.sources[0])
    sources = tuple(tensor.tensor() for tensor in planned)
    if key in residue.shapes:
        (source,) = sources
        shape = tuple(residue.shapes[key])
        return Output(key, dtype, shape, (source.reshaped(shape),))
    return Output(key, dtype, shape, sources, back.op)
