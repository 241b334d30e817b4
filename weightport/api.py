"""The public functions; what they do is in `converters`, and each imports only what it needs."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from .errors import ConversionError, printable

if TYPE_CHECKING:
    from .comparison.schedulers import SchedulerComparison
    from .converters.compare import Comparison
    from .converters.conversion import Conversion
    from .converters.inspection import Inspection
    from .parity.result import Parity
    from .runtime.pipelines.base import DiffusionPipeline

__all__ = ["compare_schedulers", "convert", "diff", "inspect", "parity"]

StrPath = str | os.PathLike[str]


def convert(
    sources: StrPath | Sequence[StrPath],
    output: StrPath,
    *,
    base: StrPath | None = None,
    to: Literal[
        "diffusers",
        "kerascv",
        "kerashub",
        "ldm",
        "kohya",
        "kohya-sgm",
        "peft",
        "diffusers-processors",
        "original",
        "onetrainer",
        "xlabs",
        "a1111",
        "clip",
        "text-encoders",
    ] = "diffusers",
    family: str | None = None,
    component: str | None = None,
    vae: StrPath | None = None,
    dtype: str = "keep",
    variant: str | None = None,
    max_shard_size: int | str = "10GB",
    text_activation: Literal["tanh", "erf"] = "tanh",
    placeholder_tokens: Sequence[str] = (),
    lora_alpha: float | None = None,
    lora: Sequence[str] = (),
    merge: Sequence[float] = (),
    expand: bool = False,
    embedding: Sequence[StrPath] = (),
    extract_embeddings: bool = False,
    ignore_unmatched: bool = False,
    ema: bool = False,
    revision: str | None = None,
    prediction_type: Literal["epsilon", "v_prediction"] | None = None,
    heads: Sequence[str] = (),
    image_size: int | None = None,
    residue: bool = True,
    hashes: bool = True,
    sync: bool = True,
    license: str | None = None,
    base_model: str | None = None,
    allow_nan: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Conversion:
    """Convert checkpoints into a diffusers repo or back, or an adapter into other names.

    Args:
        sources: Keras files, TensorFlow or SavedModel folders, original `.ckpt` or `.safetensors`
            checkpoints, or a diffusers repo; each component once, in any order.
        output: the repo folder; for `to="kerascv"` a `.weights.h5` or (legacy) `.h5` file, for
            `to="kerashub"` a `.weights.h5` file, for `to="ldm"` a `.safetensors` file.
        base: where components come from that the sources lack: a diffusers repo, a folder with
            KerasCV's stock files, a preset of keras-hub, or a Hub id.
        to: the layout to write; of an adapter the convention for its names, of an embedding the
            form.
        family: `sd1`, `sd2`, `sdxl`, `sdxl_refiner` or `upscaler`, where the tensors leave a
            choice.
        component: convert this one only: `unet`, `text_encoder`, `text_encoder_2`, `controlnet`,
            `vae`, or a half of it, `decoder` or `image_encoder`.
        vae: a file or repo whose VAE takes the place of the sources' own.
        dtype: `keep`, `float32`, `float16` or `bfloat16`.
        variant: put into the weights' file names, as in `diffusion_pytorch_model.fp16.safetensors`.
        max_shard_size: bytes, or `"5GB"`; larger components are written in shards with an index.
        text_activation: of an SD 2.x text encoder: `tanh` (keras-cv from 0.6.4 on) or `erf`
            (before).
        placeholder_tokens: names for the token rows that textual inversion added, in order,
            `<cat>=2` for two of one word; of an embedding, its words.
        lora_alpha: merge LoRA factors with this alpha; they are refused without it.
        lora: adapters to bake into the weights, `FILE`, `FILE@0.8` or
            `FILE@unet=0.8,text_encoder=0.5`.
        merge: make one adapter of several sources, with a strength for each.
        expand: of an adapter, make plain LoRA of LoHa, LoKr and mid factors.
        embedding: files of textual inversion whose words the text encoders and tokenizers get.
        extract_embeddings: write the words that were added to a model, or that lie in a LoRA.
        ignore_unmatched: leave out what an adapter or embedding holds for no part of the model.
        ema: take the moving average of the weights instead of the weights themselves.
        revision: of a source that is a repository's folder in the Hub's cache: a branch, a tag or
            a commit.
        prediction_type: what the UNet predicts, where its file does not say or says it wrongly.
        heads: numbers of attention heads, which no tensor tells, `unet=8` or one for each block,
            `unet=5,10,20,20`; by default a config's or the family's.
        image_size: in pixels, a multiple of 8, for the configs; by default the file's or the
            family's.
        residue: keep what a repo cannot hold of an original checkpoint in a file beside it, and put
            it back with `to="ldm"`.
        hashes: put the sha256 of sources and weights into the report.
        sync: return when the output has reached the disk, so that it is whole even after a power
            failure.
        license: of the model, for its card, as the Hub names it: `creativeml-openrail-m`, `mit`,
            ...
        base_model: the Hub id of the model it was fine-tuned from, for its card; by default that of
            `base`, or the one whose weights KerasCV starts from.
        allow_nan: write NaN and Inf instead of refusing them.
        overwrite: replace an earlier output.
        dry_run: plan and check, but write nothing.
        progress: called with (bytes just written, bytes in all).

    Returns:
        The conversion: family, components, notes, what the repo lacks, and the content of its
            `conversion.json`.

    Raises:
        ConversionError: in one line, what is wrong and what to do; nothing is left behind.
    """
    from .converters.convert import convert as run
    from .converters.repo.card import check_base_model, check_license
    from .converters.settings import Settings
    from .io import dtypes

    paths = [sources] if isinstance(sources, str | os.PathLike) else list(sources)
    _check_choice("to", to)
    _check_choice("dtype", dtype)
    _check_choice("text_activation", text_activation)
    if prediction_type is not None:
        _check_choice("prediction_type", prediction_type)
    if image_size is not None and (image_size < 8 or image_size % 8):
        raise ConversionError(f"--image-size {image_size}: must be a multiple of 8 pixels")
    settings = Settings(
        to=to,
        family=family,
        component=component,
        vae=_local(vae) if vae is not None else None,
        dtype=dtypes.NAMES.get(dtype, dtypes.KEEP),
        variant=_variant(variant, to),
        max_shard_size=_shard_size(max_shard_size),
        text_activation=text_activation,
        placeholder_tokens=tuple(placeholder_tokens),
        lora_alpha=lora_alpha,
        lora=tuple(_local_lora(text) for text in lora),
        merge=tuple(merge),
        expand=expand,
        embedding=tuple(str(_local(path)) for path in embedding),
        extract_embeddings=extract_embeddings,
        ignore_unmatched=ignore_unmatched,
        ema=ema,
        revision=revision,
        prediction_type=prediction_type,
        heads=tuple(heads),
        image_size=image_size,
        residue=residue,
        hashes=hashes,
        sync=sync,
        license=check_license(license) if license else None,
        base_model=check_base_model(base_model) if base_model else _hub_id(base),
        allow_nan=allow_nan,
        overwrite=overwrite,
        dry_run=dry_run,
    )
    return run(
        [_local(path) for path in paths],
        Path(output),
        _base_folder(base) if base is not None else None,
        settings,
        progress or (lambda done, total: None),
    )


def inspect(path: StrPath, *, family: str | None = None) -> Inspection:
    """Say what a file holds, from its headers alone: format, family and why, components, missing
    and unexpected keys; of an adapter its modules, ranks and alphas.

    Args:
        path: a file or folder; one on the Hub (`hub:owner/name/file`) is not downloaded, only its
            headers are.
        family: of the models that an adapter is for, where it leaves a choice.

    Raises:
        ConversionError: the file cannot be read at all.
    """
    from .converters.inspection import inspect as run
    from .mappings.families import NAMES

    if family is not None and family not in NAMES:
        raise ConversionError(f"--family {family}: unknown; one of {', '.join(NAMES)}")
    if not str(path).startswith("hub:"):
        return run(Path(path), family)
    from dataclasses import replace

    from .pull import glancing

    with glancing() as glance:
        found = run(_local(path), family)
        return replace(found, path=glance.named(found.path))


def diff(
    a: StrPath,
    b: StrPath,
    *,
    family: str | None = None,
    ema: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Compare two checkpoints in any two layouts, in canonical form: key, shape, dtype and value.

    Args:
        a: a Keras file, an original checkpoint, or a diffusers repo.
        b: another one.
        family: where the tensors leave a choice.
        ema: compare the moving average of original checkpoints.
        progress: called with (bytes just compared, bytes in all).

    Raises:
        ConversionError: one of them cannot be read or recognised.
    """
    from .converters.compare import compare as run
    from .converters.settings import Settings

    settings = Settings(family=family, ema=ema)
    return run([_local(a)], [_local(b)], settings, progress or (lambda done, total: None))


