"""What an original checkpoint has and a diffusers repo cannot hold, made again without residue.

Constants and the noise schedule come out as they were; what was trained but is not used (OpenCLIP's
last layer, its temperature) is made up, so that the original programs load the file strictly.
Everything that is made is listed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ...io.arrays import DTYPES, Array
from ...mappings.table import Table
from ...noise_schedule import ending_at_zero
from ..checkpoint import Computed
from ..layouts.ldm_evidence import is_marker, training_betas
from ..planning.plan import PlannedComponent
from ..writers.safetensors import Output

Made = tuple[Output, str]  # a tensor, and how it was made

_MARKER = "a marker: what scheduler_config.json says"
_EMPTY = np.zeros(0, np.float32)


def constants(
    table: Table, component: PlannedComponent, outputs: Sequence[Output]
) -> Iterator[Made]:
    """What the `[regenerate]` section of a component's table says.

    Args:
        outputs: the tensors of the component, under original keys.
    """
    for name, rule in table.regenerated(component.config).items():
        if rule.endswith("*"):
            copied = table.prefix + rule.removesuffix("*")
            made = table.prefix + name.removesuffix("*")
            how = f"not trained, a copy of {rule}: nothing uses it"
            for output in outputs:
                if output.key.startswith(copied):
                    yield replace(output, key=made + output.key.removeprefix(copied)), how
        else:
            array, how = _constant(rule, component)
            dtype = outputs[0].dtype if array.dtype == np.float32 else "I64"
            yield _made(table.prefix + name, array.astype(DTYPES[dtype]), dtype, how)


def _constant(rule: str, component: PlannedComponent) -> tuple[Array, str]:
    """A tensor that a rule makes, and how."""
    config = component.config
    if rule == "positions":
        positions = np.arange(config["max_position_embeddings"])
        return positions[None], "a constant: 0, 1, 2, ..."
    if rule == "identity":
        identity = np.eye(config["hidden_size"], dtype=np.float32)
        return identity, "not trained, the identity: nothing uses it"
    number = np.array(float(rule), np.float32)
    return number, f"not trained, {rule}: used in training only"


def schedule(config: Mapping[str, Any]) -> Iterator[Made]:
    """The buffers of the noise schedule that a `scheduler_config.json` describes.

    Source: `DDPM.register_schedule` in ldm/models/diffusion/ddpm.py. A schedule of another kind
    gives nothing.
    """
    try:
        kept = np.cumprod(1 - training_betas(config))
    except KeyError:
        return
    if config.get("rescale_betas_zero_snr"):
        kept = ending_at_zero(kept)
    before = np.append(1.0, kept[:-1])
    alphas = kept / before
    betas = 1 - kept / before
    variance = betas * (1 - before) / (1 - kept)
    by_signal = np.zeros(len(kept))  # of which v models may have none
    noise_by_signal = np.zeros(len(kept))
    if config["prediction_type"] != "v_prediction":
        by_signal = np.sqrt(1 / kept)
        noise_by_signal = np.sqrt(1 / kept - 1)
    buffers = {
        "betas": betas,
        "alphas_cumprod": kept,
        "alphas_cumprod_prev": before,
        "sqrt_alphas_cumprod": np.sqrt(kept),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - kept),
        "log_one_minus_alphas_cumprod": np.log(1 - kept),
        "sqrt_recip_alphas_cumprod": by_signal,
        "sqrt_recipm1_alphas_cumprod": noise_by_signal,
        "posterior_variance": variance,
        "posterior_log_variance_clipped": np.log(np.maximum(variance, 1e-20)),
        "posterior_mean_coef1": betas * np.sqrt(before) / (1 - kept),
        "posterior_mean_coef2": (1 - before) * np.sqrt(alphas) / (1 - kept),
    }
    how = "the noise schedule, computed from scheduler_config.json"
    for name, values in buffers.items():
        yield _made(name, values.astype(np.float32), "F32", how)


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
    values = {f"scheduler.{name}": value for name, value in config.items()}
    values |= {f"vae.{name}": value for name, value in vae.items()}
    for options in edm.values():
        if options["scheduler._class_name"] == config["_class_name"]:
            yield from _edm_markers(options, values)
            return
    if config["prediction_type"] == "v_prediction":
        yield _made("v_pred", _EMPTY, "F32", _MARKER)
    if config.get("rescale_betas_zero_snr"):
        yield _made("ztsnr", _EMPTY, "F32", _MARKER)


def _edm_markers(options: Mapping[str, Any], values: Mapping[str, Any]) -> Iterator[Made]:
    """The markers of an EDM schedule: for each option that names a tensor, that tensor."""
    for option, name in options.items():
        if is_marker(name) and values.get(option) is not None:
            numbers = np.array(values[option], np.float32)
            shaped = numbers.reshape(1, -1, 1, 1) if numbers.ndim else numbers
            yield _made(name, shaped, "F32", _MARKER)


def _made(key: str, array: Array, dtype: str, how: str) -> Made:
    """A tensor that is in memory already, and how it was made."""
    tensor = Computed(key, dtype, array.shape, (), lambda: array, how)
    return Output(key, dtype, array.shape, (tensor,)), how
