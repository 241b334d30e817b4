"""Images and masks on their way into a pipeline and out of it.

Tensors are (b, c, h, w), arrays (b, h, w, c). Pillow is imported with the first image: loading
models takes neither its time nor its memory.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeGuard, TypeVar, Union, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

OutputType = Literal["pil", "np", "pt", "latent"]
OUTPUT_TYPES = get_args(OutputType)
ResizeMode = Literal["default", "fill", "crop"]
Resample = Literal["lanczos", "bicubic", "bilinear", "nearest"]
Box = tuple[int, int, int, int]
Array = np.ndarray[Any, Any]
Pixels = TypeVar("Pixels", Tensor, np.ndarray[Any, Any])
OneImage = Union["Image.Image", np.ndarray[Any, Any], Tensor]
ImageInput = OneImage | Sequence[OneImage]  # what `VaeImageProcessor.preprocess` takes


@dataclass(frozen=True)
class VaeImageProcessor:
    """What pipelines do to pixels before the VAE encodes and after it decodes them.

    Args:
        do_resize: bring images to the size that is asked for, or to such a multiple.
        vae_scale_factor: sizes are rounded down to a multiple of it.
        vae_latent_channels: a tensor of so many channels is latents, which are left alone.
        resample: the filter for PIL images; tensors and arrays are resized to the nearest
            neighbour.
        reducing_gap: None.
        do_normalize: map [0, 1] to [-1, 1].
        do_binarize: make every value 0 or 1, as masks need.
        do_convert_rgb: of no effect, as PIL images become RGB in any case.
        do_convert_grayscale: convert PIL images to one channel, not to RGB, and let tensors and
            arrays have none.
    """

    do_resize: bool = True
    vae_scale_factor: int = 8
    vae_latent_channels: int = 4
    resample: Resample = "lanczos"
    reducing_gap: None = None
    do_normalize: bool = True
    do_binarize: bool = False
    do_convert_rgb: bool = False
    do_convert_grayscale: bool = False

    def preprocess(
        self,
        image: ImageInput | None,
        height: int | None = None,
        width: int | None = None,
        resize_mode: ResizeMode = "default",
        crops_coords: Box | None = None,
    ) -> Tensor:
        """One image or several -> float32 (b, c, h, w).

        Args:
            image: a PIL image, an array (h, w, c), a tensor (c, h, w), a batch of either, or a list
                of any of these; arrays and tensors are in [0, 1], or in [-1, 1] if they have
                negative values.
            height: in pixels; by default the image's.
            width: in pixels; by default the image's.
            resize_mode: for PIL images: `default` stretches, `fill` and `crop` keep the
                proportions.
            crops_coords: cut this box (left, top, right, bottom) out of PIL images first.

        Raises:
            ValueError: it is no image.
        """
        images = self._listed(image)
        first = images[0]
        if _is_picture(first):
            pixels = self._from_pictures(images, height, width, resize_mode, crops_coords)
        else:
            batches = [one if one.ndim == 4 else one[None] for one in images]
            is_array = isinstance(first, np.ndarray)
            pixels = self.numpy_to_pt(np.concatenate(batches)) if is_array else torch.cat(batches)
            if not is_array and pixels.shape[1] == self.vae_latent_channels:
                return pixels
            if self.do_resize:
                target = self._size(pixels.shape[-2], pixels.shape[-1], height, width)
                pixels = F.interpolate(pixels, target)
        if self.do_normalize and pixels.min() < 0:
            warnings.warn(
                "the image has negative values: it is taken to be in [-1, 1] already", stacklevel=2
            )
        elif self.do_normalize:
            pixels = self.normalize(pixels)
        return self.binarize(pixels) if self.do_binarize else pixels

    def _from_pictures(
        self,
        images: list[Image.Image],
        height: int | None,
        width: int | None,
        resize_mode: ResizeMode,
        crop: Box | None,
    ) -> Tensor:
        """PIL images -> (b, c, h, w), cropped and at one size."""
        if crop:
            images = [one.crop(crop) for one in images]
        if not self.do_resize:
            return torch.cat([self._from_pil(one) for one in images])
        target = self._size(images[0].height, images[0].width, height, width)
        return torch.cat([self._from_pil(self.resize(one, *target, resize_mode)) for one in images])

    def _listed(self, image: Any) -> list[Any]:
        """The images that are given, which are of one kind.

        Raises:
            ValueError: they are not.
        """
        if self.do_convert_grayscale and isinstance(image, (Tensor, np.ndarray)):
            image = _with_channel(image)
        images = list(image) if isinstance(image, (list, tuple)) else [image]
        kinds = {type(one) for one in images if isinstance(one, (Tensor, np.ndarray))}
        are_pictures = all(_is_picture(one) for one in images)
        if not images or len(kinds) > 1 or not (kinds or are_pictures):
            raise ValueError(
                "an image must be a PIL image, a numpy array, a tensor, or a list of one of these"
            )
        return images

    def _size(
        self, height: int, width: int, want_height: int | None, want_width: int | None
    ) -> tuple[int, int]:
        unit = self.vae_scale_factor
        height = want_height or height
        width = want_width or width
        return height // unit * unit, width // unit * unit

    def _from_pil(self, image: Image.Image) -> Tensor:
        grey = self.do_convert_grayscale
        image = self.convert_to_grayscale(image) if grey else self.convert_to_rgb(image)
        return self.numpy_to_pt(self.pil_to_numpy(image))

    def resize(
        self, image: Image.Image, height: int, width: int, resize_mode: ResizeMode = "default"
    ) -> Image.Image:
        """A PIL image at a size: stretched, or scaled and then cropped or filled up with its
        outermost pixels."""
        from PIL import Image

        if resize_mode == "default":
            return image.resize((width, height), Image.Resampling[self.resample.upper()])
        w, h = image.size
        fills = resize_mode == "fill"
        fits_width = (width / height < w / h) == fills
        size = (width, h * width // w) if fits_width else (w * height // h, height)
        scaled = image.resize(size, Image.Resampling.LANCZOS)
        left = width // 2 - size[0] // 2
        top = height // 2 - size[1] // 2
        result = Image.new("RGB", (width, height))
        result.paste(scaled, (left, top))
        if top > 0 and fills:
            for y, edge in ((0, 0), (top + size[1], size[1])):
                row = scaled.resize((width, top), box=(0, edge, width, edge))
                result.paste(row, (0, y))
        elif left > 0 and fills:
            for x, edge in ((0, 0), (left + size[0], size[0])):
                column = scaled.resize((left, height), box=(edge, 0, edge, height))
                result.paste(column, (x, 0))
        return result

    def postprocess(
        self, image: Tensor, output_type: OutputType = "pil", do_denormalize: Sequence[bool] = ()
    ) -> Any:
        """What the VAE returns -> PIL images, an array (b, h, w, c) or a tensor, in [0, 1]; latents
        as they are.

        Args:
            image: (b, c, h, w).
            output_type: pil, np, pt or latent.
            do_denormalize: for each image, whether it is in [-1, 1]; by default all are.
        """
        if output_type == "latent":
            return image
        flags = do_denormalize or [self.do_normalize] * len(image)
        pairs = zip(image, flags, strict=True)
        image = torch.stack([self.denormalize(x) if flag else x for x, flag in pairs])
        if output_type == "pt":
            return image
        array = self.pt_to_numpy(image)
        if output_type == "np":
            return array
        return numpy_to_pil(array)

    # --- the parts of both, as diffusers has them -------------------------------------------------

    @staticmethod
    def numpy_to_pil(images: Array) -> list[Image.Image]:
        """An array (b, h, w, c) in [0, 1] -> images."""
        return numpy_to_pil(images)

    @staticmethod
    def pil_to_numpy(images: Image.Image | Sequence[Image.Image]) -> Array:
        """Images -> an array (b, h, w, c) in [0, 1]."""
        from PIL import Image

        listed = [images] if isinstance(images, Image.Image) else images
        arrays = [np.asarray(one, dtype=np.float32) / 255.0 for one in listed]
        return np.stack([one.reshape(*one.shape[:2], -1) for one in arrays])

    @staticmethod
    def numpy_to_pt(images: Array) -> Tensor:
        """An array (b, h, w, c) or (b, h, w) -> a tensor (b, c, h, w)."""
        array = images if images.ndim == 4 else images[..., None]
        return torch.from_numpy(array.transpose(0, 3, 1, 2))

    @staticmethod
    def pt_to_numpy(images: Tensor) -> Array:
        """A tensor (b, c, h, w) -> an array (b, h, w, c)."""
        array: Array = images.cpu().permute(0, 2, 3, 1).float().numpy()
        return array

    @staticmethod
    def normalize(images: Pixels) -> Pixels:
        """[0, 1] -> [-1, 1]."""
        return 2.0 * images - 1.0

    @staticmethod
    def denormalize(images: Pixels) -> Pixels:
        """[-1, 1] -> [0, 1]."""
        return (images * 0.5 + 0.5).clip(0, 1)

    @staticmethod
    def binarize(image: Tensor) -> Tensor:
        """0 or 1, whichever is nearer."""
        return (image >= 0.5).to(image.dtype)

    @staticmethod
    def convert_to_rgb(image: Image.Image) -> Image.Image:
        """A PIL image of three channels."""
        return image.convert("RGB")

    @staticmethod
    def convert_to_grayscale(image: Image.Image) -> Image.Image:
        """A PIL image of one channel."""
        return image.convert("L")

    def blur(self, image: Image.Image, blur_factor: int = 4) -> Image.Image:
        """A mask with soft edges: a Gaussian of so many pixels."""
        from PIL import ImageFilter

        return image.filter(ImageFilter.GaussianBlur(blur_factor))

    def apply_overlay(
        self,
        mask: Image.Image,
        init_image: Image.Image,
        image: Image.Image,
        crop_coords: Box | None = None,
    ) -> Image.Image:
        """An inpainted image, new where the mask is white and as it was elsewhere; `crop_coords` is
        the part of the image that was painted."""
        return apply_overlay(self, mask, init_image, image, crop_coords or (0, 0, *init_image.size))


def _is_picture(image: object) -> TypeGuard[Image.Image]:
    from PIL import Image

    return isinstance(image, Image.Image)


def edges_of(image: ImageInput) -> tuple[int, int]:
    """Height and width of an image, or of the first of several."""
    first: Any = image[0] if isinstance(image, (list, tuple)) else image
    if _is_picture(first):
        return first.height, first.width
    height, width = first.shape[-2:] if isinstance(first, Tensor) else first.shape[-3:-1]
    return int(height), int(width)


def pt_to_pil(images: Tensor) -> list[Image.Image]:
    """A tensor (b, c, h, w) in [-1, 1] -> images."""
    return numpy_to_pil(VaeImageProcessor.pt_to_numpy(VaeImageProcessor.denormalize(images)))


def numpy_to_pil(images: np.ndarray[Any, Any]) -> list[Image.Image]:
    """An array (b, h, w, c) or (h, w, c) in [0, 1] -> images."""
    from PIL import Image

    batch = images[None] if images.ndim == 3 else images
    pixels = (batch * 255).round().astype("uint8")
    is_grey = pixels.shape[-1] == 1
    return [Image.fromarray(one.squeeze(-1) if is_grey else one) for one in pixels]


def _with_channel(image: Tensor | np.ndarray[Any, Any]) -> Tensor | np.ndarray[Any, Any]:
    """(b, h, w) with the channel that it lacks; an array that ends in one channel is (h, w, 1)."""
    if image.ndim != 3:
        return image
    if isinstance(image, Tensor):
        return image.unsqueeze(1)
    return np.expand_dims(image, 0 if image.shape[-1] == 1 else -1)


def crop_region(mask: Image.Image, width: int, height: int, pad: int) -> Box:
    """The box (left, top, right, bottom) around a mask, `pad` pixels wider, with the proportions of
    width and height.

    It is as in masked inpainting of the web UIs: grown on its shorter side, and moved back inside
    the image.
    """
    left, top, right, bottom = mask.convert("L").getbbox() or (0, 0, 0, 0)
    left = max(left - pad, 0)
    right = min(right + pad, mask.width)
    top = max(top - pad, 0)
    bottom = min(bottom + pad, mask.height)
    ratio = width / height
    if (right - left) / (bottom - top) > ratio:
        top, bottom = _grown(top, bottom, int((right - left) / ratio), mask.height)
    else:
        left, right = _grown(left, right, int((bottom - top) * ratio), mask.width)
    return left, top, right, bottom


def _grown(start: int, stop: int, length: int, limit: int) -> tuple[int, int]:
    """An interval grown to a length around its middle, but inside [0, limit]."""
    start -= (length - (stop - start)) // 2
    start = max(min(start, limit - length), 0)
    return start, min(start + length, limit)


def apply_overlay(
    processor: VaeImageProcessor,
    mask: Image.Image,
    original: Image.Image,
    image: Image.Image,
    box: Box,
) -> Image.Image:
    """An inpainted crop put back into the original image: new where the mask is white, original
    where it is black."""
    from PIL import Image, ImageOps

    left, top, right, bottom = box
    kept = Image.new("RGBa", original.size)
    outside = ImageOps.invert(mask.convert("L"))
    kept.paste(original.convert("RGBA").convert("RGBa"), mask=outside)
    result = Image.new("RGBA", original.size)
    painted = processor.resize(image, bottom - top, right - left, "crop")
    result.paste(painted, (left, top))
    result = result.convert("RGB").convert("RGBA")
    result.alpha_composite(kept.convert("RGBA"))
    return result.convert("RGB")
