"""keras-hub's `.weights.h5` as output: of the whole backbone, or of one of its models."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path

from ...errors import ConversionError
from ...io import atomic
from ...mappings.facts import facts
from ...mappings.families import halves
from ...mappings.layouts import layouts
from ..conversion import Conversion, check_finite, total_nbytes
from ..settings import Settings
from ..writers.safetensors import Written
from .keras_file import Compute, keras_file, put_by_attribute
from .keras_tensors import Tensors, parts_of

SUFFIXES = (".weights.h5",)
"""How the names of such files end."""

_BACKBONE = ""  # the file of all parts

_Variables = dict[tuple[str, ...], Compute]


def write(
    conversion: Conversion,
    output: Path,
    settings: Settings,
    progress: Callable[[int, int], None],
) -> None:
    """The weights of a backbone if all its parts are there; else a file for each of its models.

    `output` itself for a single file, `name.<model>.weights.h5` beside it for several.

    Raises:
        ConversionError: the name is no Keras file's, or keras-hub has none of these models.
    """
    (suffix,) = SUFFIXES
    if not output.name.endswith(suffix):
        raise ConversionError(f"{output}: name the Keras file `something{suffix}`")
    seen = Written()
    files = _files(parts_of(conversion, layouts()["kerashub"], settings, seen), conversion)
    total = total_nbytes(conversion, settings.dtype)
    with ExitStack() as stack:
        for model, variables in files.items():
            target = output
            if len(files) > 1:
                target = output.with_name(f"{output.name.removesuffix(suffix)}.{model}{suffix}")
            path = stack.enter_context(atomic.file(target, settings.overwrite, settings.sync))
            with keras_file(path, lambda n: progress(n, total)) as (file, put):
                put_by_attribute(file, put, variables)
            conversion.report.setdefault("files", []).append(str(target))
        check_finite(conversion, seen.nonfinite, seen.overflow, settings)


def _files(parts: Mapping[str, Tensors], conversion: Conversion) -> dict[str, _Variables]:
    """Model, or that of all of them -> the variables of its file.

    Raises:
        ConversionError: half a model is there.
    """
    known = facts("kerashub")["files"]
    wanted = {part for model in known.values() for part in model}
    if wanted == parts.keys():
        tensors = {key: compute for part in parts.values() for key, compute in part.items()}
        return {_BACKBONE: {_in_backbone(key): compute for key, compute in tensors.items()}}
    files = {}
    for model, names in known.items():
        there = [name for name in names if name in parts]
        if there and len(there) < len(names):
            raise ConversionError(
                f"{there[0]}: keras-hub loads the weights of the whole {halves()[there[0]]};"
                f" give all of it, and --component {halves()[there[0]]}"
            )
        if there:
            tensors = {key: compute for name in there for key, compute in parts[name].items()}
            files[model] = _alone(model, tensors, conversion)
    return files


def _in_backbone(key: str) -> tuple[str, ...]:
    """The names of groups in the weights of a backbone, and of the variable."""
    part, *inner = _layers(key)
    models = facts("kerashub")["alone"].values()
    is_model = key.partition(".")[0] in models
    within = ["layers", *inner] if is_model else inner
    return (f"layers/{part}", *within)


def _alone(model: str, tensors: Tensors, conversion: Conversion) -> _Variables:
    """The variables of a model that is saved alone."""
    models = facts("kerashub")["alone"].values()
    joined = facts("kerashub")["joined"]
    variables: _Variables = {}
    for key, compute in tensors.items():
        part = key.partition(".")[0]
        if part in joined:
            conversion.notes.append(
                f"left out: the projection of the {model}, which keras-hub keeps in the backbone"
            )
        elif part in models:
            layer, *inner = _layers(key)[1:]
            variables[f"layers/{layer}", *inner] = compute
        else:
            variables[_in_backbone(key)] = compute
    return variables


def _layers(key: str) -> list[str]:
    """`mm_di_t_block.2.x_block.mlp.dense1.weight` -> `mm_di_t_block_2`, `x_block`, ..., `0`."""
    *names, leaf = key.split(".")
    return [*_numbered(names), "0" if leaf == "weight" else "1"]


def _numbered(names: Iterable[str]) -> list[str]:
    """Classes and ranks as Keras has them: numbered from the second on."""
    found: list[str] = []
    for name in names:
        if not name.isdecimal():
            found.append(name)
        elif name != "0":
            found[-1] += f"_{name}"
    return found
