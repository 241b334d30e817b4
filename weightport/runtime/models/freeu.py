"""FreeU: what a UNet makes of its skips, weighed against what comes from below.

Si et al., FreeU: Free Lunch in Diffusion U-Net, https://arxiv.org/abs/2309.11497, section 3.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class FreeU(NamedTuple):
    """Factors of one block on the way up.

    Attributes:
        backbone: b of the paper, of the first half of the channels that come from below.
        skip: s, of the lowest frequencies of a skip.
    """

    backbone: float
    skip: float

    def weigh(self, x: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
        """Both, (b, c, h, w) each, as they are joined."""
        raised, rest = x.tensor_split([x.shape[1] // 2], dim=1)
        return torch.cat([raised * self.backbone, rest], dim=1), low_scaled(skip, self.skip)


def low_scaled(x: Tensor, factor: float) -> Tensor:
    """Images (b, c, h, w) whose lowest frequencies, 0 and -1 in both directions, are scaled."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    spectrum = torch.fft.fftn(wide, dim=(-2, -1))
    lowest = torch.tensor([0, -1], device=x.device)
    factors = wide.new_ones(x.shape[-2:])
    factors[lowest[:, None], lowest] = factor
    scaled: Tensor = torch.fft.ifftn(spectrum * factors, dim=(-2, -1)).real
    return scaled.to(x.dtype)
