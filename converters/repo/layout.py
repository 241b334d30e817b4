"""Lays out a diffusers repo: weights, configs, scheduler, tokenizer and index."""

from __future__ import annotations

import json
import re
from collections import ChainMap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import ConversionError, printable
from ...mappings.families import Family
from ...mappings.layouts import CANONICAL
from ..checkpoint import SourceFile
from ..layouts.diffusers import inside
from ..layouts.ldm_evidence import Prediction
from ..planning.plan import PlannedComponent
from ..readers.safetensors import parse_json
from ..writers.safetensors import Output, WrittenFile, write_safetensors
from .tokenizer import placeholder_names, placeholder_warnings, write_tokenizer

# What the configs say they were written by: the first release whose meaning of them they follow.
DIFFUSERS_VERSION = "0.35.0"
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json",
    "added_tokens.json",
)  # fmt: skip
_MAX_CONFIG = 1 << 20  # bytes read of a config; real ones have a few hundred
_TORCH_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Style:
    """How the repo is written, beside what is in it."""

    dtype: str = "keep"  # a safetensors dtype name, or "keep"
    variant: str | None = None
    max_shard_size: int = 10_000_000_000
    image_size: int | None = None
    text_activation: str = "tanh"
    placeholder_tokens: tuple[str, ...] = ()
    hashes: bool = True  # sha256 of sources and outputs, for the report
    sync: bool = True  # what is finished is on the disk


@dataclass
class WrittenRepo:
    """What was written, and what was seen in the weights on the way."""

    files: dict[str, WrittenFile] = field(
        default_factory=dict
    )  # path in the repo -> size and sha256, weights only
    nonfinite: dict[str, int] = field(default_factory=dict)
    overflowed: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def write_repo(
    folder: Path,
    family: Family,
    components: Mapping[str, PlannedComponent],
    style: Style,
    prediction: Prediction | None,
    progress: Callable[[int], None],
) -> WrittenRepo:
    """Write every planned component, and what a pipeline needs beside the weights, into an empty
    folder.

    A ControlNet alone lies in the folder itself, as `ControlNetModel.from_pretrained` expects.

    Args:
        prediction: what the UNet of an original checkpoint predicts; KerasCV's and a base's own are
            known.
    """
    written = WrittenRepo()
    extension = is_extension(family, components)
    places = {name: "" if extension else name for name in components}
    for name, component in components.items():
        (folder / places[name]).mkdir(exist_ok=True)
        _write_json(
            folder / places[name] / "config.json",
            _config(component, family, style, prediction, written),
        )
    if not extension:
        _write_pipeline(folder, family, components, style, prediction)
    for (
        name,
        component,
    ) in components.items():  # last: what is refused above is refused before gigabytes are written
        _write_weights(folder, places[name], component, family, style, progress, written)
    return written


def _write_pipeline(
    folder: Path,
    family: Family,
    components: Mapping[str, PlannedComponent],
    style: Style,
    prediction: Prediction | None,
) -> None:
    """What a pipeline needs beside models: schedulers, tokenizers and the index."""
    first = next(iter(components.values()))  # stands in for a component that is not there
    scheduler = _write_scheduler(
        folder / "scheduler", components.get("unet", first), family, prediction
    )
    for name, config in family.schedulers.items():
        theirs = base_file(components.get("unet", first), f"{name}/scheduler_config.json")
        (folder / name).mkdir()
        _write_json(
            folder / name / "scheduler_config.json", read_json(theirs) if theirs else _dated(config)
        )
    for name, tokenizer in family.tokenizers.items():
        encoder = components.get(tokenizer.encoder, first)
        _write_tokenizer(folder / name, encoder, style, tokenizer.pad_token)
    _write_json(folder / "model_index.json", _model_index(family, components, scheduler))


def is_extension(family: Family, components: Mapping[str, PlannedComponent]) -> bool:
    """Whether these are no pipeline or piece of one, but a model that extends others: a ControlNet
    alone."""
    return all(family.components[name].pipelines for name in components)


