"""The levers of speed: what they keep, and that they let go of it."""

from __future__ import annotations

import platform
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from mmap import PAGESIZE
from pathlib import Path
from typing import Any

import pytest
import torch

from weightport.runtime.models.attention import Attention, constant_context
from weightport.runtime.models.unet import UNet2DConditionModel
from weightport.runtime.speed import (
    PackedConvolution,
    compile_model,
    compile_steps,
    pack_model,
)

from ..support.forks import run_python

CONFIG: dict[str, Any] = {
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
    return UNet2DConditionModel(**CONFIG).eval()


def inputs(seed: int, size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 4, size, size, generator=generator), torch.randn(
        2, 7, 16, generator=generator
    )


def convolutions(unet: UNet2DConditionModel) -> list[Any]:
    return [module for module in unet.modules() if isinstance(module, torch.nn.Conv2d)]


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
            assert torch.equal(unet(x, t, text[:]).sample, before), (
                "bits do not change, for a view neither"
            )
        assert len(counted) == layers
    assert all(
        module.constant is None for module in unet.modules() if isinstance(module, Attention)
    )
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


@torch.no_grad()
def test_each_thread_keeps_its_own_context(unet: UNet2DConditionModel) -> None:
    x, text = inputs(2)
    other = text * 2
    expected = [unet(x, 3, one).sample for one in (text, other)]
    counted: list[int] = []
    with constant_context(unet), ThreadPoolExecutor(1) as elsewhere:
        unet(x, 3, text)
        within = constant_context(unet)
        elsewhere.submit(within.__enter__).result()
        projections(unet, counted)
        for _ in range(2):
            theirs = elsewhere.submit(torch.no_grad()(unet), x, 3, other).result().sample
            assert torch.equal(theirs, expected[1])
            assert torch.equal(unet(x, 3, text).sample, expected[0])
        elsewhere.submit(within.__exit__, None, None, None).result()
        layers = len(counted)
        unet(x, 3, text)
        assert len(counted) == layers, "the other thread's end is not this one's"
        elsewhere.submit(torch.no_grad()(unet), x, 3, other).result()
        assert len(counted) == 2 * layers


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
    assert all(
        module.constant is None for module in unet.modules() if isinstance(module, Attention)
    )


@pytest.fixture
def mapped(unet: UNet2DConditionModel, tmp_path: Path) -> UNet2DConditionModel:
    """The same UNet in a mapped file."""
    unet.save_pretrained(tmp_path)
    return UNet2DConditionModel.from_pretrained(tmp_path)


def pages_in_memory(tensor: torch.Tensor) -> int:
    """How many of the whole pages of a tensor are in memory."""
    first, last = -(-tensor.data_ptr() // PAGESIZE), (tensor.data_ptr() + tensor.nbytes) // PAGESIZE
    with Path("/proc/self/pagemap").open("rb") as file:
        file.seek(8 * first)
        return sum(state >> 7 for state in file.read(8 * (last - first))[7::8])


@torch.no_grad()
def test_packed_equal_within_rounding(unet: UNet2DConditionModel) -> None:
    expected = [unet(x, 3, text).sample for x, text in (inputs(5), inputs(6, size=12), inputs(7))]
    pack_model(unet)
    for (x, text), before in zip((inputs(5), inputs(6, size=12), inputs(7)), expected, strict=True):
        for _ in range(2):
            got = unet(x, 3, text).sample
            assert (got - before).abs().max() <= 1e-5 * before.abs().max()


def test_compiling_on_a_cpu_is_packing(unet: UNet2DConditionModel) -> None:
    compile_model(unet)
    assert all(isinstance(layer.forward, PackedConvolution) for layer in convolutions(unet))
    assert "forward" not in vars(unet)


@pytest.mark.parametrize("supported", [False, True])
def test_bfloat16_is_packed_where_the_cpu_has_it(
    unet: UNet2DConditionModel, monkeypatch: pytest.MonkeyPatch, supported: bool
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    pack_model(unet.bfloat16())
    for layer in convolutions(unet):
        assert isinstance(layer.forward, PackedConvolution) == supported
        assert layer.weight.is_contiguous(
            memory_format=torch.channels_last
        ) != supported or layer.kernel_size == (1, 1)


@pytest.mark.parametrize("place", [torch.float16, "meta"])
def test_others_become_channels_last(unet: UNet2DConditionModel, place: Any) -> None:
    pack_model(unet.to(place))
    for layer in convolutions(unet):
        assert layer.weight.is_contiguous(memory_format=torch.channels_last)
        assert "forward" not in vars(layer)


@torch.no_grad()
def test_weights_are_packed_once_for_a_shape(unet: UNet2DConditionModel) -> None:
    pack_model(unet)
    x, text = inputs(6)
    layers = convolutions(unet)
    unet(x, 3, text)
    weights = [layer.forward.packed.weight for layer in layers]
    assert all(weight.is_mkldnn for weight in weights)
    unet(x, 2, text)
    assert all(
        layer.forward.packed.weight is weight for layer, weight in zip(layers, weights, strict=True)
    )


@torch.no_grad()
def test_packed_weights_take_the_place_of_those_in_the_file(
    unet: UNet2DConditionModel, mapped: UNet2DConditionModel
) -> None:
    x, text = inputs(7)
    wide = [module.weight for module in mapped.modules() if isinstance(module, torch.nn.Conv2d)]
    wide = [weight for weight in wide if weight.nbytes > 2 * PAGESIZE]
    mapped(x, 3, text)
    assert all(pages_in_memory(weight) for weight in wide)
    pack_model(mapped)
    mapped(x, 3, text)
    assert not any(pages_in_memory(weight) for weight in wide)
    ours = mapped.state_dict()
    assert all(torch.equal(tensor, ours[key]) for key, tensor in unet.state_dict().items()), (
        "read again"
    )


@torch.no_grad()
def test_weights_that_were_written_to_are_kept(
    unet: UNet2DConditionModel, mapped: UNet2DConditionModel
) -> None:
    x, text = inputs(8)
    changed = "mid_block.resnets.0.conv1.weight"
    for model in (unet, mapped):
        # as merging a LoRA does, unseen by versions
        model.get_parameter(changed).data[3, 5] += 1
    expected = unet(x, 3, text).sample
    pack_model(mapped)
    got = mapped(x, 3, text).sample
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert torch.equal(mapped.get_parameter(changed), unet.get_parameter(changed))


def test_packed_layers_have_gradients(unet: UNet2DConditionModel) -> None:
    x, text = inputs(9)
    pack_model(unet)
    unet(x.requires_grad_(), 3, text).sample.sum().backward()
    assert x.grad is not None


@torch.no_grad()
def test_channels_last_is_kept_and_equal_within_rounding(unet: UNet2DConditionModel) -> None:
    x, text = inputs(4)
    expected = unet(x, 3, text).sample
    layouts: list[bool] = []
    for module in unet.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(
                lambda _module, _inputs, y: layouts.append(
                    y.is_contiguous(memory_format=torch.channels_last)
                )
            )
    unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    got = unet(x, 3, text).sample
    assert all(layouts)
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@torch.no_grad()
def test_each_shape_is_compiled_once(
    unet: UNet2DConditionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs: list[list[Any]] = []

    def backend(graph: Any, inputs: list[Any], **_: Any) -> Any:
        graphs.append(inputs)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    compile_steps(unet)
    for size in (8, 12):
        x, text = inputs(10, size)
        for _ in range(2):  # runs
            with constant_context(unet):
                unet(x, torch.tensor(3), text)
        unet(x, torch.tensor(2), text)
    assert len(graphs) == 2
    assert all(isinstance(value, torch.Tensor) for values in graphs for value in values), (
        "no size is left open"
    )


@torch.no_grad()
def test_outputs_outlive_the_next_call(
    unet: UNet2DConditionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = torch.zeros(1)  # as a CUDA graph writes to the same at each call
    backend = lambda *_args, **_options: lambda *_inputs: (memory.add_(1),)  # noqa: E731
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    compile_steps(unet)
    x, text = inputs(11)
    assert [float(y.sample) for y in [unet(x, torch.tensor(3), text) for _ in range(2)]] == [1, 2]


@pytest.mark.full
@torch.no_grad()
def test_compiled_equal_within_rounding(unet: UNet2DConditionModel) -> None:
    x, text = inputs(5)
    expected = unet(x, 3, text).sample
    compile_steps(unet)
    for _ in range(2):
        got = unet(x, torch.tensor(3), text).sample
        assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


_DECODE_AGAIN_AND_AGAIN = """
import resource
import torch
from weightport import AutoencoderKL

names = {"down_block_types": ["DownEncoderBlock2D"], "up_block_types": ["UpDecoderBlock2D"]}
narrow = {"block_out_channels": [8], "norm_num_groups": 4, "layers_per_block": 1}
vae = AutoencoderKL.from_config(names | narrow)
vae.decoder.register_module("mid_block", torch.nn.Identity())  # attention would take most time
latents = torch.randn(1, 4, 1088, 1088)  # an activation is 38 MB, more than glibc keeps by itself
with torch.no_grad():
    seen = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        vae.decode(latents)
        seen.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(seen[2:]))  # under load, where activations lie settles a run later
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other libraries are left alone")
def test_memory_of_large_activations_is_kept_for_the_next_run() -> None:
    ended = run_python(_DECODE_AGAIN_AND_AGAIN)
    assert ended.status == 0, ended.err
    assert int(ended.out) < 20_000, "of 250,000 without"
