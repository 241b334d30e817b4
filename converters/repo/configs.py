"""The configs of a repo: of its models, and of the scheduler that goes with the denoiser."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...errors import ConversionError, printable
from ...io.config_files import DIFFUSERS_VERSION
from ...io.documents import MAX_CONFIG, read_json
from ...io.dtypes import WORDS
from ...mappings.facts import facts
from ...mappings.families import Component, Family
from ..layouts.ldm_evidence import Prediction
from ..planning.plan import PlannedComponent
from ..settings import Settings
from .base import base_config, base_file

_SCHEDULER = "scheduler/scheduler_config.json"

Config = dict[str, Any]


@dataclass
class Configs:
    """What the configs of one repo are made from.

    Attributes:
        prediction: what the UNet of an original checkpoint predicts; KerasCV's and a base's own are
            known.
        notes: what the user should know of them, one sentence each.
    """

    family: Family
    settings: Settings
    prediction: Prediction | None
    notes: list[str] = field(default_factory=list)

    def of(self, component: PlannedComponent) -> Config:
        """A component's `config.json`.

        A base's own, or the family's with what the tensors, the layout and the file say.

        """
        described = component.described
        theirs = base_config(component)
        if theirs is not None:
            given = _without_bookkeeping(component, read_json(theirs, limit=MAX_CONFIG))
            return given | self._sample_size(component, given) | component.chosen
        if described.library == "transformers":
            return self._of_text_encoder(component, described)
        config = dict(component.config)
        if self.prediction is not None:
            if self.prediction.kind == "v_prediction":
                config |= self.family.v_prediction.get(component.name, {})
            if described is self.family.components[component.name]:
                config = self.prediction.config(component.name, config)
        config |= self._sample_size(component, config)
        return dated({"_class_name": described.class_name} | config)

    def _of_text_encoder(self, component: PlannedComponent, described: Component) -> Config:
        first = next(iter(component.tensors.values()))
        config = dict(component.config)
        config["architectures"] = [described.class_name]
        config["torch_dtype"] = WORDS[first.output_dtype(self.settings.dtype)]
        config |= component.layout.text_encoder
        choice = component.layout.text_activation
        if choice is not None and self.family.name in choice.families:
            chosen = self.settings.text_activation
            config["hidden_act"] = choice.choices[chosen]
            self.notes.append(
                f"text encoder activation: {config['hidden_act']} (--text-activation {chosen};"
                f" {choice.note})"
            )
        return config

    def _sample_size(self, component: PlannedComponent, config: Config) -> dict[str, int]:
        """The option for the image size that is asked for, if any, in a config that has it."""
        side = self.settings.image_size
        if side is None or "sample_size" not in config:
            return {}
        if component.name == self.family.denoiser:
            side //= self.family.latent_scale
        return {"sample_size": side}

    def scheduler(self, denoiser: PlannedComponent) -> Config:
        """The config of the scheduler, which goes with the denoiser.

        Raises:
            ConversionError: the base's own names no scheduler.
        """
        config = scheduler_config(denoiser, self.family)
        if self.prediction is not None:
            config = self.prediction.scheduler(config)
        name = str(config.get("_class_name"))
        if not re.fullmatch(r"\w+Scheduler", name):
            theirs = base_file(denoiser, _SCHEDULER)
            raise ConversionError(
                f"{theirs}: `_class_name` is {printable(name)}, which is no scheduler"
            )
        return dated(config)


def scheduler_config(denoiser: PlannedComponent, family: Family) -> Config:
    """The scheduler that a denoiser comes with: its layout's, a base's own, or the family's."""
    theirs = base_file(denoiser, _SCHEDULER)
    if denoiser.layout.scheduler is not None:
        return dict(denoiser.layout.scheduler)
    return read_json(theirs, limit=MAX_CONFIG) if theirs else dict(family.scheduler)


def dated(config: Mapping[str, Any]) -> Config:
    """A config with the version of diffusers that it follows, unless it names one."""
    return {"_diffusers_version": DIFFUSERS_VERSION} | dict(config)


def _without_bookkeeping(component: PlannedComponent, config: Config) -> Config:
    """The config of a model, less what one of a moving average says of the averaging."""
    if not component.parts[0].checkpoint.average:
        return config
    options = facts("containers")["averages"]["options"]
    return {key: value for key, value in config.items() if key not in options}
