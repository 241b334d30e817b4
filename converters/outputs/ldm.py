"""An original single-file checkpoint as output: the planned components through the LDM tables, read
backwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import ConversionError
from ...io.atomic import check_space, staged_file
from ...mappings.facts import facts
from ...mappings.families import Family
from ...mappings.table import Link
from ..conversion import Conversion, Settings, check_finite
from ..layouts.ldm_evidence import prediction
from ..planning.keys import collapse
from ..planning.plan import PlannedComponent
from ..repo.layout import base_file, lacking, read_json, scheduler_config
from ..writers.safetensors import Output, write_safetensors
from .ldm_regenerate import Made, constants, markers, schedule
from .ldm_residue import Residue, read_residue, residue_of, residue_outputs, source_repo, written_by

_MODELSPEC = {
    "epsilon": "epsilon",
    "v_prediction": "v",
}  # https://github.com/Stability-AI/ModelSpec


def output_ldm(
    conversion: Conversion,
    family: Family,
    output: Path,
    settings: Settings,
    progress: Callable[[int, int], None],
) -> None:
    """Write every component under its original keys into one `.safetensors` file, with the residue
    if there is one.

    Without residue, what a repo cannot hold is made again where that is possible; report and notes
    list it.

    Raises:
        ConversionError: the name is no `.safetensors`, or a component is incomplete.
    """
    if output.suffix != ".safetensors":
        raise ConversionError(f"{output}: name the checkpoint `something.safetensors`")
    kept = _residue(conversion, family, settings)
    scheduler = _scheduler(conversion, family, settings)
    residue = kept or Residue({}, {}, _metadata(conversion, family, scheduler))
    outputs, _ = residue_outputs(residue)
    names: dict[str, str] = {}
    made: list[Made] = []
    for component in conversion.components.values():
        candidate = written_by(component, family)
        links = list(dict.fromkeys(candidate.links.values()))
        mine = [_output(link, component, residue, settings) for link in links]
        names |= {
            out.key: f"{component.name} {link.targets[0]}"
            for out, link in zip(mine, links, strict=True)
        }
        made += [] if kept else constants(candidate.table, component, mine)
        outputs += mine
    made += [] if kept else _scheduled(conversion, family, scheduler)
    conversion.report["regenerated"] = _listed(made, conversion)
    outputs += [out for out, _ in made]
    total = sum(tensor.nbytes for output in outputs for tensor in output.sources)
    with staged_file(output, settings.overwrite, settings.style.sync) as path:
        check_space(output.absolute().parent, total)
        written = write_safetensors(
            path.parent,
            path.name,
            outputs,
            max_shard_size=2 * total + 1,
            metadata={"format": "pt", **residue.metadata},
            progress=lambda n: progress(n, total),
            hashes=settings.style.hashes,
            sync=settings.style.sync,
        )
        nonfinite, overflow = (
            {names[key]: count for key, count in counts.items() if key in names}
            for counts in (written.nonfinite, written.overflow)
        )
        check_finite(conversion, nonfinite, overflow, settings)
    conversion.report["files"] = {output.name: {"sha256": written.files[0].sha256}}


def _scheduler(conversion: Conversion, family: Family, settings: Settings) -> dict[str, Any]:
    """The config of the UNet's scheduler, by what the UNet's file or repo says; what it predicts is
    None if nothing."""
    config = dict(family.scheduler)
    if (unet := conversion.components.get("unet")) is None:
        return config
    config |= scheduler_config(unet, family)
    try:
        found = prediction(family.name, unet.parts[0].checkpoint, settings.prediction_type)
    except ConversionError:
        return config | {"prediction_type": None}
    return found.scheduler(config) if found else config


def _scheduled(conversion: Conversion, family: Family, config: Mapping[str, Any]) -> Iterator[Made]:
    """What a whole checkpoint of the family holds of the noise schedule."""
    families = facts("ldm")["schedule"]
    unet = conversion.components.get("unet")
    if unet is None or lacking(family, conversion.components):
        return
    if family.name in families["buffers"]:
        yield from schedule(config)
    if family.name in families["markers"]:
        yield from markers(config, _vae_config(conversion, family), facts("ldm")["edm"])


def _vae_config(conversion: Conversion, family: Family) -> dict[str, Any]:
    """The config of the VAE, of which the UNet's file may say what its latents are."""
    unet, vae = conversion.components["unet"].parts[0].checkpoint, conversion.components["vae"]
    theirs = base_file(vae, "vae/config.json")
    stock = read_json(theirs) if theirs else vae.config
    found = prediction(family.name, unet, None)
    return found.config("vae", stock) if found else dict(stock)


def _metadata(
    conversion: Conversion, family: Family, scheduler: Mapping[str, Any]
) -> dict[str, str]:
    """What the header says of a UNet: what it predicts, for which images."""
    unet = conversion.components.get("unet")
    if unet is None:
        return {}
    kind = scheduler["prediction_type"]
    found = {"modelspec.prediction_type": _MODELSPEC[kind]} if kind in _MODELSPEC else {}
    config = base_file(unet, "unet/config.json")
    side = read_json(config).get("sample_size") if config else None
    if type(side) is int:
        side *= 2 ** (len(family.components["vae"].config["block_out_channels"]) - 1)
        found["modelspec.resolution"] = f"{side}x{side}"
    return found


def _listed(made: Sequence[Made], conversion: Conversion) -> dict[str, str]:
    """Key -> how it was made, noted for people by pattern."""
    listed = {out.key: how for out, how in made}
    for reason in dict.fromkeys(listed.values()):
        patterns = [
            pattern for pattern, _ in collapse(key for key, how in listed.items() if how == reason)
        ]
        conversion.notes.append(
            f"regenerated, as no residue holds it: {', '.join(patterns)} ({reason})"
        )
    return listed


def _residue(conversion: Conversion, family: Family, settings: Settings) -> Residue | None:
    """What the source repo's residue file holds, or what an original source still has itself."""
    if not settings.residue:
        return None
    repo = source_repo(conversion.components)
    return read_residue(repo) if repo is not None else residue_of(conversion.components, family)


def _output(
    link: Link, component: PlannedComponent, residue: Residue, settings: Settings
) -> Output:
    """One original tensor, from the canonical ones that its link names."""
    planned = [component.tensors[target] for target in link.targets]
    back = link.inverse
    shapes = [tensor.shape for tensor in planned]
    shape = back.op.shapes(shapes)[0] if back.op else shapes[0]
    dtype = planned[0].output_dtype(settings.style.dtype)
    key = residue.keys.get(link.sources[0], link.sources[0])
    return Output(key, dtype, shape, tuple(tensor.tensor() for tensor in planned), back.op)
