"""The safety checker of Stable Diffusion 1: which images are near what should not be shown.

An image and each concept are vectors of CLIP (Radford et al. 2021,
https://arxiv.org/abs/2103.00020); an image is flagged when the cosine between the two exceeds the
concept's threshold. Rando et al. 2022 took it apart: https://arxiv.org/abs/2210.04610.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, TypeVar, Unpack

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from ...hub.mixin import PushToHub
from ..loading.config import Config, HasConfig
from ..loading.model import TransformersModel
from ..loading.source import Place, PlaceOptions
from ..text.prompt_tokenizer import Encoding
from .clip import CLIPEncoder

if TYPE_CHECKING:
    from PIL import Image

CONCEPTS = 17
SPECIAL_CONCEPTS = 3
STRICTER = 0.01  # is added to the cosines of an image that is near a special concept
VISION: dict[str, Any] = {  # the defaults of transformers
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "image_size": 224,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-5,
    "num_attention_heads": 12,
    "num_channels": 3,
    "num_hidden_layers": 12,
    "patch_size": 32,
}
Images = TypeVar("Images", Tensor, NDArray[Any])


class CLIPVisionEmbeddings(nn.Module):
    """An image as a sequence: a vector for the whole, then one for each patch.

    Positions are added.
    """

    def __init__(self, c: Config) -> None:
        super().__init__()
        patches = (c.image_size // c.patch_size) ** 2
        self.class_embedding = nn.Parameter(torch.zeros(c.hidden_size))
        self.patch_embedding = nn.Conv2d(
            c.num_channels, c.hidden_size, c.patch_size, stride=c.patch_size, bias=False
        )
        self.position_embedding = nn.Embedding(1 + patches, c.hidden_size)

    def forward(self, pixels: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, 1 + patches, hidden_size)."""
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        whole = self.class_embedding.expand(len(pixels), 1, -1)
        return torch.cat([whole, patches], dim=1) + self.position_embedding.weight


class CLIPVisionTransformer(nn.Module):
    """Everything below the prefix `vision_model.`; `pre_layrnorm` is how OpenAI's port spelt it."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.embeddings = CLIPVisionEmbeddings(c)
        self.pre_layrnorm = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.encoder = CLIPEncoder(c, is_causal=False)
        self.post_layernorm = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)

    def forward(self, pixels: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, hidden_size), the image as a whole."""
        x = self.pre_layrnorm(self.embeddings(pixels))
        last = self.encoder(x)[-1]
        pooled: Tensor = self.post_layernorm(last[:, 0])
        return pooled


class StableDiffusionSafetyChecker(TransformersModel):
    """Flags images and blackens those it flags.

    Args:
        config: the content of `safety_checker/config.json`; absent keys take the defaults of
            transformers.
    """

    library: ClassVar[str] = "stable_diffusion"

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__({"projection_dim": 512, **config})
        given: dict[str, Any] = {}
        for name in ("vision_config", "vision_config_dict"):
            given |= config.get(name) or {}
        vision = Config({key: given.get(key, default) for key, default in VISION.items()})
        dim = self.config.projection_dim
        transformer = CLIPVisionTransformer(vision)
        self.vision_model = nn.Sequential(OrderedDict(vision_model=transformer))  # twice, as keys
        self.visual_projection = nn.Linear(vision.hidden_size, dim, bias=False)
        self.concept_embeds = _constants(CONCEPTS, dim)
        self.special_care_embeds = _constants(SPECIAL_CONCEPTS, dim)
        self.concept_embeds_weights = _constants(CONCEPTS)
        self.special_care_embeds_weights = _constants(SPECIAL_CONCEPTS)

    @classmethod
    def rename(cls, key: str) -> str | None:
        """transformers 5 leaves one level out; older files hold the numbers of the positions."""
        if key.startswith("vision_model.") and not key.startswith("vision_model.vision_model."):
            key = f"vision_model.{key}"
        return None if key.endswith(".position_ids") else key

    def scores(self, clip_input: Tensor) -> tuple[Tensor, Tensor]:
        """How far images (b, 3, h, w) exceed the thresholds.

        Returns:
            float32: (b, 3) for the special concepts, (b, 17) for the concepts.
        """
        image = F.normalize(self.visual_projection(self.vision_model(clip_input)))
        special_cosines = image @ F.normalize(self.special_care_embeds).T
        special = special_cosines.float() - self.special_care_embeds_weights.float()
        cosines = image @ F.normalize(self.concept_embeds).T
        concepts = cosines.float() - self.concept_embeds_weights.float()
        special = special.round(decimals=3)
        near = (special > 0).any(dim=1, keepdim=True)
        return special, (concepts + STRICTER * near).round(decimals=3)

    @torch.no_grad()
    def forward(self, clip_input: Tensor, images: Images) -> tuple[Images, list[bool]]:
        """Check images.

        Args:
            clip_input: (b, 3, h, w), what `CLIPImageProcessor` makes of the images.
            images: (b, ...), the images themselves, in any layout.

        Returns:
            The images, black where they are flagged, and which ones are.
        """
        flags: list[bool] = (self.scores(clip_input)[1] > 0).any(dim=1).tolist()
        if any(flags):
            message = (
                "%d of %d images are black: the safety checker flagged them; try another prompt or"
                " seed"
            )
            logging.getLogger(__name__).warning(message, sum(flags), len(flags))
            images = images.clone() if isinstance(images, Tensor) else images.copy()
            images[[i for i, flag in enumerate(flags) if flag]] = 0
        return images, flags


