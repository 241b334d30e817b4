"""The levers of speed: what they keep, and that they let go of it."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from weightport.runtime.speed import compile_model, constant_context  # noqa: E402
from weightport.runtime.transformer import Attention  # noqa: E402
from weightport.runtime.unet import UNet2DConditionModel  # noqa: E402

CONFIG = {
    "block_out_channels": [32, 64],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "cross_attention_dim": 16,
    "attention_head_dim": 4,
}


@pytest.fixture
def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(CONFIG).eval()


def inputs(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 7, 16, generator=generator)


def projections(unet: UNet2DConditionModel, counted: list[int]) -> None:
    """Count how often keys are made of the text."""
    for module in unet.modules():
        if isinstance(module, Attention) and module.to_k.in_features == 16:
            module.to_k.register_forward_hook(lambda *_: counted.append(1))


@torch.no_grad()
def test_a_constant_context_is_projected_once(unet: UNet2DConditionModel) -> None:
    counted: list[int] = []
    projections(unet, counted)
    x, text = inputs(1)
    expected = [unet(x, t, text).sample for t in (9, 5, 1)]
    layers = len(counted) // 3
    assert layers > 1
    counted.clear()
    with constant_context(unet):
        for t, before in zip((9, 5, 1), expected, strict=True):
            assert torch.equal(unet(x, t, text[:]).sample, before), "bits do not change, for a view neither"
        assert len(counted) == layers
    assert all(module.constant is None for module in unet.modules() if isinstance(module, Attention))
    unet(x, 1, text)
    assert len(counted) == 2 * layers


@torch.no_grad()
def test_another_context_is_noticed(unet: UNet2DConditionModel) -> None:
    x, text = inputs(2)
    others = [text.clone() * 2, text[:1].expand_as(text), text.flip(0)]
    expected = [unet(x, 3, one).sample for one in others]
    with constant_context(unet):
        unet(x, 3, text)
        for one, before in zip(others, expected, strict=True):
            assert torch.equal(unet(x, 3, one).sample, before)
        text.mul_(2)
        assert torch.equal(unet(x, 3, text).sample, expected[0]), "changed in place"


def test_gradients_flow(unet: UNet2DConditionModel) -> None:
    x, text = inputs(3)
    text.requires_grad_()
    with constant_context(unet):
        for _ in range(2):
            text.grad = None
            unet(x, 3, text).sample.sum().backward()
            assert text.grad is not None
    with torch.inference_mode(), constant_context(unet):
        unet(x, 3, text.clone())


def test_what_fails_lets_go(unet: UNet2DConditionModel) -> None:
    with pytest.raises(ZeroDivisionError), constant_context(unet):
        raise ZeroDivisionError
    assert all(module.constant is None for module in unet.modules() if isinstance(module, Attention))


@torch.no_grad()
def test_channels_last_is_kept_and_equal_within_rounding(unet: UNet2DConditionModel) -> None:
    x, text = inputs(4)
    expected = unet(x, 3, text).sample
    layouts: list[bool] = []
    for module in unet.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(
                lambda _module, _inputs, y: layouts.append(y.is_contiguous(memory_format=torch.channels_last))
            )
    unet.to(memory_format=torch.channels_last)
    got = unet(x, 3, text).sample
    assert all(layouts)
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.full
@torch.no_grad()
def test_compiled_equal_within_rounding(unet: UNet2DConditionModel) -> None:
    x, text = inputs(5)
    expected = unet(x, 3, text).sample
    compile_model(unet)
    for _ in range(2):
        got = unet(x, torch.tensor(3), text).sample
        assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