def lacking(family: Family, components: Mapping[str, PlannedComponent]) -> list[str]:
    """What a complete repo of the family has and this one does not, in words."""
    gaps: list[str] = []
    if is_extension(family, components):
        return gaps
    for name, component in family.components.items():
        if name not in components and component.pipelines:
            continue
        if name not in components:
            gaps.append(f"{name} (give its file, or a --base that has it)")
        elif missing := component.manifest().keys() - components[name].tensors.keys():
            half = component.half_of(next(iter(missing))).replace("_", " ")
            gaps.append(
                f"the {half} half of the {name}, {len(missing)} tensors (give its file, or a --base"
                " that has it)"
            )
    return [
        *gaps,
        *(
            family.needs.get(components["unet"].config["in_channels"], [])
            if "unet" in components
            else []
        ),
    ]


def _write_weights(
    folder: Path,
    place: str,
    component: PlannedComponent,
    family: Family,
    style: Style,
    progress: Callable[[int], None],
    written: WrittenRepo,
) -> None:
    stem = (
        "model"
        if family.components[component.name].library == "transformers"
        else "diffusion_pytorch_model"
    )
    filename = f"{stem}.{style.variant}.safetensors" if style.variant else f"{stem}.safetensors"
    outputs = [
        Output(t.key, t.output_dtype(style.dtype), t.shape, t.sources, t.op, t.part)
        for t in component.tensors.values()
    ]
    result = write_safetensors(
        folder / place,
        filename,
        outputs,
        max_shard_size=style.max_shard_size,
        progress=progress,
        hashes=style.hashes,
        sync=style.sync,
    )
    written.files |= {str(Path(place, file.name)): file for file in result.files}
    written.nonfinite |= {
        f"{component.name} {key}": count for key, count in result.nonfinite.items()
    }
    written.overflowed |= {
        f"{component.name} {key}": count for key, count in result.overflow.items()
    }


def _config(
    component: PlannedComponent,
    family: Family,
    style: Style,
    prediction: Prediction | None,
    written: WrittenRepo,
) -> dict[str, Any]:
    """The component's config.json: a base's own, or the family's with what the tensors and KerasCV
    say."""
    theirs = base_file(component, str(Path(component.parts[0].checkpoint.root, "config.json")))
    described = family.components[component.name]
    if theirs is not None:
        given = read_json(theirs)
        for option in described.sizes:
            if option in given and given[option] != component.config[option]:
                said = f"`{option}` is {printable(given[option])}"
                raise ConversionError(
                    f"{theirs}: {said}, but the weights have {component.config[option]}"
                )
        return given | _sample_size(given, component, family, style)
    config = dict(component.config)
    if described.library == "transformers":
        config["architectures"] = [described.class_name]
        config["torch_dtype"] = _TORCH_DTYPES[
            next(iter(component.tensors.values())).output_dtype(style.dtype)
        ]
        config |= component.layout.text_encoder
        choice = component.layout.text_activation
        if choice is not None and family.name in choice.families:
            config["hidden_act"] = choice.choices[style.text_activation]
            written.notes.append(
                f"text encoder activation: {config['hidden_act']} (--text-activation"
                f" {style.text_activation}; {choice.note})"
            )
        return config
    if prediction is not None and prediction.kind == "v_prediction":
        config |= family.v_prediction.get(component.name, {})
    if prediction is not None:
        config = prediction.config(component.name, config)
    return _dated(
        {"_class_name": described.class_name}
        | config
        | _sample_size(config, component, family, style)
    )


