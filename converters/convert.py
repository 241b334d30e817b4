"""The conversion itself: sources -> parts -> plan -> a staged output that appears whole or not at all."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..mappings.families import Family
from ..mappings.table import Link
from .background import Later
from .checkpoint import DTYPES, Array, SourceFile
from .collapse import brief
from .errors import ConversionError
from .keras_leaves import Lora
from .keras_writer import write_keras
from .plan import PlannedComponent, PlannedTensor, StateDictShapes, choose_family, plan
from .recognise import Recognition, candidates, complete, recognise
from .repo import Style, kerascv_facts, lacking, named_placeholders, output_dtype, placeholder_notes, write_repo
from .report import conversion_report
from .sources import open_source
from .staging import check_apart, check_space, staged, staged_file
from .writer import Written, WrittenFile

_HALVES = {"decoder": "vae", "image_encoder": "vae"}


@dataclass(frozen=True)
class Settings:
    """Everything that can be asked of a conversion beside its sources; see `weightport.convert`."""

    to: str = "diffusers"
    family: str | None = None
    component: str | None = None
    style: Style = field(default_factory=Style)
    lora_alpha: float | None = None
    allow_nan: bool = False
    overwrite: bool = False
    dry_run: bool = False


@dataclass
class Conversion:
    """What a conversion did, or would do.

    Attributes:
        output: the repo, file or folder that was written; None for a dry run.
        report: the content of `conversion.json`.
        notes: what the user should know, one sentence each.
        lacks: what the repo still needs before a pipeline can load it.
    """

    family: str
    components: dict[str, PlannedComponent]
    output: Path | None
    report: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    lacks: list[str] = field(default_factory=list)


def convert(
    sources: Sequence[Path],
    output: Path,
    base: Path | None,
    settings: Settings,
    state_dict_shapes: StateDictShapes,
    progress: Callable[[int, int], None],
) -> Conversion:
    """Convert sources, filled up from a base, into a diffusers repo or Keras files.

    Args:
        state_dict_shapes: the state dict of a model whose widths are not a stock family's.
        progress: called with (bytes just written, bytes in all).

    Raises:
        ConversionError: anything a user can act on; nothing is left behind.
    """
    check_apart(output, [*sources, *([base] if base else [])])
    parts = gather(sources, settings)
    family, parts = _with_base(parts, base, settings)
    components = plan(parts, family, state_dict_shapes)
    if settings.component is not None:
        components = _only(components, settings.component)
    conversion = Conversion(family.name, components, None if settings.dry_run else output)
    if settings.to == "diffusers":
        tokens = named_placeholders(components, settings.style.placeholder_tokens)
        settings = replace(settings, style=replace(settings.style, placeholder_tokens=tokens))
        conversion.notes += [*_width_notes(family, components), *placeholder_notes(tokens)]
    conversion.lacks = lacking(family, components) if settings.component is None and settings.to == "diffusers" else []
    if not settings.dry_run:
        write = _write_repo if settings.to == "diffusers" else _write_keras
        write(conversion, family, output, settings, progress)
    for part in parts:
        for file in part.checkpoint.files:
            file.check_unchanged()
    return conversion


def _width_notes(family: Family, components: Mapping[str, PlannedComponent]) -> list[str]:
    """How the components' configs differ from the stock family's, as their tensors say."""
    notes = []
    for name, component in components.items():
        stock = family.components[name].config
        own = [f"{key} {value} (stock {stock[key]})" for key, value in component.config.items() if value != stock[key]]
        if own:
            notes.append(f"{name} has sizes of its own: {', '.join(own)}")
    return notes


def gather(sources: Sequence[Path], settings: Settings) -> list[Recognition]:
    """Open and recognise every source.

    Raises:
        ConversionError: a source cannot be read, or is not a whole part of a known model.
    """
    parts = [recognise(c) for path in sources for c in open_source(path, Lora(settings.lora_alpha))]
    for part in parts:
        complete(part)
    return parts


# --- base -------------------------------------------------------------------------------------------------------------


def _with_base(parts: list[Recognition], base: Path | None, settings: Settings) -> tuple[Family, list[Recognition]]:
    """The family, and the parts with those a base adds."""
    if base is None:
        return choose_family(parts, settings.family), parts
    given = {part.part for part in parts}
    if (base / "model_index.json").is_file():
        added = gather([base], settings)
    else:
        family = choose_family(parts, settings.family)
        stock = [base / name for name in kerascv_facts()["stock_files"][family.name]]
        added = gather([path for path in stock if path.is_file()], settings)
        if not added:
            names = ", ".join(path.name for path in stock)
            raise ConversionError(f"{base}: neither a diffusers repo nor a folder with KerasCV's files ({names})")
    added = [part for part in added if part.part not in given and not _whole(part.part, given)]
    parts = [*added, *parts]
    return choose_family(parts, settings.family), parts


def _whole(part: str, given: set[str]) -> bool:
    """Whether the given parts leave nothing of a base's part to take."""
    halves = {half for half, whole in _HALVES.items() if whole == part}
    return _HALVES.get(part) in given or (bool(halves) and halves <= given)