def parity(
    repo: StrPath,
    sources: StrPath | Sequence[StrPath] = (),
    *,
    component: str | None = None,
    ema: bool = False,
    source_python: StrPath = sys.executable,
    layers: bool = False,
    dtype: Literal["float32", "float64"] = "float32",
    image_size: int = 128,
    images: bool = True,
    report: StrPath | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Parity:
    """Run a converted repo and the framework that its weights came from on the same inputs, and
    compare.

    Args:
        repo: a diffusers repo, or the folder of a ControlNet.
        sources: what it was converted from. Keras files are run by keras-cv, original checkpoints
            of SD 1.x and 2.x by the `ldm` modules and open_clip, others by diffusers' single-file
            loading. Without any, diffusers runs the repo itself.
        component: compare this one only: `unet`, `text_encoder`, `vae`, `decoder`, ...
        ema: the repo was converted from the moving average of an original checkpoint's UNet.
        source_python: the interpreter that has the source framework; by default this one.
        layers: record the error after every module, not only where a check fails.
        dtype: what both sides compute in.
        image_size: in pixels.
        images: also compare KerasCV's `generate_image` with ours, where the sources have all that
            it takes.
        report: a folder that receives `parity.html` and `parity.json`.
        progress: called with (checks just done, checks in all).

    Raises:
        ConversionError: in one line, what is wrong and what to do; outputs that differ are an
            answer, not an error.
    """
    from .parity.run import parity as run

    found = run(
        Path(repo),
        [Path(path) for path in ([sources] if isinstance(sources, str | os.PathLike) else sources)],
        progress or (lambda done, total: None),
        component=component,
        ema=ema,
        source_python=os.fspath(source_python),
        layers=layers,
        dtype=dtype,
        latent_side=image_size // 8,
        images=images,
    )
    if report is not None:
        from .parity.report import write_report

        write_report(found, Path(report))
    return found


def compare_schedulers(
    repo: StrPath | DiffusionPipeline,
    prompts: str | Sequence[str],
    output: StrPath,
    *,
    schedulers: Sequence[str] | None = None,
    steps: Sequence[int] = (5, 10, 20, 50),
    seed: int = 0,
    size: tuple[int, int] | None = None,
    guidance_scale: float = 7.5,
    reference_steps: int = 200,
    dtype: str = "float32",
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> tuple[SchedulerComparison, list[str]]:
    """Draw prompts with several schedulers and numbers of steps, and measure speed and distance to
    a reference.

    Args:
        repo: a diffusers repo, a Hub id, or a text-to-image pipeline, whose dtype and device then
            count.
        prompts: one or several.
        output: a folder that receives `report.html`, `results.json` and `results.csv`; finished
            images are kept in it, and an interrupted comparison goes on where it stopped.
        schedulers: short names (`euler`, `dpm++2m-karras`, ...) or class names; by default the
            usual ones.
        steps: numbers of steps to try with each.
        seed: of the noise that all start from.
        size: (width, height) in pixels; by default the model's own.
        guidance_scale: weight of the prompt.
        reference_steps: steps of the reference, DPM-Solver++ of second order.
        dtype: `float32`, `float16` or `bfloat16`.
        device: such as `cuda`.
        progress: called with (images just made, images in all).

    Returns:
        The comparison, and why scores that are not installed are lacking.

    Raises:
        ValueError: there is no such scheduler, or the model is not one that a prompt alone will do
            for.
    """
    import torch

    from .comparison.metrics import installed_metrics
    from .comparison.report import write_report
    from .comparison.schedulers import SCHEDULERS, Experiment, compare
    from .runtime.pipelines.base import DiffusionPipeline

    pipe = repo
    if not isinstance(pipe, DiffusionPipeline):
        pipe = DiffusionPipeline.from_pretrained(pipe, dtype=getattr(torch, dtype)).to(device)
    experiment = Experiment(
        prompts=(prompts,) if isinstance(prompts, str) else tuple(prompts),
        schedulers=tuple(schedulers or SCHEDULERS),
        steps=tuple(steps),
        seed=seed,
        size=size,
        guidance_scale=guidance_scale,
        reference_steps=reference_steps,
    )
    metrics, notes = installed_metrics()
    comparison = compare(
        pipe, experiment, Path(output), metrics, progress or (lambda count, total: None)
    )
    write_report(comparison, Path(output), notes)
    return comparison, notes


def _local(path: StrPath) -> Path:
    """A local path as it is; of `hub:owner/name@revision/file` the downloaded file."""
    if not str(path).startswith("hub:"):
        return Path(path)
    from .pull import fetch

    return fetch(str(path))


def _local_lora(text: str) -> str:
    """The same with a local path; `hub:` files are downloaded."""
    if not text.startswith("hub:"):
        return text
    from .converters.baking import parse_lora

    path, _ = parse_lora(text)
    return f"{_local(path)}{text.removeprefix(path)}"


def _base_folder(base: StrPath) -> Path:
    """A local folder as it is; what refers to the Hub is downloaded."""
    from .pull import Reference, fetch

    path = Path(base).expanduser()
    if path.is_dir():
        return path
    if Reference.parse(str(base)):
        return fetch(str(base))
    raise ConversionError(
        f"{base}: no such folder, and not a Hub id (owner/name, or owner/name@revision)"
    )


def _hub_id(base: StrPath | None) -> str | None:
    """The Hub id in a base, without its revision."""
    if base is None or Path(base).expanduser().is_dir():
        return None
    from .pull import Reference

    reference = Reference.parse(str(base))
    return reference.repo_id if reference else None


def _check_choice(name: str, value: str) -> None:
    """Refuse a value that an option of converting does not offer."""
    from .converters.settings import Settings, options

    choices = options(Settings)[name].choices
    if value not in choices:
        flag = f"--{name.replace('_', '-')}"
        raise ConversionError(f"{flag} {value}: unknown; one of {', '.join(choices)}")


def _variant(variant: str | None, to: str) -> str | None:
    from .converters.outputs import OUTPUTS

    if variant is not None and (to not in OUTPUTS or not OUTPUTS[to].is_repo):
        raise ConversionError(
            f"--variant {variant}: names files of a repo, and --to {to} writes none"
        )
    if variant is not None and not re.fullmatch(r"[A-Za-z0-9_]+", variant):
        raise ConversionError(
            f"--variant {variant}: use letters, digits and underscores, such as fp16"
        )
    return variant


def _shard_size(size: int | str) -> int:
    from .io.sizes import parse_size

    try:
        return parse_size(size)
    except ValueError as error:
        raise ConversionError(f"--max-shard-size {printable(size)}: {error}") from None