def _constants(*shape: int) -> nn.Parameter:
    """Numbers that are loaded and never trained."""
    return nn.Parameter(torch.ones(*shape), requires_grad=False)


class CLIPImageProcessor(HasConfig, PushToHub):
    """Images as CLIP saw them in training.

    The short side is resized, the centre cut out, and colours are normalised.

    Args:
        config: the content of `preprocessor_config.json`.
    """

    config_name: ClassVar[str] = "preprocessor_config.json"
    library: ClassVar[str] = "transformers"
    DEFAULTS: ClassVar[dict[str, Any]] = {
        "crop_size": {"height": 224, "width": 224},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,  # PIL's number of bicubic
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": 224},
    }

    def __init__(self, config: Mapping[str, Any] | None = None) -> None:
        options = dict(self.DEFAULTS)
        options |= {key: value for key, value in (config or {}).items() if key in options}
        size = options["size"]
        if isinstance(size, int):  # as in older files
            options["size"] = {"shortest_edge": size}
        crop = options["crop_size"]
        if isinstance(crop, int):
            options["crop_size"] = {"height": crop, "width": crop}
        self.config = Config(options)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Place, **options: Unpack[PlaceOptions]
    ) -> Self:
        """Read `preprocessor_config.json`."""
        return cls(cls.load_config(pretrained_model_name_or_path, **options))

    save_pretrained = HasConfig.save_config

    def _saved_config(self) -> dict[str, Any]:
        kind = {
            "feature_extractor_type": "CLIPFeatureExtractor",
            "image_processor_type": "CLIPImageProcessor",
        }
        return {**self.config, **kind}

    def __call__(
        self,
        images: Image.Image | Sequence[Image.Image],
        return_tensors: Literal["pt", "np"] | None = None,
    ) -> Encoding:
        """Images -> `pixel_values`, float32.

        (b, 3, h, w) with `return_tensors`, a list of (3, h, w) without.
        """
        from PIL import Image

        given = [images] if isinstance(images, Image.Image) else images
        pixels = [self._pixels(image) for image in given]
        if return_tensors is None:
            return Encoding(pixel_values=pixels)
        batch = np.stack(pixels)
        return Encoding(pixel_values=torch.from_numpy(batch) if return_tensors == "pt" else batch)

    def _pixels(self, image: Image.Image) -> NDArray[Any]:
        from PIL import Image

        c = self.config
        if c.do_convert_rgb:
            if image.has_transparency_data:
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image.convert("RGBA"))
            image = image.convert("RGB")
        if c.do_resize:
            image = image.resize(self._resized(*image.size), c.resample)
        if c.do_center_crop:
            width = c.crop_size["width"]
            height = c.crop_size["height"]
            left = (image.width - width) // 2
            top = (image.height - height) // 2
            image = image.crop((left, top, left + width, top + height))  # black beyond the edges
        x: NDArray[Any] = np.asarray(image)
        if c.do_rescale:
            x = (x.astype(np.float64) * c.rescale_factor).astype(np.float32)
        if c.do_normalize:
            mean = np.float32(c.image_mean)
            std = np.float32(c.image_std)
            x = (x.astype(np.float32) - mean) / std
        return np.ascontiguousarray(x.transpose(2, 0, 1))

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """The size that an image of this size is resized to."""
        size = self.config.size
        if "shortest_edge" not in size:
            return size["width"], size["height"]
        short = size["shortest_edge"]
        if width <= height:
            return short, int(short * height / width)
        return int(short * width / height), short