def _only(components: dict[str, PlannedComponent], name: str) -> dict[str, PlannedComponent]:
    whole = _HALVES.get(name, name)
    if whole not in components:
        raise ConversionError(f"--component {name}: the sources hold {', '.join(components)} only")
    return {whole: components[whole]}


# --- diffusers --------------------------------------------------------------------------------------------------------


def _write_repo(
    conversion: Conversion, family: Family, output: Path, settings: Settings, progress: Callable[[int, int], None]
) -> None:
    total = sum(_nbytes(t, settings.style.dtype) for c in conversion.components.values() for t in c.tensors.values())
    with staged(output, settings.overwrite) as folder:
        check_space(output.absolute().parent, total)
        digests = Later(lambda: _digests(conversion.components))
        written = write_repo(folder, family, conversion.components, settings.style, lambda n: progress(n, total))
        _check_finite(conversion, written.nonfinite, written.overflowed, settings)
        conversion.notes += written.notes
        conversion.report = conversion_report(
            family=family.name,
            components=conversion.components,
            sha256=digests.result(),
            options=_options(settings),
            files=_hashed_files(folder, written.files),
            notes=[*conversion.notes, *(f"lacks {gap}" for gap in conversion.lacks)],
        )
        text = json.dumps(conversion.report, indent=1, ensure_ascii=False)
        (folder / "conversion.json").write_text(text + "\n")


def _digests(components: Mapping[str, PlannedComponent]) -> dict[str, str]:
    """sha256 of every source file, each read once."""
    files = {str(file.path): file for c in components.values() for part in c.parts for file in part.checkpoint.files}
    return {path: file.sha256() for path, file in files.items()}


def _hashed_files(folder: Path, weights: Mapping[str, WrittenFile]) -> dict[str, dict[str, Any]]:
    """Size and sha256 of every file of the repo; those of weights were computed while writing."""
    hashed = {}
    for path in sorted(file for file in folder.rglob("*") if file.is_file()):
        name = str(path.relative_to(folder))
        sha256 = weights[name].sha256 if name in weights else SourceFile(path).sha256()
        hashed[name] = {"nbytes": path.stat().st_size, "sha256": sha256}
    return hashed


def _options(settings: Settings) -> dict[str, Any]:
    style = settings.style
    asked = {
        "family": settings.family,
        "component": settings.component,
        "dtype": style.dtype,
        "variant": style.variant,
        "max_shard_size": style.max_shard_size,
        "text_activation": style.text_activation,
        "placeholder_tokens": list(style.placeholder_tokens),
        "lora_alpha": settings.lora_alpha,
        "allow_nan": settings.allow_nan,
    }
    return {name: value for name, value in asked.items() if value not in (None, [])}


def _check_finite(
    conversion: Conversion, nonfinite: Mapping[str, int], overflowed: Mapping[str, int], settings: Settings
) -> None:
    """Refuse NaN, Inf and overflow, or note them where they are allowed. Names are `component key`."""
    too_large = f"too large for {settings.style.dtype}"
    for counts, what, advice in (
        (nonfinite, "NaN or Inf", "--allow-nan converts them anyway"),
        (overflowed, too_large, "use --dtype bfloat16, or --allow-nan to write Inf"),
    ):
        if not counts:
            continue
        found = f"{sum(counts.values())} values are {what}, in {brief(counts)}"
        if not settings.allow_nan:
            raise ConversionError(f"{_origin(conversion, next(iter(counts)))}: {found}; {advice}")
        conversion.notes.append(found)