def _sample_size(
    config: Mapping[str, Any], component: PlannedComponent, family: Family, style: Style
) -> dict[str, int]:
    """The option for the image size that is asked for, if any, in a config that has it."""
    if style.image_size is None or "sample_size" not in config:
        return {}
    scale = family.latent_scale if component.name == family.denoiser else 1
    return {"sample_size": style.image_size // scale}


def scheduler_config(unet: PlannedComponent, family: Family) -> dict[str, Any]:
    """The scheduler that a UNet comes with: a base's own, KerasCV's, or the family's."""
    theirs = base_file(unet, "scheduler/scheduler_config.json")
    if unet.layout.scheduler is not None:
        return dict(unet.layout.scheduler)
    return read_json(theirs) if theirs else dict(family.scheduler)


def _write_scheduler(
    folder: Path, unet: PlannedComponent, family: Family, prediction: Prediction | None
) -> str:
    """The scheduler goes with the UNet: a base's own UNet keeps its scheduler, KerasCV's needs
    KerasCV's.

    Returns its class name.
    """
    folder.mkdir()
    theirs = base_file(unet, "scheduler/scheduler_config.json")
    config = scheduler_config(unet, family)
    if prediction is not None:
        config = prediction.scheduler(config)
    name = str(config.get("_class_name"))
    if not re.fullmatch(r"\w+Scheduler", name):
        raise ConversionError(
            f"{theirs}: `_class_name` is {printable(name)}, which is no scheduler"
        )
    _write_json(folder / "scheduler_config.json", _dated(config))
    return name


def _write_tokenizer(folder: Path, encoder: PlannedComponent, style: Style, pad_token: str) -> None:
    """The tokenizer goes with the text encoder: a base's own keeps its files, any other gets
    CLIP's."""
    folder.mkdir()
    theirs = [base_file(encoder, f"{folder.name}/{name}") for name in _TOKENIZER_FILES]
    if any(theirs):
        for file in theirs:
            if file is not None:
                (folder / file.name).write_bytes(file.read_bytes())
        return
    pad_token = encoder.layout.pad_token or pad_token
    write_tokenizer(folder, placeholder_tokens=style.placeholder_tokens, pad_token=pad_token)


def named_placeholders(
    components: Mapping[str, PlannedComponent], given: tuple[str, ...]
) -> tuple[str, ...]:
    """Names for the token rows beyond CLIP's vocabulary, in order.

    Raises:
        ConversionError: there are not as many names as rows, or one cannot be a token.
    """
    encoder = components.get("text_encoder")
    if encoder is None or base_file(encoder, "tokenizer/tokenizer_config.json"):
        if given:
            raise ConversionError(
                "--placeholder-token: no source is a text encoder, so there is no token row to name"
            )
        return ()
    rows = encoder.tensors["text_model.embeddings.token_embedding.weight"].shape[0]
    return placeholder_names(rows, given)


def placeholder_notes(tokens: tuple[str, ...]) -> list[str]:
    """What the user should know about placeholder tokens."""
    if not tokens:
        return []
    return [
        f"placeholder tokens: {', '.join(tokens)} (ids from 49408 on)",
        *placeholder_warnings(tokens),
    ]


def base_file(component: PlannedComponent | None, name: str) -> Path | None:
    """A file of the diffusers repo that a whole component was taken from, if that is where it comes
    from."""
    if component is None or any(part.checkpoint.layout != CANONICAL for part in component.parts):
        return None
    repo = component.parts[0].checkpoint.path
    return inside(repo, repo / name) if (repo / name).is_file() else None


def read_json(path: Path) -> dict[str, Any]:
    """A config of a repo."""
    file = SourceFile(path)
    return parse_json(file.read(0, min(file.size, _MAX_CONFIG)), path)


def _model_index(
    family: Family, components: Mapping[str, PlannedComponent], scheduler: str
) -> dict[str, Any]:
    """The pipeline's index; an absent or incomplete component is not named, so that nothing loads
    it by mistake."""
    whole = {
        name: [component.library, component.class_name]
        for name, component in family.components.items()
        if name in components and components[name].tensors.keys() >= component.manifest().keys()
    }
    extended = [
        family.components[name].pipelines for name in whole if family.components[name].pipelines
    ]
    pipelines = ChainMap(*extended, family.pipelines)
    channels = (
        components["unet"].config["in_channels"] if "unet" in components else min(family.pipelines)
    )
    return {
        "_class_name": pipelines[channels],
        "_diffusers_version": DIFFUSERS_VERSION,
        "scheduler": ["diffusers", scheduler],
        **{
            name: ["diffusers", config["_class_name"]] for name, config in family.schedulers.items()
        },
        **{
            name: ["transformers", tokenizer.class_name]
            for name, tokenizer in family.tokenizers.items()
        },
        **{name: value if value != [] else [None, None] for name, value in family.index.items()},
        **whole,
    }


def _dated(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"_diffusers_version": DIFFUSERS_VERSION} | dict(config)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
