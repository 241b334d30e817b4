"""How alike two images or latents are, and how well an image fits its prompt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .. import differences


def rmse(a: Tensor, b: Tensor) -> float:
    """Root mean square difference of two tensors of one shape."""
    return float((a.double() - b.double()).square().mean().sqrt())


def psnr(a: Image.Image, b: Image.Image) -> float:
    """Peak signal-to-noise ratio of two images, in dB; infinite for equal ones."""
    return differences.psnr(np.asarray(a), np.asarray(b), peak=255)


@dataclass(frozen=True)
class Metric:
    """A learned score of an image: `(image, reference image, prompt) -> number`."""

    name: str
    score: Callable[[Image.Image, Image.Image, str], float]

    def __call__(self, image: Image.Image, reference: Image.Image, prompt: str) -> float:
        """The score."""
        return self.score(image, reference, prompt)


def installed_metrics() -> tuple[list[Metric], list[str]]:
    """The learned metrics that can be used, and for each other one, why it cannot.

    LPIPS (Zhang et al. 2018, https://arxiv.org/abs/1801.03924) comes from the package `lpips`, the
    CLIP score (Hessel et al. 2021, https://arxiv.org/abs/2104.08718) from `open_clip`; both fetch
    weights of their own when first used.
    """
    metrics = []
    reasons = []
    for name, make in (("LPIPS", _lpips), ("CLIP score", _clip_score)):
        try:
            metrics.append(make(name))
        except ImportError:
            reasons.append(f'{name} is not measured: `pip install "weightport[quality]"`')
        except Exception as error:  # their downloads fail in as many ways as there are networks
            lines = str(error).splitlines() or [repr(error)]
            reasons.append(f"{name} is not measured: {lines[0]}")
    return metrics, reasons


def _lpips(name: str) -> Metric:
    import lpips

    network = lpips.LPIPS(net="alex", verbose=False).eval()

    def signed(image: Image.Image) -> Tensor:
        pixels = torch.from_numpy(np.asarray(image, np.float32))
        return pixels.permute(2, 0, 1)[None] / 127.5 - 1

    @torch.inference_mode()
    def score(image: Image.Image, reference: Image.Image, prompt: str) -> float:
        return float(network(signed(image), signed(reference)))

    return Metric(name, score)


def _clip_score(name: str) -> Metric:
    import open_clip

    model, _, preprocess = open_clip.create_model_and_transforms("ViT-B-32", pretrained="openai")
    model.eval()
    tokenize = open_clip.get_tokenizer("ViT-B-32")

    @torch.inference_mode()
    def score(image: Image.Image, reference: Image.Image, prompt: str) -> float:
        drawn = model.encode_image(preprocess(image)[None])
        asked = model.encode_text(tokenize([prompt]))
        return 100 * max(float(torch.cosine_similarity(drawn, asked)), 0.0)

    return Metric(name, score)
