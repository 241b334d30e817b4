"""What an original checkpoint has and a diffusers repo cannot hold, made again where no residue
keeps it.

Constants and the noise schedule come out as they were; what was trained but is not used (OpenCLIP's
last layer, its temperature) is made up, so that the original programs load the file strictly.
Everything that is made is listed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ...mappings.table import Table
from ..checkpoint import DTYPES, Array, Computed
from ..layouts.ldm_evidence import is_marker, training_betas
from ..planning.plan import PlannedComponent
from ..writers.safetensors import Output

Made = tuple[Output, str]  # a tensor, and how it was made


def constants(
    table: Table, component: PlannedComponent, outputs: Sequence[Output]
) -> Iterator[Made]:
    """What the `[regenerate]` section of a component's table says.

    Args:
        outputs: the tensors of the component, under original keys.
    """
    for name, rule in table.regenerate.items():
        if rule.endswith("*"):
            copied, made = (table.prefix + pattern.removesuffix("*") for pattern in (rule, name))
            for output in outputs:
                if output.key.startswith(copied):
                    how = f"not trained, a copy of {rule}: nothing uses it"
                    yield replace(output, key=made + output.key.removeprefix(copied)), how
        else:
            array, how = _constant(rule, component)
            dtype = outputs[0].dtype if array.dtype == np.float32 else "I64"
            yield _output(table.prefix + name, array.astype(DTYPES[dtype]), dtype, how), how


def _constant(rule: str, component: PlannedComponent) -> tuple[Array, str]:
    if rule == "positions":
        return np.arange(component.config["max_position_embeddings"])[
            None
        ], "a constant: 0, 1, 2, ..."
    if rule == "identity":
        return np.eye(
            component.config["hidden_size"], dtype=np.float32
        ), "not trained, the identity: nothing uses it"
    return np.array(float(rule), np.float32), f"not trained, {rule}: used in training only"


def schedule(config: Mapping[str, Any]) -> Iterator[Made]:
    """The buffers of the noise schedule that a `scheduler_config.json` describes, as ldm registers
    them.

    Source: `DDPM.register_schedule` in ldm/models/diffusion/ddpm.py. A schedule of another kind
    gives nothing.
    """
    try:
        kept = np.cumprod(1 - training_betas(config))
    except KeyError:
        return
    if config.get("rescale_betas_zero_snr"):
        kept = _ending_at_zero(kept)
    before = np.append(1.0, kept[:-1])
    alphas, betas = kept / before, 1 - kept / before
    variance = betas * (1 - before) / (1 - kept)
    divides = (
        config["prediction_type"] != "v_prediction"
    )  # by signal, of which v models may have none
    buffers = {
        "betas": betas,
        "alphas_cumprod": kept,
        "alphas_cumprod_prev": before,
        "sqrt_alphas_cumprod": np.sqrt(kept),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - kept),
        "log_one_minus_alphas_cumprod": np.log(1 - kept),
        "sqrt_recip_alphas_cumprod": np.sqrt(1 / kept) if divides else np.zeros(len(kept)),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(1 / kept - 1) if divides else np.zeros(len(kept)),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": np.log(np.maximum(variance, 1e-20)),
        "posterior_mean_coef1": betas * np.sqrt(before) / (1 - kept),
        "posterior_mean_coef2": (1 - before) * np.sqrt(alphas) / (1 - kept),
    }
    how = "the noise schedule, computed from scheduler_config.json"
    for name, values in buffers.items():
        yield _output(name, values.astype(np.float32), "F32", how), how


def _ending_at_zero(kept: Array) -> Array:
    """A schedule shifted and scaled so that no signal is left at its end (Lin et al. 2023,
    algorithm 1)."""
    root = np.sqrt(kept)
    scaled: Array = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return scaled


def markers(
    config: Mapping[str, Any], vae: Mapping[str, Any], edm: Mapping[str, Mapping[str, Any]]
) -> Iterator[Made]:
    """The tensors by which programs know what an SDXL model predicts, and its schedule.

    Args:
        config: the scheduler's.
        vae: the VAE's config.
        edm: marker of an EDM schedule -> option -> its value, or the tensor that has it:
            `mappings/facts/ldm.toml`.
    """
    how = "a marker: what scheduler_config.json says"
    values = {f"scheduler.{name}": value for name, value in config.items()}
    values |= {f"vae.{name}": value for name, value in vae.items()}
    for options in edm.values():
        if options["scheduler._class_name"] == config["_class_name"]:
            for option, name in options.items():
                if is_marker(name) and values.get(option) is not None:
                    numbers = np.array(values[option], np.float32)
                    yield (
                        _output(
                            name,
                            numbers.reshape(1, -1, 1, 1) if numbers.ndim else numbers,
                            "F32",
                            how,
                        ),
                        how,
                    )
            return
    for name, there in (
        ("v_pred", config["prediction_type"] == "v_prediction"),
        ("ztsnr", config.get("rescale_betas_zero_snr")),
    ):
        if there:
            yield _output(name, np.zeros(0, np.float32), "F32", how), how


def _output(key: str, array: Array, dtype: str, how: str) -> Output:
    return Output(
        key, dtype, array.shape, (Computed(key, dtype, array.shape, (), lambda: array, how),)
    )
