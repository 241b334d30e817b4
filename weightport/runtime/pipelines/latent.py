"""What the pipelines of latent diffusion share: components, guidance, and the course of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import get_ident
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..adapted import scaled
from ..images import VaeImageProcessor
from ..loading.config import Config
from ..models.attention import constant_context
from ..models.autoencoders import Autoencoder
from ..models.clip import CLIPTextModel
from ..models.in_parts import InParts
from ..notices import SLICED, say_once
from ..sampling import results, schedule
from ..sampling.arguments import Arguments, Draws, Generator, Size, Texts
from ..sampling.checks import Requirements, check
from ..sampling.guidance import Dials, Guide
from ..sampling.latents import Codec
from ..sampling.loop import sample
from ..sampling.noise import Noise
from ..sampling.prompts import Embeddings, PromptEncoder, expanded
from ..sampling.schedule import Flow, Scheduler
from ..sampling.starts import FROM_NOISE, Channels, Start
from ..sampling.state import Conditions, Images, Run
from ..speed import compile_model, pack_model
from ..text.textual_inversion import (
    Encoder,
    load_textual_inversion,
    unload_textual_inversion,
)
from ..text.tokenizer import CLIPTokenizer
from .adapters import LoadsAdapters
from .base import DiffusionPipeline

LARGEST_UNASKED = 4096  # pixels; no model was trained with as many on a side
_ATTENTION_OPTIONS = ("cross_attention_kwargs", "joint_attention_kwargs")  # arguments of calls
TENSORS = ("latents", "prompt_embeds", "negative_prompt_embeds")  # that every callback may ask for


class LatentDiffusionPipeline(LoadsAdapters, DiffusionPipeline):
    """The base of all pipelines of this family.

    One pipeline may serve several threads at once: what changes in a run belongs to the run, and
    callbacks see it as attributes of the pipeline, each those of its own thread.

    Attributes:
        family: pipelines of one family and different tasks take the same components.
        start: how runs begin.
        tensors: what callbacks may ask for, beside what the start adds.
        scheduler_fixes: options that early configs have wrong; the constructor changes them in the
            scheduler.
        is_distilled: whether guidance is a condition of the UNet, as in a latent consistency model.
        control_argument: what the call names the ControlNets' images.
        denoiser_name: the component that predicts.
    """

    family: ClassVar[str] = ""
    start: ClassVar[Start] = FROM_NOISE
    tensors: ClassVar[tuple[str, ...]] = TENSORS
    scheduler_fixes: ClassVar[dict[str, Any]] = {}
    is_distilled: ClassVar[bool] = False
    control_argument: ClassVar[str | None] = None
    denoiser_name: ClassVar[str]
    _callback_tensor_inputs: ClassVar[tuple[str, ...]] = TENSORS

    _processor: VaeImageProcessor | None = None
    vae: Autoencoder
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "_callback_tensor_inputs" not in vars(cls):
            led = () if cls.control_argument is None else (cls.control_argument,)
            cls._callback_tensor_inputs = (*cls.tensors, *cls.start.tensors, *led)

    # --- what callbacks see of the run of their thread --------------------------------------------

    @property
    def _runs(self) -> dict[int, Run]:
        """Thread -> the run that goes on in it."""
        runs: dict[int, Run] = vars(self).setdefault("_running", {})
        return runs

    @property
    def _shown(self) -> Dials:
        """Those of the thread's run, or of the last one that ended."""
        run = self._runs.get(get_ident())
        dials: Dials = vars(self).setdefault("_last", Dials()) if run is None else run.guide.dials
        return dials

    @property
    def guidance_scale(self) -> float:
        """Weight of the prompt."""
        return self._shown.guidance_scale

    @property
    def _guidance_scale(self) -> float:
        return self._shown.guidance_scale

    @_guidance_scale.setter
    def _guidance_scale(self, value: float) -> None:
        self._shown.guidance_scale = value

    @property
    def image_guidance_scale(self) -> float:
        """Weight of the image to edit."""
        return self._shown.image_guidance_scale

    @property
    def _image_guidance_scale(self) -> float:
        return self._shown.image_guidance_scale

    @_image_guidance_scale.setter
    def _image_guidance_scale(self, value: float) -> None:
        self._shown.image_guidance_scale = value

    @property
    def guidance_rescale(self) -> float:
        """Share of guidance whose deviation is corrected."""
        return self._shown.guidance_rescale

    @property
    def _guidance_rescale(self) -> float:
        return self._shown.guidance_rescale

    @_guidance_rescale.setter
    def _guidance_rescale(self, value: float) -> None:
        self._shown.guidance_rescale = value

    @property
    def clip_skip(self) -> int | None:
        """How many of the text encoder's last layers are left out."""
        return self._shown.clip_skip

    @property
    def num_timesteps(self) -> int:
        """How many the run visits."""
        return self._shown.num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether the run is to stop."""
        return self._shown.interrupt

    @property
    def _interrupt(self) -> bool:
        return self._shown.interrupt

    @_interrupt.setter
    def _interrupt(self, value: bool) -> None:
        """In a callback, of its run; elsewhere, of all that go on."""
        run = self._runs.get(get_ident())
        for one in [run] if run is not None else list(self._runs.values()):
            one.guide.dials.interrupt = value

    @property
    def scheduler(self) -> Scheduler:
        """The component; in a callback, the copy of it that the run steps with."""
        run = self._runs.get(get_ident())
        component: Scheduler = vars(self)["scheduler"] if run is None else run.scheduler
        return component

    @scheduler.setter
    def scheduler(self, scheduler: Scheduler) -> None:
        vars(self)["scheduler"] = scheduler

    # --- components -------------------------------------------------------------------------------

    @property
    def codec(self) -> Codec:
        """The VAE, with what images go through on the way."""
        return Codec(self.vae, processor=self._processor)

    @property
    def vae_scale_factor(self) -> int:
        """Pixels for each latent, on an edge; without a VAE 8, as in most of this family."""
        return self.codec.scale_factor

    @property
    def image_processor(self) -> VaeImageProcessor:
        """What images go through."""
        return self.codec.images

    @image_processor.setter
    def image_processor(self, processor: VaeImageProcessor) -> None:
        self._processor = processor

    @property
    def mask_processor(self) -> VaeImageProcessor:
        """What masks go through."""
        return self.codec.masks

    @property
    def denoiser(self) -> Any:
        """The model that predicts."""
        return getattr(self, self.denoiser_name)

    @property
    def _predicting(self) -> list[Any]:
        """All models that a step runs."""
        return [self.denoiser]

    @property
    def prompt_encoder(self) -> PromptEncoder:
        """The text encoders."""
        raise NotImplementedError

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the model is asked without the prompt as well."""
        return self._shown.guidance_scale > 1

    def register_modules(self, **components: Any) -> None:
        """Make these the components; options of old schedulers are put right."""
        scheduler: Any = components.get("scheduler")
        config = getattr(scheduler, "config", None)
        if isinstance(config, Config):
            fixes = {key: value for key, value in self.scheduler_fixes.items() if key in config}
            unset = [key for key in config.get("_use_default_values", ()) if key not in fixes]
            scheduler.config = Config({**config, **fixes, "_use_default_values": unset})
        super().register_modules(**components)

    def load_textual_inversion(
        self,
        pretrained_model_name_or_path: Any,
        token: str | list[str | None] | None = None,
        tokenizer: Any = None,
        text_encoder: Any = None,
        **options: Any,
    ) -> None:
        """Teach the pipeline new words; see `textual_inversion.load_textual_inversion`.

        Where no text encoder is named, each gets the vectors that are for it.
        """
        encoders = self._encoders(tokenizer, text_encoder)
        load_textual_inversion(encoders, pretrained_model_name_or_path, token, **options)

    def unload_textual_inversion(
        self,
        tokens: str | list[str] | None = None,
        tokenizer: Any = None,
        text_encoder: Any = None,
    ) -> None:
        """Forget words; see `textual_inversion.unload_textual_inversion`."""
        unload_textual_inversion(self._encoders(tokenizer, text_encoder), tokens)

    def _encoders(self, tokenizer: Any, text_encoder: Any) -> list[Encoder]:
        """The text encoder that is named, or all of the pipeline's."""
        if tokenizer is not None or text_encoder is not None:
            return [Encoder("", tokenizer or self.tokenizer, text_encoder or self.text_encoder)]
        names = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
        found = [
            Encoder(name, getattr(self, other, None), getattr(self, name, None))
            for name, other in names.items()
        ]
        return [one for one in found if one.tokenizer is not None and one.model is not None]

    def maybe_convert_prompt(self, prompt: Texts, tokenizer: Any) -> Texts:
        """Prompts with textual inversions of several vectors written out."""
        if isinstance(prompt, str):
            return expanded(tokenizer, prompt)
        return [expanded(tokenizer, one) for one in prompt]

    def prepare_latents(
        self,
        batch_size: int,
        num_channels_latents: int,
        height: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device | str,
        generator: Generator = None,
        latents: Tensor | None = None,
    ) -> Tensor:
        """The latents that a run from noise begins with, (b, c, h / 8, w / 8)."""
        factor = self.vae_scale_factor
        place = torch.device(device)
        if latents is None:
            noise = Noise.of(Draws(generator), batch_size, place, dtype)
            shape = (batch_size, num_channels_latents, height // factor, width // factor)
            latents = noise.draw(shape)
        scaled: Tensor = latents.to(place) * self.scheduler.init_noise_sigma
        return scaled

    def upcast_vae(self) -> None:
        """Let the VAE compute in float32."""
        self.vae.to(torch.float32)

    @property
    def _vae_in_parts(self) -> InParts:
        """The VAE, if it can take images in parts.

        Raises:
            NotImplementedError: it cannot.
        """
        if not isinstance(self.vae, InParts):
            raise NotImplementedError(f"{type(self.vae).__name__} takes images whole")
        return self.vae

    def enable_vae_slicing(self) -> None:
        """Take the images of a batch one at a time in the VAE."""
        self._vae_in_parts.enable_slicing()

    def disable_vae_slicing(self) -> None:
        """Take the images of a batch at once."""
        self._vae_in_parts.disable_slicing()

    def enable_vae_tiling(self) -> None:
        """Take large images in overlapping tiles in the VAE."""
        self._vae_in_parts.enable_tiling()

    def disable_vae_tiling(self) -> None:
        """Take images whole."""
        self._vae_in_parts.disable_tiling()

    def enable_attention_slicing(self, slice_size: str | int | None = "auto") -> None:
        """Of no effect, which is said once: attention never holds all its scores."""
        say_once(f"enable_attention_slicing {SLICED}")

    def disable_attention_slicing(self) -> None:
        """Of no effect, as nothing is sliced; said once."""
        say_once(f"disable_attention_slicing {SLICED}")

    def maybe_free_model_hooks(self) -> None:
        """Of no effect, which is said once: models have no hooks."""
        say_once("maybe_free_model_hooks has no effect: models are not offloaded")

    def compile(self) -> None:
        """Compile the denoiser for speed; images then differ by rounding. See
        `speed.compile_model`."""
        compile_model(self.denoiser)

    def pack(self) -> None:
        """Bring weights into the order that kernels read, for speed; images differ by rounding. See
        `pack_model`."""
        for model in self._predicting:
            pack_model(model)

    # --- a run ------------------------------------------------------------------------------------

    def _sample(self, given: dict[str, Any]) -> Images:
        """Make images by the arguments of a call; `self` may be among them."""
        if self.control_argument == "image":
            given = {**given, "control_image": given["image"], "image": None}
        name = next(filter(given.get, _ATTENTION_OPTIONS), "")
        scale = _lora_scale(name, given.get(name))
        self._check_scale(name, scale)
        with scaled(scale):
            return sample(self, Arguments.of(given))

    def _encode(self, given: dict[str, Any]) -> Embeddings:
        """Encode prompts by the arguments of `encode_prompt`."""
        prompts = Arguments.of(given).prompts
        is_guided = given["do_classifier_free_guidance"]
        return self.prompt_encoder.encode(prompts, given["device"], is_guided)

    def prepare(self, arguments: Arguments) -> Run:
        """Conditions, timesteps and first latents of a run.

        Raises:
            TypeError: an argument is of the wrong kind.
            ValueError: the arguments do not fit together, or not to the models.
        """
        self._require_models(arguments)
        check(arguments, self._requirements(arguments))
        guide = self._guide(arguments)
        encoded = self.prompt_encoder.encode(arguments.prompts, self.device, guide.branches > 1)
        batch = len(encoded.prompt)
        noise = Noise.of(arguments.draws, batch, self.device, self.denoiser.dtype)
        conditions = self._conditions(encoded, guide)
        size = self._size(arguments)
        scheduler, timesteps = schedule.begin(
            vars(self)["scheduler"],  # the component, in callbacks too
            arguments.steps,
            self.device,
            is_partial=self.start.is_partial,
            is_distilled=self.is_distilled,
            flow=self._flow(size),
        )
        guide.dials.num_timesteps = len(timesteps)
        run = Run(arguments, batch, size, scheduler, timesteps, noise, guide, conditions)
        self._begin(run, self.codec)
        self._describe(run)
        return run

    def _require_models(self, arguments: Arguments) -> None:
        needed: dict[str, Any] = {self.denoiser_name: self.denoiser, "scheduler": self.scheduler}
        if arguments.result.output_type != "latent":
            needed["vae"] = self.vae
        lacking = [name for name, model in needed.items() if model is None]
        if lacking:
            raise ValueError(f"the pipeline has no {', '.join(lacking)}")

    def _requirements(self, arguments: Arguments) -> Requirements:
        beginning = arguments.beginning
        images = {
            "image": beginning.image,
            "mask_image": beginning.mask_image,
            "control_image": arguments.control.control_image,
        }
        needs: dict[str, Any] = {name: images[name] for name in self.start.needs}
        if self.start.is_partial and beginning.latents is not None:
            del needs["image"]  # latents take its place
        return Requirements(needs, is_pooled=False, tensors=self._callback_tensor_inputs)

    def _dials(self, arguments: Arguments) -> Dials:
        """What callbacks read and turn."""
        guidance = arguments.guidance
        return Dials(
            guidance.guidance_scale,
            guidance.image_guidance_scale,
            guidance.guidance_rescale,
            guidance.true_cfg_scale,
            arguments.prompts.clip_skip,
        )

    def _guide(self, arguments: Arguments) -> Guide:
        return Guide(self._dials(arguments), is_condition=False)

    def _conditions(self, encoded: Embeddings, guide: Guide) -> Conditions:
        """The prompts in all branches, and the negative ones for callbacks."""
        dtype = self.denoiser.dtype

        def cast(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(dtype)

        negative = cast(encoded.negative)
        pooled = cast(encoded.pooled)
        negative_pooled = cast(encoded.negative_pooled)
        return Conditions(
            guide.join(encoded.prompt.to(dtype), negative),
            negative,
            None if pooled is None else guide.join(pooled, negative_pooled),
            negative_pooled,
        )

    def _size(self, arguments: Arguments) -> Size:
        """Height and width that are asked for, or that the model was trained for.

        Raises:
            ValueError: the model's config asks for what nobody has trained.
        """
        height = arguments.beginning.height
        width = arguments.beginning.width
        if height and width:
            return height, width
        edges = self._trained_edges()
        trained = [edge * self.vae_scale_factor for edge in edges]
        if not all(0 < edge <= LARGEST_UNASKED for edge in trained):
            raise ValueError(
                f"the config of {self.denoiser_name} asks for images of {trained[0]} x"
                f" {trained[1]} pixels (sample_size); give height and width"
            )
        return height or trained[0], width or trained[1]

    def _trained_edges(self) -> Sequence[int]:
        """Height and width, in latents, that the model was trained for."""
        edges: Any = self.denoiser.config.get("sample_size") or 64
        return edges if isinstance(edges, (list, tuple)) else (edges, edges)

    def _flow(self, size: Size) -> Flow | None:
        """How the model visits a flow, for images of a size; None if it is no model of one."""
        return None

    def _channels(self) -> Channels:
        return Channels(self.denoiser.config.in_channels, self.denoiser.config.out_channels)

    def _begin(self, run: Run, codec: Codec) -> None:
        """Set the first latents, and what the model sees beside them."""
        self.start.begin(run, codec, self._channels())

    def _describe(self, run: Run) -> None:
        """Set the conditions that there are beside the prompt."""

    @contextmanager
    def running(self, run: Run) -> Iterator[Any]:
        """Within it the run goes on in this thread; gives its progress bar."""
        thread = get_ident()
        outer = self._runs.get(thread)  # of a callback that draws with this very pipeline
        self._runs[thread] = run
        try:
            with (
                constant_context(*self._predicting),
                self.progress_bar(total=len(run.timesteps)) as bar,
            ):
                yield bar
        finally:
            vars(self)["_last"] = run.guide.dials
            if outer is None:
                del self._runs[thread]
            else:
                self._runs[thread] = outer

    def predict(self, run: Run, i: int, x: Tensor) -> Tensor:
        """What the model makes of the scaled latents in step `i`, guided."""
        raise NotImplementedError

    def finish(self, run: Run) -> Images:
        """Latents to images."""
        return results.finish(run, run.latents, self.codec, None)


def _lora_scale(name: str, given: Mapping[str, Any] | None) -> float:
    """The scale of LoRA in a run.

    Args:
        name: of the argument that holds it.

    Raises:
        ValueError: something else is asked for.
    """
    options = dict(given or {})
    scale = float(options.pop("scale", 1.0))
    if options:
        raise ValueError(f"{name}: {', '.join(options)} is not supported")
    return scale