def _origin(conversion: Conversion, name: str) -> Path:
    """The source that a tensor, `component key`, comes from."""
    component, key = name.split(" ", 1)
    parts = conversion.components[component].parts
    source = conversion.components[component].tensors[key].sources[0]
    return next(p.checkpoint.path for p in parts if any(source is t for t in p.checkpoint.tensors.values()))


# --- Keras ------------------------------------------------------------------------------------------------------------


def _write_keras(
    conversion: Conversion, family: Family, output: Path, settings: Settings, progress: Callable[[int, int], None]
) -> None:
    """One Keras file a part: `output` itself for a single part, `name.<part>.h5` for several, or files in a folder."""
    seen = Written()
    parts = _keras_parts(conversion, family, settings, seen)
    targets = _keras_targets(output, list(parts))
    total = sum(_nbytes(t, settings.style.dtype) for c in conversion.components.values() for t in c.tensors.values())
    with ExitStack() as stack:
        for part, tensors in parts.items():
            path = stack.enter_context(staged_file(targets[part], settings.overwrite))
            write_keras(path, part, tensors, lambda n: progress(n, total))
            conversion.report.setdefault("files", []).append(str(targets[part]))
        _check_finite(conversion, seen.nonfinite, seen.overflow, settings)


def _keras_targets(output: Path, parts: Sequence[str]) -> dict[str, Path]:
    suffix = next((s for s in (".weights.h5", ".h5") if output.name.endswith(s)), None)
    if suffix is None:
        raise ConversionError(
            f"{output}: name the Keras file `something.weights.h5` (Keras 2.15 and 3) or `something.h5` (legacy)"
        )
    if len(parts) == 1:
        return {parts[0]: output}
    stem = output.name.removesuffix(suffix)
    return {part: output.with_name(f"{stem}.{part}{suffix}") for part in parts}


def _keras_parts(
    conversion: Conversion, family: Family, settings: Settings, seen: Written
) -> dict[str, dict[str, Callable[[], Array]]]:
    """Part -> canonical Keras key -> how to compute it, for every KerasCV part the components can fill.

    What is NaN, Inf or overflows then is counted in `seen`.
    """
    parts = {}
    for candidate in candidates("kerascv"):
        component = conversion.components.get(str(candidate.table.about["component"]))
        if candidate.family.name != family.name or component is None:
            continue
        if settings.component in _HALVES and settings.component != candidate.part:
            continue
        if all(target in component.tensors for link in candidate.links.values() for target in link.targets):
            parts[candidate.part] = {
                key: _inverted(link, key, component, settings.style.dtype, seen)
                for key, link in candidate.links.items()
            }
    if not parts:
        raise ConversionError("nothing to write: KerasCV has no model for these components")
    return parts


def _inverted(link: Link, key: str, component: PlannedComponent, dtype: str, seen: Written) -> Callable[[], Array]:
    def compute() -> Array:
        arrays = [_canonical(component.tensors[target]) for target in link.targets]
        back = link.inverse
        array = (back.op.apply(arrays, len(back.targets)) if back.op else arrays)[back.targets.index(key)]
        return _cast(array, dtype, f"{component.name} {link.targets[0]}", seen)

    return compute


def _cast(array: Array, dtype: str, name: str, seen: Written) -> Array:
    """The array in a dtype (or as it is, for "keep"); what is not finite before and after is counted by name."""
    with np.errstate(over="ignore"):  # counted instead
        cast = array if dtype == "keep" else array.astype(DTYPES[dtype])
    before, after = (int(np.count_nonzero(~np.isfinite(values))) for values in (array, cast))
    for counts, count in ((seen.nonfinite, before), (seen.overflow, after - before)):
        if count:
            counts[name] = counts.get(name, 0) + count
    return cast


def _canonical(tensor: PlannedTensor) -> Array:
    arrays = [source.numpy() for source in tensor.sources]
    return tensor.op.apply(arrays, tensor.part + 1)[tensor.part] if tensor.op else arrays[0]


def _nbytes(tensor: PlannedTensor, dtype: str) -> int:
    return math.prod(tensor.shape) * DTYPES[output_dtype(tensor, dtype)].itemsize
